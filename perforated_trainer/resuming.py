"""Checkpoints while training: what is written into one, which one a run resumes from, and what it compares then."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerState

from . import checkpoint, report, run_dir
from .arguments import PerforatedError, compared_settings, from_command_line
from .callbacks import say
from .evaluation import EvaluatingTrainer
from .export import disk_errors
from .policy import Decision


class ResumingTrainer(EvaluatingTrainer):
    """The part of `PerforatedTrainer` that writes checkpoints and resumes from them."""

    @property
    def dataset_sizes(self) -> dict[str, int]:
        """Number of examples of "train", "validation" and "test", of those whose length is known."""
        data = {"train": self.train_dataset, "validation": self.eval_dataset, "test": self.test_dataset}
        return {part: size for part, dataset in data.items() if (size := _length(dataset)) is not None}

    def _name_other_settings(self, then: dict, name: str) -> None:
        now = self.settings()
        for setting in sorted(now.keys() | then.keys()):
            if now.get(setting) != then.get(setting):
                if setting in ("freeze_base", "modules_to_train"):
                    raise PerforatedError(
                        f"{name} was written with --{setting} {then.get(setting)}, which says what the optimizer "
                        "holds: resume with the same, or start a new run"
                    )
                say(f"warning: {setting} was {then.get(setting)} in {name} and is now {now.get(setting)}")

    def settings(self) -> dict:
        """What a resumed run should share with the run that wrote the checkpoint, as JSON has it."""
        settings = compared_settings(self.dendrite_args, self.args)
        names = {"train": "train_dataset", "validation": "eval_dataset", "test": "test_dataset"}
        return settings | {names[part]: f"{size} examples" for part, size in self.dataset_sizes.items()}

    def _find_checkpoint(self, resume_from_checkpoint) -> Path | None:
        """The checkpoint to resume from, found by the first process for all."""
        found, error = None, None
        if self.is_world_process_zero():
            try:
                found = checkpoint.find(resume_from_checkpoint, self.run_dir, say)
                if found and found.resolve().parent != self.run_dir.resolve():
                    self._check_other_folder(found)
            except PerforatedError as caught:
                error = str(caught)
        found, error = broadcast_object_list([found, error])
        if error:
            raise PerforatedError(error)
        return found

    def _check_other_folder(self, found: Path) -> None:
        """Refuse a checkpoint of another run if this folder holds a run, which it would replace."""
        if self.run_dir.is_dir() and any(self.run_dir.iterdir()):
            raise PerforatedError(
                f"{found} is a checkpoint of another run than that in {self.run_dir}: resume it in its own folder, "
                f"{found.parent}, or in an empty one"
            )

    def _how_to_resume(self) -> str:
        stopped = f"stopped at step {self.state.global_step:,} with a checkpoint; to resume: "
        if from_command_line(self.args):
            return f"{stopped}{run_dir.redact(['python', *sys.argv, '--resume_from_checkpoint', 'true'])}"
        return f"{stopped}trainer.train(resume_from_checkpoint=True)"

    def _save_checkpoint(self, model, trial):
        """As `Trainer._save_checkpoint`; the checkpoint counts once all of it is there, and only then old ones go."""
        folder = self.run_dir / f"checkpoint-{self.state.global_step}"
        limit, settings = self.args.save_total_limit, self.settings()
        self.state.best_global_step = None  # the best model is kept in each checkpoint, the Trainer need not keep one
        self.args.save_total_limit = None  # the Trainer would delete an old checkpoint before the new one is complete
        stock = super()._save_checkpoint
        try:
            with disk_errors(folder, self.run_dir):
                self._together(lambda: checkpoint.begin(folder), main_only=True)
                self._together(lambda: stock(model, trial))
                facts = {
                    "step": self.state.global_step,
                    "complete": self.decision is Decision.COMPLETE,
                    "train_seconds": self.train_seconds + time.monotonic() - self._began,
                    "settings": settings,
                    "restarts": self.restarts,
                    "trained": self._trained_names(),
                }
                self._together(lambda: self._finish_checkpoint(folder, facts, limit), main_only=True)
        finally:
            self.args.save_total_limit = limit

    def _finish_checkpoint(self, folder: Path, facts: dict, limit: int | None) -> None:
        self.growth.save(folder)
        checkpoint.write_manifest(folder, facts)
        checkpoint.rotate(self.run_dir, limit)

    def _trained_names(self) -> dict[str, list[str]]:
        """The parameters that the optimizer holds, and those that are frozen: a callback may have frozen some since."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        named = list(self.model.named_parameters())
        frozen = [name for name, parameter in named if not parameter.requires_grad]
        return {"in_optimizer": [name for name, parameter in named if id(parameter) in held], "frozen": frozen}

    def _require_gradients(self, names: set[str]) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in names)

    @contextlib.contextmanager
    def _trained_as_in(self, start) -> Iterator[None]:
        """For a `with` block in which the optimizer is made and loaded, what it held in a checkpoint is trained; after
        it, what was frozen there is frozen."""
        trained = checkpoint.check(Path(start), content=False).get("trained") if start else None
        if not trained:
            yield
            return
        before = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        self._require_gradients(set(trained["in_optimizer"]))
        yield
        frozen = set(trained["frozen"])
        now = {name for name, _ in self.model.named_parameters()} - frozen
        self._require_gradients(now)
        for change, names in (("frozen", sorted(frozen - before)), ("trained", sorted(before & now))):
            if names:
                say(f"note: {report.first_of(names, 3)}: {change}, as in {Path(start).name}")

    def _together(self, work, main_only: bool = False) -> None:
        """Do something in the first process or in all; all processes wait for it, and end with the error of any."""
        error = None
        if self.is_world_process_zero() or not main_only:
            try:
                work()
            except Exception as caught:
                if self.args.world_size == 1:
                    raise
                error = caught
        if self.args.world_size > 1:
            errors = [found for found in gather_object([error and f"{type(error).__name__}: {error}"]) if found]
            if error:
                raise error
            if errors:
                raise OSError(f"another process failed: {errors[0]}")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The only place where network and dendrites are loaded; `Trainer` does the rest."""
        folder = Path(resume_from_checkpoint)
        self.growth.load(folder)
        self._steps_of_checkpoint = TrainerState.load_from_json(str(folder / checkpoint.STATE)).max_steps
        best, unit = self.growth.policy.best_score, report.unit(self.score_name)
        shown = "" if best is None else f", best {unit} so far {best:.4f}"
        say(f"resuming at step {checkpoint.step_of(folder):,}: {report.count(self.num_dendrites, 'dendrite')}{shown}")
        self.accelerator.wait_for_everyone()


def _length(data) -> int | None:
    """The number of examples, if it is known."""
    if isinstance(data, dict):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
