"""What a run leaves: the model wherever it is saved, `final/` with its card, `results.json`, the upload to the Hub."""

import contextlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import safetensors
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.utils import logging

from . import checkpoint, model_card, plot, report, run_folder
from .arguments import PerforatedError, run_name
from .callbacks import say
from .layers import layers_with_dendrites
from .remote_code import save_code
from .verdict import verdict


@contextlib.contextmanager
def in_one_line(what):
    """A full disk, while `what` is written, as one line. Around the run's own writing only, never user's code."""
    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        # On a full disk torch.save says "PytorchStreamWriter failed", or names its source file inline_container.cc
        about_files = not isinstance(error, RuntimeError) or re.search("StreamWriter|inline_container", str(error))
        if isinstance(error, PerforatedError) or not about_files:
            raise
        raise PerforatedError(
            f"{what} cannot be written: {error}. Earlier checkpoints are still good: go on with "
            "--resume_from_checkpoint true",
            exit_status=1,
        ) from error


class PublishingTrainer(Trainer):
    """The half of `PerforatedTrainer` that writes what is kept of a run. It trains nothing."""

    # ---------------------------------------------------------------------------------- the Trainer's hooks: the model

    def _save(self, output_dir=None, state_dict=None):
        """Write the model as it is deployed, wherever `save_model` is called from, with the code that it needs."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of files being written
        try:
            model = self.deployed_model()
            model.save_pretrained(folder, state_dict=_without_aliases(model), save_original_format=False)
            if layers_with_dendrites(model) or not type(model).__module__.startswith("transformers."):
                save_code(model, folder)
            processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processor is not None:
                processor.save_pretrained(folder)
        finally:
            if bars:
                logging.enable_progress_bar()

    def cycles(self) -> list[dict]:
        """For each number of dendrites: parameters, the best validation score, its step and the other scores there."""
        return report.cycles(self.state.log_history, self.score_name, self.args.greater_is_better)

    def save_results(self, dataset: dict) -> dict:
        """Write `final/` (the model and a card) and `results.json`, each whole or not at all; print and return them.

        Args:
            dataset: its "name" and the sizes of its parts, for the record.
        """
        final = {"dendrites": self.num_dendrites, "parameters": self.num_parameters}
        for data, part in ((self.eval_dataset, "validation"), (self.test_dataset, "test")):
            if data is not None:
                scores = self.evaluate(data, metric_key_prefix=part)
                final |= {name: score for name, score in scores.items() if report.is_reported(name, self.score_name)}
        self.results = {
            "stopped_by": self.stopped_by,
            "testing_dendrite_capacity": self.dendrite_args.testing_dendrite_capacity,
            "dataset": dataset,
            "metric": self.score_name,
            "greater_is_better": self.args.greater_is_better,
            "seed": self.args.seed,
            "cycles": self.cycles(),
            "final": final,
            "global_step": self.state.global_step,
            "restarts": [step for step in self.restarts if step < self.state.global_step],
            "train_seconds": round(self.train_seconds, 3),
            "steps_per_second": round(self.state.global_step / max(self.train_seconds, 1e-9), 1),
            "settings": self.settings(),
            "command": shlex.join(sys.argv),
            "versions": report.installed_versions(),
        }
        if (run := self.dendrite_args.control_of) and self.stopped_by == "tracker":  # else it was not as long
            self.results["control"] = verdict(self, self.tracker.results, final, Path(run))
        if self.args.should_save:
            with in_one_line(self.run_folder / run_folder.FINAL):
                self._write_final()
                checkpoint.write_whole(self.run_folder / run_folder.RESULTS, json.dumps(self.results, indent=2) + "\n")
            if "control" in self.results and self.tracker.same_network:
                self._draw_run_with_control(Path(run))
        say(report.summary(self.results, self.run_folder))
        if self.dendrite_args.testing_dendrite_capacity:
            say(f"Largest memory in use: {report.peak_memory()}")
        return self.results

    def _draw_run_with_control(self, run: Path) -> None:
        """Draw the picture of the run anew, with the control's score as a line, where its log is still there."""
        states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: checkpoint.step_of(path.parent))
        if states and checkpoint.step_of(states[-1].parent) == self.tracker.last_step:
            history = TrainerState.load_from_json(str(states[-1])).log_history
            path, without = run / f"{run.resolve().name}.png", self.results["control"]["without"]
            with in_one_line(path):
                plot.draw(history, self.score_name, self.args.greater_is_better, path, without)

    # ------------------------------------------------------------------------------------------------------ model card

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model's README.md into `output_dir`; after `save_results`, with its scores and how to load it."""
        results = getattr(self, "results", None)
        if results is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            kind, processor = type(self.model), self.processing_class
            run, here = self.tracker.folder, Path.cwd()
            run = run.relative_to(here) if run.is_relative_to(here) else Path(run.name)  # no path of this machine
            card = model_card.model_card(
                results,
                name=kwargs.get("model_name") or run.name,
                model_class=kind.__name__,
                processor=processor is not None,
                custom_code=not kind.__module__.startswith("transformers."),
                path=self.hub_model_id or (run / run_folder.FINAL).as_posix(),
                mask=getattr(processor, "mask_token", None),
            )
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            known = inspect.signature(model_card.add_metadata).parameters
            card = model_card.add_metadata(card, **{key: value for key, value in given.items() if key in known})
            checkpoint.write_whole(Path(self.args.output_dir, "README.md"), card)

    @contextlib.contextmanager
    def _output_dir(self, folder: Path):
        """Let the Trainer's own methods work in another folder."""
        run_folder, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = run_folder

    def _write_final(self, **metadata):
        """Write the model and its card into `final/`, whole or not at all: under another name first."""
        folder, unfinished = self.run_folder, self.run_folder / f"{run_folder.FINAL}.unfinished"
        checkpoint.begin(unfinished)
        with self._output_dir(unfinished):
            self.save_model(_internal_call=True)
            self.create_model_card(**metadata)
        run_folder.publish(unfinished, folder)

    # --------------------------------------------------------------------------------------------------------- the Hub

    def push_to_hub(self, *args, **kwargs):
        """As `Trainer.push_to_hub`; what is uploaded is `final/`, the model with its card, not the run."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        kwargs.setdefault("model_name", (self.args.hub_model_id or run_name(self.args)).split("/")[-1])
        if self.args.should_save:
            self._write_final()  # files that an older model left there must not be uploaded with it
        with self._output_dir(self.run_folder / run_folder.FINAL):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing while training: the Trainer would upload the run folder; `push_to_hub` uploads the final model."""


def _without_aliases(model: PreTrainedModel) -> dict:
    """The weights of `model`; a second name of a module gets a copy, which transformers does not write otherwise.

    Weights that the model's class declares as tied stay one: transformers writes those once.
    """
    seen, weights = set(), {}
    for name, tensor in model.state_dict().items():
        alias = tensor.numel() > 0 and tensor.data_ptr() in seen and name not in model.all_tied_weights_keys
        seen.add(tensor.data_ptr())
        weights[name] = tensor.clone() if alias else tensor
    return weights
