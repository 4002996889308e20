"""What a run leaves: the model wherever it is saved, `final/` with its card, `results.json`, the upload to the Hub."""

import contextlib
import inspect
import json
import re
import sys
from pathlib import Path

import safetensors
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from . import _compat, checkpoint, layers, model_card, modules, plot, report, run_dir, saving, sharing
from .arguments import PerforatedError, from_command_line, plain_hints, run_name
from .callbacks import say
from .growth import STATE
from .layers import base_class
from .remote_code import ModelCode, auto_classes


@contextlib.contextmanager
def disk_errors(what, run: Path):
    """Turn a full disk, while `what` is written, into a one-line error. Around the run's own writing only."""
    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        # On a full disk torch.save says "PytorchStreamWriter failed", or names its source file inline_container.cc
        about_files = not isinstance(error, RuntimeError) or re.search("StreamWriter|inline_container", str(error))
        if isinstance(error, PerforatedError) or not about_files:
            raise
        kept = ""
        with contextlib.suppress(PerforatedError, OSError):
            if checkpoint.complete_checkpoints(run):
                kept = ". Earlier checkpoints are complete: resume from them (resume_from_checkpoint)"
        raise PerforatedError(f"{what} cannot be written: {error}{kept}", exit_status=1) from error


class ExportingTrainer(Trainer):
    """The half of `PerforatedTrainer` that writes what is kept of a run. It trains nothing."""

    # ----------------------------------------------------------------------------------- the Trainer's hooks: the model

    def read_code(self) -> ModelCode | None:
        """The source of the model's class as it is before the training."""
        return ModelCode(self.model) if isinstance(self.model, PreTrainedModel) else None

    def _save(self, output_dir=None, state_dict=None):
        """Write the model with the code that it needs, wherever `save_model` is called from."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of files being written
        try:
            if isinstance(self.model, PreTrainedModel) and self._saves_dendrites_only(folder):
                self.model.save_pretrained(folder, dendrites_only=True)
                self.code.save(folder, self.model)
            elif isinstance(self.model, PreTrainedModel):
                self.model.save_pretrained(folder, state_dict=_without_aliases(self.model), save_original_format=False)
                self.has_code = self.code.save(folder, self.model)
            elif hasattr(self.model, "save_pretrained"):  # of another library
                self.model.save_pretrained(str(folder))
                if folder.name.startswith("checkpoint-"):
                    modules.save_module(self.model, folder, "network")  # names as they are in the whole model
            else:
                modules.save_module(self.model, folder)
            processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processor is not None and hasattr(processor, "save_pretrained"):
                processor.save_pretrained(folder)
        finally:
            if bars:
                logging.enable_progress_bar()

    def save_model(self, output_dir=None, _internal_call=False, dendrites_only: bool = False) -> None:
        """As `Trainer.save_model`.

        Args:
            output_dir (`str`, *optional*): `args.output_dir` by default.
            dendrites_only (`bool`, defaults to `False`): Save what was trained, the name of the frozen base and a card,
                for `load_dendrites`.

        Raises:
            PerforatedError: If `dendrites_only` is not possible: nothing is frozen, or the base has no name.
        """
        if dendrites_only:
            try:
                self._check_dendrites_only(Path(output_dir or self.args.output_dir))
            except ValueError as error:
                raise PerforatedError(str(error)) from None
        before, self._dendrites_only = self._dendrites_only, dendrites_only
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._dendrites_only = before
        if dendrites_only and self.args.should_save:
            base = sharing.base_of(self.model)
            if Path(base["name"]).is_dir():
                say(f"note: the base was loaded from the local path {base['name']}, which is saved as its name")
            self._write_dendrites_card(Path(output_dir or self.args.output_dir))

    _dendrites_only, training_id = False, None

    def _check_dendrites_only(self, folder: Path) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(f"dendrites_only: a {type(self.model).__name__} has no from_pretrained; save all of it")
        saving.check_savable(self.model, folder)

    def _write_dendrites_card(self, folder: Path) -> None:
        if self.args.should_save:
            size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            arguments = sharing.base_of(self.model), self._numbers_of_dendrites(), size
            card = model_card.dendrites_card(type(self.model).__name__, *arguments)
            checkpoint.write_whole(folder / "README.md", card)

    def _saves_dendrites_only(self, folder: Path) -> bool:
        """Whether the frozen base is left out: if that is asked for, if it is quantized, and in checkpoints if the base
        can be loaded by its name."""
        if self._dendrites_only or sharing.quantization(self.model):
            return True
        is_checkpoint = folder.name.startswith("checkpoint-")
        if not (is_checkpoint and self.dendrite_args.freeze_base and sharing.base_of(self.model)):
            return False
        # A model made from a config has its name, too; no weight of it was loaded.
        was_loaded = "dendrites_base" in vars(self.model) or not all(map(_compat.is_new, self.model.parameters()))
        return was_loaded and bool(sharing.frozen_part(self.model))

    def cycles(self) -> list[dict]:
        """For each number of dendrites: parameters, the best validation score, its step and the other scores there."""
        lookback, rows = self.dendrite_args.history_lookback, self.growth.evaluations
        return report.cycles(rows, self.score_name, self.args.greater_is_better, lookback, self.restarts)

    @plain_hints
    def save_results(self, dataset: dict | None = None) -> dict:
        """Write `final/` (the model and a card) and `results.json`, each whole or not at all; print and return them.

        Args:
            dataset (`dict`, *optional*): Its "name" and the sizes of its parts, for the record.

        Returns:
            `dict`: What `results.json` holds.

        Raises:
            PerforatedError: Before a training.
        """
        if self.stopped_by is None:
            raise PerforatedError("save_results: there are no results yet, call train() first")
        if self.training_id != getattr(self.model, "training_id", self.training_id):
            raise PerforatedError(
                "save_results: another trainer has trained this model since; use one model per trainer"
            )
        final = {"dendrites": self.num_dendrites, "parameters": self.num_parameters}
        for data, part in ((self.eval_dataset, "validation"), (self.test_dataset, "test")):
            if data is not None:
                scores = self.scores(data, part)
                final |= {name: score for name, score in scores.items() if report.is_reported(name, self.score_name)}
        self.results = {
            "stopped_by": self.stopped_by,
            "testing_dendrite_capacity": self.dendrite_args.testing_dendrite_capacity,
            "dataset": (dataset or {}) | self.dataset_sizes,
            "metric": self.score_name,
            "greater_is_better": self.args.greater_is_better,
            "seed": self.args.seed,
            "cycles": self.cycles(),
            "final": final,
            "global_step": self.state.global_step,
            "restarts": [step for step in self.restarts if step < self.state.global_step],
            "last_evaluation": self.growth.evaluations[-1]["step"] if self.growth.evaluations else 0,
            "initial_weights": self.growth.initial_weights,
            "frozen_weights": self.growth.frozen_weights(),
            "train_seconds": round(self.train_seconds, 3),
            "steps_per_second": round(self.state.global_step / max(self.train_seconds, 1e-9), 1),
            "settings": self.settings(),
            "command": run_dir.redact(sys.argv),
            "versions": report.installed_versions(),
        }
        if self.dendrite_args.num_initial_dendrites:  # a baseline has fewer than the first cycle
            self.results["parameters_without_dendrites"] = sum(
                p.numel() for name, p in self.model.named_parameters() if not re.search(r"(^|\.)dendrite", name)
            )
        run = self.dendrite_args.control_of
        if run and self.stopped_by != "tracker":
            last = f"this baseline ended at step {self.state.global_step:,}, its run at {self.growth.last_step:,}"
            say(f"note: there is no comparison: {last}")
        elif run:
            from .comparison import compare

            self.results["control"] = compare(self, self.growth.results, final, Path(run), load=self.load_model)
        if self.args.should_save:
            with disk_errors(self.run_dir / run_dir.FINAL, self.run_dir):
                self._write_final()
                checkpoint.write_whole(self.run_dir / run_dir.RESULTS, json.dumps(self.results, indent=2) + "\n")
            if "control" in self.results and self.growth.same_network:
                self._draw_run_with_baseline(Path(run))
        say(report.summary(self.results, self.run_dir, from_command_line(self.args)))
        if self.dendrite_args.testing_dendrite_capacity:
            say(f"Largest memory in use: {report.peak_memory()}")
        return self.results

    def load_model(self, folder: Path) -> nn.Module:
        """Load a model of this trainer's kind from what `save_model` wrote."""
        if hasattr(type(self.model), "from_pretrained"):
            return type(self.model).from_pretrained(folder)
        raise OSError(f"a {type(self.model).__name__} has no from_pretrained")

    def _draw_run_with_baseline(self, run: Path) -> None:
        """Draw the plot of the run again, with the baseline's score as a line, if its log is still there."""
        steps = checkpoint.complete_checkpoints(run)
        if not steps or checkpoint.step_of(steps[-1]) != self.growth.last_step:
            return
        path, results = run_dir.plot_path(run), self.growth.results
        try:
            plot.draw(
                checkpoint.read_json(steps[-1] / STATE, limit=2**28)["evaluations"],
                self.score_name,
                self.args.greater_is_better,
                path,
                without=self.results["control"]["without"],
                kept_dendrites=results["final"]["dendrites"],
                cycles=results["cycles"],
            )
        except (PerforatedError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            say(f"warning: {path} cannot be drawn: {error}")  # the log of another run may be damaged

    # ------------------------------------------------------------------------------------------------------ model card

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model's README.md into `output_dir`; after `save_results`, with its scores and how to load it."""
        results, numbers = getattr(self, "results", None), self._numbers_of_dendrites()
        has_config, is_transformers = hasattr(self.model, "config"), isinstance(self.model, PreTrainedModel)
        is_plain = not has_config and not hasattr(self.model, "save_pretrained")
        if is_transformers and sharing.quantization(self.model):
            self._write_dendrites_card(Path(self.args.output_dir))  # the base is not saved with them
        elif results is None or not (is_transformers or is_plain):
            # The stock card reads the config to name the model that it was made from.
            super().create_model_card(*args, **({} if has_config else {"finetuned_from": ""}) | kwargs)
            path = Path(self.args.output_dir, "README.md")
            if not has_config and path.is_file() and self.is_world_process_zero():
                nothing = "is a fine-tuned version of [](https://huggingface.co/)"
                checkpoint.write_whole(
                    path, path.read_text(encoding="utf-8").replace(nothing, "was trained from scratch")
                )
        elif self.is_world_process_zero():
            kind, processor = type(self.model), self.processing_class
            run, here = (self._run_of_card or self.run_dir).resolve(), Path.cwd()
            run = run.relative_to(here) if run.is_relative_to(here) else Path(run.name)  # no path of this machine
            card = model_card.model_card(
                results,
                name=kwargs.get("model_name") or run.name or run_name(self.args),
                model_class=kind.__name__,
                processor=processor is not None,
                custom_code=not kind.__module__.startswith("transformers."),
                path=self.hub_model_id or (run / run_dir.FINAL).as_posix(),
                mask=getattr(processor, "mask_token", None),
                layers=numbers,
                auto_class=None if is_plain else self._auto_class(),
                has_code=getattr(self, "has_code", False),
                is_plain=is_plain,
            )
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            known = inspect.signature(model_card.add_metadata).parameters
            card = model_card.add_metadata(card, **{key: value for key, value in given.items() if key in known})
            checkpoint.write_whole(Path(self.args.output_dir, "README.md"), card)

    def _auto_class(self) -> str:
        return min(auto_classes(base_class(self.model), type(self.model.config)), key=_is_for_pretraining)

    def _numbers_of_dendrites(self) -> dict[str, int]:
        return {name: layer.num_dendrites for name, layer in layers.layers_with_dendrites(self.model).items()}

    _run_of_card = None  # the folder of the run, while `output_dir` is another one

    @contextlib.contextmanager
    def _output_dir(self, folder: Path):
        """Let the Trainer's own methods work in another folder."""
        before, self.args.output_dir = self.args.output_dir, str(folder)
        self._run_of_card = Path(before)
        try:
            yield
        finally:
            self.args.output_dir, self._run_of_card = before, None

    def _write_final(self, **metadata):
        """Write the model and its card into `final/`, whole or not at all: under another name first."""
        staging = run_dir.stage(self.run_dir)
        with self._output_dir(staging):
            self.save_model(_internal_call=True)
            self.create_model_card(**metadata)
        run_dir.export(staging, self.run_dir)

    # --------------------------------------------------------------------------------------------------------- the Hub

    def push_to_hub(self, *args, **kwargs):
        """As `Trainer.push_to_hub`; what is uploaded is `final/`, the model with its card, not the run."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        kwargs.setdefault("model_name", (self.args.hub_model_id or run_name(self.args)).split("/")[-1])
        if self.args.should_save:
            self._write_final()  # files that an older model left there must not be uploaded with it
        with self._output_dir(self.run_dir / run_dir.FINAL):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing while training: the Trainer would upload the run folder; `push_to_hub` uploads the final model."""


def _is_for_pretraining(auto_class: str) -> bool:
    return auto_class == "AutoModelForPreTraining"


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
