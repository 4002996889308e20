"""Train any Hugging Face model with Perforated AI's dendrites, on the stock `transformers.Trainer`.

Copy or import this file as it is. Five names are meant for use:

    DendriteArguments      command-line settings of the dendrites (a dataclass for HfArgumentParser)
    perforate              converts a model so that dendrites can be added to it
    PerforatedTrainer      a Trainer that adds dendrites until the tracker says that training is complete
    load_perforated_model  loads what PerforatedTrainer saved
    ignore_shared_tensors  lets safetensors write tied weights

and for a script with a command line: parse_arguments, already_finished, main_process, exit_status, PerforatedError.

How it works: a dendrite makes a different model, which needs a new optimizer, scheduler and wrapper. That is what
`Trainer.train()` sets up, so PerforatedTrainer runs one `Trainer.train()` per dendrite cycle. Each cycle begins with a
checkpoint that holds no optimizer and no scheduler. A run that was killed goes on through the same code path.

Written for transformers 5.23, perforatedai 3.2.9 and safetensors 0.8.
"""

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import pdb
import pickle
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pandas
import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list
from matplotlib.figure import Figure
from torch.nn import Conv1d, Conv2d, Conv3d
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

with contextlib.redirect_stdout(io.StringIO()):  # the package prints which variant it is when it is imported
    from perforatedai import clean_perforatedai as CL
    from perforatedai import globals_perforatedai as GPA
    from perforatedai import network_perforatedai as NPA
    from perforatedai import utils_perforatedai as UPA

if find_spec("lomo_optim") is None:
    sys.modules["lomo_optim"] = None  # accelerate 1.15 looks for this package on the disk at every step

logger = logging.get_logger(__name__)

RUN = "run.json"  # marks the folder of a run
MANIFEST = "perforated.json"  # written last: a checkpoint without it is unfinished
DEPLOYED = "deployed"  # the clean model inside a checkpoint
WEIGHTS = "model.safetensors"
BEST = "best_model.safetensors"
TIES = "perforated_tied_weights"  # in config.json: each name that the weights leave out, and the name it is tied to

MODEL_CARD = """---
library_name: transformers
tags: [perforated-ai, dendrites]
---
# {model} with {dendrites} dendrites a layer

{parameters:,} parameters, trained on {data}:
{scores}

To load it:

    from {module} import {model}
    from perforated_trainer import load_perforated_model
    model = load_perforated_model({model}, "final")
"""

# Arguments of the Trainer that dendrites change the meaning of, and what to use instead.
REFUSED = {
    "load_best_model_at_end": "the tracker itself returns the best model at the end",
    "fsdp": "use DistributedDataParallel instead: torchrun --nproc_per_node N",
    "deepspeed": "use DistributedDataParallel instead: torchrun --nproc_per_node N",
    "save_only_model": "a checkpoint without the optimizer could not go on exactly; use the model in `final/`",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM already save a checkpoint before the run ends",
    "auto_find_batch_size": "set --per_device_train_batch_size; --testing_dendrite_capacity shows whether it fits",
}
# Arguments that change where a run writes or how it reports, not what it computes.
HARMLESS = re.compile(
    "output_dir|resume|overwrite|save_|logging|log_|report|run_name|project|hub|push|tqdm|do_|max_steps|epochs$"
)


class PerforatedError(RuntimeError):
    """A problem that the user can solve: print it as one line and end with `exit_status`."""

    def __init__(self, message: str, exit_status: int = 2):
        super().__init__(" ".join(str(message).split()))
        self.exit_status = exit_status


@dataclass
class DendriteArguments:
    """Settings of Perforated AI's dendrites. One "epoch" of the tracker is one evaluation."""

    save_name: str = HfArg(default="PAI", help="Name of the run and of its folder, without a separator.")
    doing_pai: bool = HfArg(default=True, help="Add dendrites. False: same network, same stopping rule, none added.")
    testing_dendrite_capacity: bool = HfArg(
        default=False, help="Add three dendrites at once to test memory: no real run."
    )
    max_dendrites: int = HfArg(default=5, help="Stop after this many dendrites at the latest.")
    n_epochs_to_switch: int = HfArg(default=10, help="Evaluations without a better score before a dendrite is added.")
    history_lookback: int = HfArg(default=1, help="Scores are averaged over this many evaluations.")
    improvement_threshold: list[float] = HfArg(
        default_factory=lambda: [0.0001],
        help="Relative gain that counts as a better score; several values: one for each further try.",
    )
    module_names_to_perforate: list[str] = HfArg(
        default_factory=lambda: ["PAISequential", "Conv1d", "Conv2d", "Conv3d", "Linear", "Conv1D"],
        help="Types of layers that get dendrites, but not where weights are tied, frozen or logits'.",
    )
    module_ids_to_perforate: list[str] = HfArg(
        default_factory=list, help="Names of modules that get dendrites whatever their type and weights."
    )
    module_names_to_track: list[str] = HfArg(
        default_factory=list, help="Types of modules that get no dendrites, nor does anything in them."
    )
    module_ids_to_track: list[str] = HfArg(
        default_factory=list, help="Names of modules that get no dendrites, nor does anything in them."
    )
    output_dimensions: list[int] | None = HfArg(
        default=None, help="0 for the dimension of the neurons, -1 for others: -1 -1 0. Default: found layer by layer."
    )
    dropout_with_dendrites: float | None = HfArg(
        default=None, help="Rate of all dropout layers once there are dendrites. Default: left alone."
    )
    overwrite_run: bool = HfArg(default=False, help="Replace the run that the folder already holds.")


class _Heard(io.StringIO):
    """Keeps what is printed, and passes it on where `stream` is given."""

    def __init__(self, stream=None):
        super().__init__()
        self.stream = stream

    def write(self, text):
        if self.stream:
            self.stream.write(text)
        return super().write(text)


@contextlib.contextmanager
def _library(stream=None):
    """Around calls into perforatedai, which on errors prints, then opens a debugger or exits: makes that an error."""

    def stop(*args, **kwargs):
        raise PerforatedError(f"perforatedai stopped: {heard.getvalue()[-2000:].strip() or 'it gave no reason'}")

    heard, set_trace = _Heard(stream), pdb.set_trace
    pdb.set_trace = stop
    try:
        with contextlib.redirect_stdout(heard):
            yield
    except SystemExit:
        stop()
    finally:
        pdb.set_trace = set_trace
        if not stream:
            logger.debug(heard.getvalue())


def exit_status(run, argv=None) -> int:
    """Return what `run(argv)` does; an error that a user can cause becomes one line on standard error and a status."""
    try:
        return run(argv)
    except PerforatedError as error:
        message, status = str(error), error.exit_status
    except pickle.UnpicklingError as error:  # torch.load under weights_only, in the Trainer
        message, status = f"the checkpoint holds a file that is not plain data: {error}", 2
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save on a full disk
            raise
        message, status = f"{error}. Earlier checkpoints are still good: go on with --resume_from_checkpoint true", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if main_process():
        print(f"{'' if status > 128 else 'error: '}{' '.join(message.split())}", file=sys.stderr)
    return status


def main_process() -> bool:
    """Whether this is the only process or the first of several, known before any of them is set up."""
    return os.environ.get("RANK", "0") == "0"


def ignore_shared_tensors() -> None:
    """Let safetensors write tensors that are whole aliases of one another, such as tied weights.

    Whole aliases have the same storage, offset, shape and strides: a copy of each on disk is harmless. Tensors that
    overlap in part still raise. The function replaced is private in safetensors 0.8 (`_find_shared_tensors`), which has
    no public switch for it; a test fails when it moves.
    """
    original = safetensors.torch._find_shared_tensors
    if getattr(original, "ignores_aliases", False):
        return

    def view(tensor):
        return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    def find_partly_shared_tensors(state_dict):
        return [names for names in original(state_dict) if len({view(state_dict[name]) for name in names}) > 1]

    find_partly_shared_tensors.ignores_aliases = True
    safetensors.torch._find_shared_tensors = find_partly_shared_tensors


def parse_arguments(kinds, argv=None, training: dict | None = None, plateau: dict | None = None, **defaults) -> tuple:
    """Parse a command line into the dataclasses `kinds`, the last two DendriteArguments and TrainingArguments.

    `training`, `defaults`: values where no flag is given; `plateau`: lr_scheduler_kwargs of reduce_lr_on_plateau.
    Raises PerforatedError for a flag that is unknown, has no such value or does not go with dendrites.
    """

    def error(message):
        raise PerforatedError(message)  # one line, not the page of flags

    parser = HfArgumentParser(kinds, description=sys.modules[kinds[0].__module__].__doc__)
    parser.error = error
    parser.set_defaults(output_dir=None, remove_unused_columns=False, **(training or {}), **defaults)
    values = vars(parser.parse_args(argv))
    values["output_dir"] = values["output_dir"] or values["save_name"]
    # "is": a value that was given is a new object, so that also the default's value can be asked for.
    if values["testing_dendrite_capacity"] and values["eval_steps"] is parser.get_default("eval_steps"):
        values["eval_steps"] = 10
    if values["lr_scheduler_type"] == "reduce_lr_on_plateau" and values["lr_scheduler_kwargs"] is None:
        values["lr_scheduler_kwargs"] = plateau
    refuse_arguments(values)  # before TrainingArguments finds other words for it
    try:
        return parser.parse_dict(values)
    except (ValueError, ImportError, TypeError) as refused:
        error(str(refused).splitlines()[0])


def already_finished(dendrite_args: DendriteArguments, training_args: TrainingArguments) -> bool:
    """Whether the run that is to be resumed was ended by its tracker; its results are then printed once more."""
    folder = Path(dendrite_args.save_name)
    if not is_resumed(training_args.resume_from_checkpoint) or not (folder / "results.json").is_file():
        return False
    results = json.loads((folder / "results.json").read_text())
    if results["stopped_by"] == "tracker" and main_process():
        print(f"the run in {folder} is complete")
        print_results(results, folder)
    return results["stopped_by"] == "tracker"


def print_results(results: dict, folder: Path) -> None:
    """Print the cycles as a table, the final scores, and where everything is."""
    score, thousands = "validation_" + results["metric"].removeprefix("eval_"), "{:,}".format
    table = pandas.DataFrame(results["cycles"]).rename(columns={"global_step": "at step", "best_validation": score})
    integers = dict.fromkeys(("parameters", "at step"), thousands)
    if len(table):
        print("\n" + table.to_string(index=False, formatters=integers, float_format="{:.4f}".format))
    scores = dict(results["final"])
    line = f"final: {scores.pop('dendrites')} dendrites, {scores.pop('parameters'):,} parameters, "
    print(line + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    print(f"data: {results['dataset']['name']}; stopped by {results['stopped_by']} at step {results['global_step']:,}")
    print(f"model: {folder}/final   plot: {folder}/{folder}.png   results: {folder}/results.json")
    if results["testing_dendrite_capacity"]:
        print("This was a test of dendrite capacity, not a training run.")


def refuse_arguments(values: dict) -> None:
    """Raise PerforatedError for values of TrainingArguments that cannot go with dendrites."""
    for argument, reason in REFUSED.items():
        if values.get(argument):
            raise PerforatedError(f"--{argument} does not go with dendrites: {reason}")
    if values["eval_strategy"] == "no":
        raise PerforatedError("--eval_strategy no: dendrites are added by validation scores; use steps or epoch")
    if values["save_strategy"] == "best":
        raise PerforatedError("--save_strategy best: the tracker keeps the best model; use steps, epoch or no")


def is_resumed(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether `--resume_from_checkpoint` asks for a checkpoint; on the command line "false" is a text."""
    return str(resume_from_checkpoint or False).lower() != "false"


def _claim_run_folder(dendrite_args: DendriteArguments, training_args: TrainingArguments) -> None:
    """Refuse a folder that is not free, clear it where the user said so, and mark it as the folder of a run."""
    name = dendrite_args.save_name
    for folder in {Path(name).resolve(), Path(training_args.output_dir).resolve()}:
        if folder.is_dir() and any(folder.iterdir()) and not is_resumed(training_args.resume_from_checkpoint):
            if not (folder / RUN).is_file():
                raise PerforatedError(f"{folder} is not empty and holds no run: choose another --save_name")
            if not dendrite_args.overwrite_run:
                raise PerforatedError(
                    f"{folder} already holds a run: --resume_from_checkpoint true goes on with it, --overwrite_run "
                    "replaces it, another --save_name keeps both"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN).write_text(json.dumps({"command": shlex.join(sys.argv)}) + "\n")
    # The library would take every setting that is not set here from an older run's file.
    Path(name, f"{name}_config.json").unlink(missing_ok=True)


def _delete_second_body(model: PreTrainedModel) -> None:
    """Delete a registered `base_model`: a second name by which the body would be trained, counted and saved twice.

    Where `base_model` is only the read-only property of transformers, nothing is registered and nothing is done.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if sum(module is modules.get("base_model") for module in modules.values()) > 1:
        del model.base_model


def _ids_to_perforate(model: PreTrainedModel, args: DendriteArguments) -> list[str]:
    """Names of the modules that get dendrites. One warning lists what has weights and gets none."""
    asked, tracked = (
        {name.strip(".") for name in ids} for ids in (args.module_ids_to_perforate, args.module_ids_to_track)
    )
    if unknown := (asked | tracked) - {name for name, _ in model.named_modules()}:
        raise PerforatedError(f"the model has no module {', '.join(sorted(unknown))}; see model.named_modules()")
    # Each dendrite of a tied layer, or of one that gives logits over a vocabulary, would copy its large matrix.
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    logits, ids, left = model.get_output_embeddings(), [], {}
    for name, module in model.named_modules():
        path, kind = {name, *(name[:i] for i, letter in enumerate(name) if letter == ".")}, type(module).__name__
        if kind in args.module_names_to_track and name not in asked:
            tracked.add(name)
        if path & set(ids):
            continue
        safe = all(p.requires_grad and names[id(p)] == 1 for p in module.parameters()) and module is not logits
        if not path & tracked and (name in asked or (safe and kind in args.module_names_to_perforate)):
            ids.append(name)
        elif next(module.parameters(recurse=False), None) is not None:
            left.setdefault(kind, []).append(re.sub(r"\.\d+", ".*", name) or "the model itself")
    if left and main_process():
        kinds = (f"{kind} ({', '.join(dict.fromkeys(without))})" for kind, without in left.items())
        logger.warning(f"No dendrites: {'; '.join(kinds)}")
    if not ids:
        raise PerforatedError("no module can get dendrites: weights tied, frozen or with two names, or no such type")
    return ids


def _on_first_call(module: torch.nn.Module, find_dimensions: bool) -> None:
    """Check the output of `module`, one that gets dendrites; tell the library which dimension of it is the neurons.

    For a convolution that is the second one, for anything else the last.
    """

    def check(layer, inputs, output):
        handle.remove()
        if module.processor is not None:  # the user told the library how to make one tensor of it
            return
        name = module.name[1:]
        if not isinstance(output, torch.Tensor):
            raise PerforatedError(
                f"{name} returns a {type(output).__name__}, and dendrites need one tensor: give them to modules in it, "
                f"with --module_ids_to_perforate, or to nothing in it, with --module_ids_to_track {name}"
            )
        convolutions = (m for m in layer.modules() if isinstance(m, (Conv1d, Conv2d, Conv3d)))
        dimensions = [-1] * output.ndim
        dimensions[1 if any(len(m.kernel_size) + 2 == output.ndim for m in convolutions) else -1] = 0
        if find_dimensions:
            module.set_this_output_dimensions(dimensions)

    handle = module.main_module.register_forward_hook(check)


def perforate(
    model: PreTrainedModel, dendrite_args: DendriteArguments, training_args: TrainingArguments
) -> PreTrainedModel:
    """Convert `model` in place so that dendrites can be added to it, and return it.

    The library keeps one tracker per process: a second call replaces the first one's. Raises PerforatedError for
    settings that cannot work and for a run folder that is not free.
    """
    name = dendrite_args.save_name
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise PerforatedError(f"--save_name {name!r}: use letters, digits, '_', '-' and '.', no path separator")
    if not isinstance(model, PreTrainedModel) or model._hf_peft_config_loaded:
        raise PerforatedError(
            f"{type(model).__name__}: a PreTrainedModel is needed whose save_pretrained writes all of it. To train "
            "adapters, put them in with peft.inject_adapter_in_model, in the __init__ of a model class of your own"
        )
    refuse_arguments(vars(training_args))
    if training_args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise PerforatedError(f"--activation_checkpointing: {type(model).__name__} does not support it")
    if training_args.device.type == "xla":
        raise PerforatedError("TPUs are not supported; use DistributedDataParallel on GPUs or CPUs: torchrun")
    if training_args.fp16 and training_args.device.type == "cpu":
        raise PerforatedError("--fp16 needs a GPU and would be ignored; on the CPU use --bf16 --use_cpu")
    if not training_args.metric_for_best_model:
        raise PerforatedError("--metric_for_best_model is needed: it decides when a dendrite is added")
    if training_args.lr_scheduler_type == "reduce_lr_on_plateau":  # PyTorch takes lower as better for any metric
        mode = {"mode": "max" if training_args.greater_is_better else "min"}
        training_args.lr_scheduler_kwargs = mode | (training_args.lr_scheduler_kwargs or {})
    if training_args.n_gpu > 1:
        # transformers 5.23 has no public way to use one of several visible GPUs; nn.DataParallel, its default there,
        # is refused by the tracker.
        training_args._n_gpu = 1
        logger.warning("Several GPUs are visible, one is used. All of them: torchrun --nproc_per_node N <script>")

    _delete_second_body(model)
    threshold = dendrite_args.improvement_threshold
    for setting in "configuration_confirmed unwrapped_modules_confirmed weight_decay_accepted silent".split():
        getattr(GPA.pc, f"set_{setting}")(True)  # never ask on standard input
    for setting in "verbose find_best_lr test_saves pai_saves retain_all_dendrites".split():
        getattr(GPA.pc, f"set_{setting}")(False)  # the Trainer owns schedule and checkpoints; best_model.pt stays
    settings = {
        "device": training_args.device,
        "use_cuda": training_args.device.type == "cuda",
        "d_type": model.dtype,
        "testing_dendrite_capacity": dendrite_args.testing_dendrite_capacity,
        "max_dendrites": dendrite_args.max_dendrites,
        "n_epochs_to_switch": dendrite_args.n_epochs_to_switch,
        "history_lookback": dendrite_args.history_lookback,
        "improvement_threshold": threshold[0] if len(threshold) == 1 else list(threshold),
        "library_validation_score": training_args.metric_for_best_model,
        "output_dimensions": dendrite_args.output_dimensions or [-1, 0, -1, -1],
        "module_ids_to_perforate": [f".{name}" for name in _ids_to_perforate(model, dendrite_args)],
        "module_names_to_perforate": [],  # all are named one by one
        "module_names_to_not_save": [],
        # A capacity test changes these two, and retain_all_dendrites: a later call here must not inherit them.
        "switch_mode": GPA.pc.DOING_HISTORY,
        "max_dendrite_tries": 2,
    }
    for setting, value in settings.items():
        getattr(GPA.pc, f"set_{setting}")(value)

    with training_args.main_process_first(local=False):
        if training_args.process_index == 0:
            _claim_run_folder(dendrite_args, training_args)
        with _library():
            model = UPA.perforate_model(
                model,
                doing_pai=dendrite_args.doing_pai,
                save_name=name,
                making_graphs=False,  # drawn by PerforatedTrainer, when it is worth the time
                maximizing_score=bool(training_args.greater_is_better),
            )
    model.dendrite_args = dendrite_args
    GPA.pc.set_module_names_to_not_save([])  # the library adds second names of modules, which loading then misses
    for module in UPA.get_pai_modules(model, 0):
        _on_first_call(module, find_dimensions=not dendrite_args.output_dimensions)
    return model.to(training_args.device)


def load_perforated_model(model_class: type[PreTrainedModel], folder: str | os.PathLike) -> PreTrainedModel:
    """Load a model with dendrites from `final/` or from a checkpoint of a run that still trains.

    Gives `model_class` in evaluation mode on the CPU, with the trained model's logits to the last bit. Reads
    `config.json` and `model.safetensors`, no pickle, needs no tracker. Raises PerforatedError where they are missing.
    """
    folder = Path(folder)
    folder = folder / DEPLOYED if (folder / DEPLOYED).is_dir() else folder
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise PerforatedError(f"{folder} holds no model: {name} is missing")
    model = model_class(model_class.config_class.from_pretrained(folder))
    _delete_second_body(model)
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    ties = getattr(model.config, TIES, {})
    weights |= {name: weights[other] for name, other in ties.items()}
    with _library():
        model = NPA.load_pai_model_from_dict(model, weights)
    # Once more: of a tied layer, the library has tied the first dendrite. This unties all, and takes the file's dtypes.
    model.load_state_dict(weights, strict=False, assign=True)
    for name, other in ties.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_parameter_or_buffer(other))
    return model.eval()


def _attribute_of_layer(self, name):
    """As in the library's training modules: what a layer with dendrites has not, such as `weight`, its layer has."""
    try:
        return torch.nn.Module.__getattr__(self, name)
    except AttributeError:
        if name == "layer_array":
            raise
        return getattr(self.layer_array[-1], name)


CL.PAIModulePyThread.__getattr__ = NPA.PerforatedModule.__getattr__ = _attribute_of_layer


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_checkpoint(folder: Path) -> dict:
    """Return the manifest of a complete and undamaged checkpoint, else raise PerforatedError."""
    if not folder.is_dir():
        raise PerforatedError(f"{folder}: there is no such checkpoint folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if not (folder / name).is_file() or _digest(folder / name) != digest:
                raise PerforatedError(f"{folder} is damaged: {name} is missing or is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PerforatedError(f"{folder} is unfinished, or no checkpoint of a run with dendrites") from None
    return manifest


class _DendriteCallback(TrainerCallback):
    """The dendrite steps inside one `Trainer.train()`: scores to the tracker, checkpoints, signals, progress."""

    def __init__(self, trainer: "PerforatedTrainer"):
        self.trainer, self.last_line = trainer, 0.0

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        GPA.pai_tracker.set_optimizer_instance(optimizer)
        hidden = args.disable_tqdm or not state.is_world_process_zero or None  # None: without a terminal
        total = GPA.pc.get_n_epochs_to_switch()
        self.bar = tqdm(total=total, leave=False, unit="eval", dynamic_ncols=True, disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stop_requested():
            control.should_save = control.should_training_stop = True
        # The running loss is not part of a checkpoint: log it before, so that a resumed run reports the same losses.
        if control.should_evaluate or control.should_save:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in logs.items():
            # With fp16 the gradient scaler skips a step whose gradient is not finite, and goes on.
            watched = name.endswith("loss") or (name == "grad_norm" and not args.fp16)
            if watched and not math.isfinite(value):
                raise PerforatedError(
                    f"{name} became {value} at step {state.global_step}. The last checkpoint and the best model so far "
                    f"are kept in {args.output_dir}; try a lower --learning_rate",
                    exit_status=1,
                )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        trainer = self.trainer
        if not trainer.is_in_train or trainer.score_name not in metrics:
            return
        trainer.add_score(metrics)
        if trainer.cycle_ended:
            control.should_save = control.should_training_stop = True
        member = GPA.pai_tracker.member_vars
        since = member["num_epochs_run"] - member["epoch_last_improved"]
        shown = {"loss": f"{trainer.last_loss():.4f}", "best": f"{trainer.best_score():.4f}"}
        shown = {"step": state.global_step} | shown | {"dendrites": trainer.dendrites()}
        self.bar.n = min(since, self.bar.total)
        self.bar.set_postfix(shown)
        if self.bar.disable and time.monotonic() - self.last_line > 15:  # no terminal: now and then a plain line
            self.last_line = time.monotonic()
            line = " ".join(f"{name} {value}" for name, value in shown.items())
            trainer.say(f"{line} evaluations since the best {since}/{self.bar.total}")

    def on_save(self, args, state, control, **kwargs):
        self.trainer.complete_checkpoint()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class PerforatedTrainer(Trainer):
    """A Trainer that adds dendrites to a model from `perforate`, cycle after cycle, until the tracker says stop.

    Takes the arguments of `Trainer`. `test_dataset` is evaluated beside every validation and only reported.
    After `train()`: the model is the tracker's best, `stopped_by` is "tracker" or "max_steps",
    `cycles()` the result for each number of dendrites. `save_model(folder)` writes the model without scaffolding.
    """

    def __init__(self, *args, test_dataset=None, **kwargs):
        if "using_perforatedai" in inspect.signature(super().__init__).parameters:  # Perforated AI's fork
            kwargs["using_perforatedai"] = False
        super().__init__(*args, **kwargs)
        if GPA.pai_tracker == []:
            raise PerforatedError("the model has no dendrite tracker: call perforate(model, ...) before the trainer")
        if self.optimizer is not None or self.model_init is not None:
            raise PerforatedError("each dendrite needs a new optimizer: pass optimizer_cls_and_kwargs, no model_init")
        self.test_dataset = test_dataset
        self.score_name = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        self.stopped_by, self.train_seconds, self.cycle_ended, self.complete = None, 0.0, False, False
        self.signal, self._parameters, self._drawn = None, {}, 0.0
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(_DendriteCallback(self))

    # ---------------------------------------------------------------- training, one Trainer.train() per dendrite cycle

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """Train until the tracker says that training is complete, or until `max_steps`, or until a signal.

        Args: as `Trainer.train`; `resume_from_checkpoint` may also be "true", the newest complete checkpoint.
        Raises PerforatedError for a checkpoint that cannot be used, a loss that is not finite, and after a signal.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        self.complete, output, self._drawn = False, None, time.monotonic()
        # The Trainer would delete an old checkpoint before the new one is complete: complete_checkpoint does it later.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self._signals(), _library(stream=sys.stdout):
                while True:
                    self._clock = time.monotonic()
                    if checkpoint:
                        self.load_checkpoint(checkpoint)
                    if self.complete or 0 < self.args.max_steps <= self.state.global_step:
                        break
                    self.cycle_ended = False
                    self.optimizer = self.lr_scheduler = None
                    self.model_wrapped = self.model
                    if self.dendrites():
                        self.set_dropout(self.model.dendrite_args.dropout_with_dendrites)
                    # accelerate 1.15 marks a model that was evaluated before training as prepared, and then would not
                    # wrap it for several processes; there is no public way to take the mark off.
                    self.model._is_accelerate_prepared = False
                    output = super().train(checkpoint, trial, ignore_keys_for_eval)
                    self.train_seconds += time.monotonic() - self._clock
                    if self.signal or not self.cycle_ended:
                        break
                    checkpoint = self.checkpoint_folder()
        except KeyError as error:  # the Trainer's words for a metric that evaluation does not produce
            raise PerforatedError(error.args[0]) if "metric_for_best_model" in str(error) else error from None
        finally:
            self.args.save_total_limit = self.save_total_limit
        self.accelerator.wait_for_everyone()
        if self.signal and not self.complete:
            command = shlex.join(["python", *sys.argv, "--resume_from_checkpoint", "true"])
            stopped = f"stopped at step {self.state.global_step:,} with a checkpoint; to go on: {command}"
            raise PerforatedError(stopped, 128 + self.signal)
        self.stopped_by = "tracker" if self.complete else "max_steps"
        if self.stopped_by == "max_steps" and (best := Path(GPA.pc.get_save_name(), "best_model.pt")).is_file():
            with _library():
                UPA.load_system(self.model, str(best.parent), best.stem, switch_call=True)
            self.draw()
        return output or TrainOutput(self.state.global_step, 0.0, {})

    def set_dropout(self, rate: float | None) -> None:
        """Set the rate of all dropout layers; None leaves them alone."""
        for module in self.model.modules() if rate is not None else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `Trainer.evaluate`; while training, the test data first, for the report."""
        if self.is_in_train and eval_dataset is None and self.test_dataset is not None:
            self.test_metrics = super().evaluate(self.test_dataset, ignore_keys, "test")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs, start_time=None):
        """As `Trainer.log`; dendrites and parameters become series in TensorBoard, wandb and the log history."""
        if self.is_in_train:
            logs |= {"dendrites": self.dendrites(), "parameters": self.parameters()}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`; the loss leaves out what fills up the last batch of several processes.

        accelerate repeats examples there. Their predictions are cut off when they are gathered, but the stock loss is a
        mean over them too and so depends on the number of processes.
        """
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        data = self.accelerator.gradient_state
        if self.args.world_size > 1 and data.end_of_dataloader and data.remainder > 0 and output[0] is not None:
            size = len(next(iter(inputs.values())))
            real = data.remainder - self.args.process_index * size
            if 0 < real < size:
                inputs = {name: value[:real] for name, value in inputs.items()}
                return super().prediction_step(model, inputs, True)[0], *output[1:]
        return output

    def floating_point_ops(self, inputs):
        """As `Trainer.floating_point_ops`, but without counting the parameters anew at each step."""
        data = inputs.get(self.model.main_input_name)
        return 0 if data is None else 6 * data.numel() * self.parameters()

    def add_score(self, metrics: dict[str, float]) -> None:
        """Give an evaluation to the tracker. Rank 0 alone does, and tells the others what it decided."""
        score = metrics[self.score_name]
        if not math.isfinite(score):
            raise PerforatedError(f"{self.score_name} is {score}: it cannot decide", exit_status=1)
        modules = UPA.get_pai_modules(self.model, 0)  # in each, the first gradient sets out_channels
        idle = [m.name[1:] for m in modules if m.dendrite_module.dendrite_values[0].out_channels == -1]
        if idle and self.state.global_step:
            raise PerforatedError(f"no training reached {', '.join(idle)}: set --module_ids_to_track {' '.join(idle)}")
        decision = [False, False]
        if self.is_world_process_zero():
            before, tracker, name = self.dendrites(), GPA.pai_tracker, self.score_name.removeprefix("eval_")
            with _library(), self._same_buffers():
                if math.isfinite(self.last_loss()):
                    tracker.add_extra_score(self.last_loss(), "train loss")
                if self.test_dataset is not None:
                    tracker.add_test_score(self.test_metrics[f"test_{name}"], f"test {name}")
                _, *decision = tracker.add_validation_score(score, self.model)
            if decision == [True, False]:
                grown = f"{before} -> {self.dendrites()} dendrites"
                if before == self.dendrites():
                    grown = f"dendrite {before} did not help and is tried anew"
                self.say(
                    f"step {self.state.global_step:,}: {grown}, {self.parameters():,} parameters, "
                    f"{self.score_name} before {self.best_score():.4f}"
                )
        restructured, self.complete = broadcast_object_list([bool(value) for value in decision])
        self.cycle_ended = restructured or self.complete
        if self.cycle_ended or time.monotonic() - self._drawn > 60:
            self.draw()

    # ---------------------------------------------------------------------------------------------- what there is now

    @contextlib.contextmanager
    def _same_buffers(self):
        """The tracker is saved through a buffer of rank 0's model; DDP needs buffers of one size on all ranks."""
        buffer = self.model.tracker_string
        yield
        self.model.tracker_string = buffer

    def dendrites(self) -> int:
        """Number of dendrites that each layer has now."""
        return GPA.pai_tracker.member_vars["num_dendrites_added"]

    def parameters(self) -> int:
        """Number of distinct parameters of the model as it would be deployed, without training scaffolding."""
        dendrites = self.dendrites()  # they determine the structure, so each number is counted once
        if dendrites not in self._parameters:
            self._parameters[dendrites] = sum(p.numel() for p in self.deployed_model().parameters())
        return self._parameters[dendrites]

    def deployed_model(self) -> PreTrainedModel:
        """A copy of the model without training scaffolding; same logits to the last bit."""
        member = GPA.pai_tracker.member_vars
        optimizer, member["optimizer_instance"] = member["optimizer_instance"], None  # copying clears its gradients
        with _library():
            model = UPA.prepare_final_model(self.model)
        member["optimizer_instance"] = optimizer
        for name, layer in model.named_modules():
            # Where there is one dendrite and the model was loaded, perforatedai 3.2.9 leaves out its output weights.
            if (
                isinstance(layer, CL.PAIModulePyThread)
                and len(layer.layer_array) == 2
                and not hasattr(layer, "skip_weights")
            ):
                weights = self.model.get_submodule(name).dendrites_to_top[-1].detach().clone()
                layer.skip_weights = torch.nn.ParameterList([torch.nn.Parameter(weights)])
        names = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        ties = {other: same[0] for same in names.values() for other in same[1:]}
        # Tied names moved: for save_pretrained here, for load_perforated_model in the config.
        model._tied_weights_keys = model.all_tied_weights_keys = ties
        setattr(model.config, TIES, ties)
        return model

    def last_loss(self) -> float:
        """The training loss that was logged last; nan before the first."""
        return next((entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry), float("nan"))

    def scores(self) -> pandas.DataFrame:
        """The evaluations so far, a row each: step, dendrites, parameters, validation and test scores."""
        log = pandas.DataFrame(self.state.log_history, columns=None)
        if self.score_name not in log or "dendrites" not in log:
            return pandas.DataFrame()
        log = log.groupby(["step", "dendrites"], as_index=False).first()  # one row from several entries
        return log.dropna(subset=self.score_name).astype({"dendrites": int, "parameters": int})

    def cycles(self) -> list[dict]:
        """For each number of dendrites: parameters, the best validation score, its step and the other scores there."""
        scores = self.scores()
        if scores.empty:
            return []
        best = scores.groupby("dendrites")[self.score_name]
        rows = scores.loc[best.idxmax() if self.args.greater_is_better else best.idxmin()]
        rows = rows.rename(columns={"step": "global_step", self.score_name: "best_validation"})
        names = ["dendrites", "parameters", "global_step", "best_validation"]
        for part in ("eval_", "test_"):
            names += [name for name in rows if name.startswith(part) and self.reports(name)]
        rows = rows[names].rename(columns=lambda name: re.sub("^eval_", "validation_", name))
        return rows.to_dict("records")

    def reports(self, name: str) -> bool:
        """Whether a metric is one to report: no time, and the loss only where it decides."""
        ending = name.split("_", 1)[-1]
        return not re.fullmatch("loss|epoch|.*time|.*per_second", ending) or self.score_name == f"eval_{ending}"

    def best_score(self) -> float:
        """The best validation score so far, over all cycles; nan before the first."""
        scores = self.scores().get(self.score_name, [])
        return (max if self.args.greater_is_better else min)(scores, default=float("nan"))

    def say(self, line: str) -> None:
        """Print a line above the progress bar, on rank 0 only."""
        if self.is_world_process_zero():
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the model without scaffolding. For checkpoints (`_internal_call`): all that training needs of it."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:
            self.state.best_global_step = None  # the tracker keeps the best model, the Trainer need not
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # left unfinished by a run that was killed
                folder.mkdir(parents=True)  # the library's own mkdir fails where another process was first
            self.accelerator.wait_for_everyone()  # before other processes write their random state there
        if not self.args.should_save:
            return
        if _internal_call:
            with _library(), self._same_buffers():
                UPA.save_system(self.model, str(folder), "system")
            (folder / "system.pt").replace(folder / WEIGHTS)
        target = folder / DEPLOYED if _internal_call else folder
        self.deployed_model().save_pretrained(target, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def save_results(self, dataset: dict) -> dict:
        """Write `final/` (the model and a card) and `results.json`, each whole or not at all; print and return them.

        `dataset`: its name and the sizes of its parts, for the record.
        """
        args, folder = self.args, Path(GPA.pc.get_save_name())
        final = {"dendrites": self.dendrites(), "parameters": self.parameters()}
        for data, part in ((self.eval_dataset, "validation"), (self.test_dataset, "test")):
            if data is not None:
                scores = self.evaluate(data, metric_key_prefix=part)
                final |= {name: score for name, score in scores.items() if self.reports(name)}
        packages = ("torch", "torchvision", "transformers", "perforatedai", "accelerate", "datasets", "safetensors")
        results = {
            "stopped_by": self.stopped_by,
            "testing_dendrite_capacity": self.model.dendrite_args.testing_dendrite_capacity,
            "dataset": dataset,
            "metric": self.score_name,
            "greater_is_better": args.greater_is_better,
            "seed": args.seed,
            "cycles": self.cycles(),
            "final": final,
            "global_step": self.state.global_step,
            "train_seconds": round(self.train_seconds, 3),
            "steps_per_second": round(self.state.global_step / max(self.train_seconds, 1e-9), 1),
            "command": shlex.join(sys.argv),
            "versions": {package: version(package) for package in packages if find_spec(package)},
        }
        if args.should_save:
            unfinished = folder / "final.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            self.save_model(str(unfinished))
            (unfinished / "README.md").write_text(self.model_card(dataset["name"], **final))
            shutil.rmtree(folder / "final", ignore_errors=True)
            unfinished.replace(folder / "final")
            unfinished = folder / "results.json.unfinished"
            unfinished.write_text(json.dumps(results, indent=2) + "\n")
            unfinished.replace(folder / "results.json")
            print_results(results, folder)
        if results["testing_dendrite_capacity"]:
            memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB"  # Linux counts in KiB
            if torch.cuda.is_available():
                memory = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of the GPU's"
            self.say(f"Largest memory in use: {memory}")
        return results

    def model_card(self, data: str, dendrites: int, parameters: int, **scores: float) -> str:
        kind = type(self.model)
        module = Path(sys.argv[0]).stem if kind.__module__ == "__main__" else kind.__module__
        shown = "\n".join(f"- {name} {value:.4f}" for name, value in scores.items())
        card = MODEL_CARD.format(
            model=kind.__name__, module=module, data=data, dendrites=dendrites, parameters=parameters, scores=shown
        )
        if self.processing_class is not None:
            name, module = type(self.processing_class).__name__, type(self.processing_class).__module__
            card += f'    from {module} import {name}\n    processor = {name}.from_pretrained("final")\n'
        return card

    def complete_checkpoint(self) -> None:
        """Finish what `Trainer` wrote: after the manifest the checkpoint counts, before it does not."""
        self.accelerator.wait_for_everyone()
        folder = self.checkpoint_folder()
        if self.is_world_process_zero():
            if self.cycle_ended:  # they belong to the network before the dendrite
                for name in ("optimizer.pt", "scheduler.pt", "scaler.pt"):
                    (folder / name).unlink(missing_ok=True)
            if (best := Path(GPA.pc.get_save_name(), "best_model.pt")).is_file():
                shutil.copyfile(best, folder / BEST)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            manifest = {
                "saved_at": time.time(),
                "complete": self.complete,
                "train_seconds": self.train_seconds + time.monotonic() - self._clock,
                "settings": self.settings(),
                "files": {str(path.relative_to(folder)): _digest(path) for path in files},
            }
            temporary = folder / f"{MANIFEST}.tmp"
            temporary.write_text(json.dumps(manifest, indent=1))
            temporary.replace(folder / MANIFEST)
            finished = sorted(folder.parent.glob(f"checkpoint-*/{MANIFEST}"), key=os.path.getmtime)
            for old in finished[: -self.save_total_limit] if self.save_total_limit else []:
                shutil.rmtree(old.parent)
        self.accelerator.wait_for_everyone()

    def find_checkpoint(self, resume: str | bool | None) -> Path | None:
        """The checkpoint that `resume` means: a folder, or for true the newest complete one, or None."""
        if not is_resumed(resume):
            return None
        if str(resume).lower() != "true":
            _check_checkpoint(Path(resume))
            return Path(resume)
        found = {}
        for folder in sorted(Path(self.args.output_dir).glob("checkpoint-*")):
            try:
                found[_check_checkpoint(folder)["saved_at"]] = folder
            except PerforatedError as error:
                self.say(f"warning: passed over: {error}")
        if not found:
            self.say(f"no complete checkpoint in {self.args.output_dir}: starting from the beginning")
        return found[max(found)] if found else None

    def load_checkpoint(self, folder: Path) -> None:
        """Bring model, dendrites and tracker to where they were; `Trainer.train` then does so for the rest."""
        manifest = json.loads((folder / MANIFEST).read_text())
        best = Path(GPA.pc.get_save_name(), "best_model.pt")
        if self.is_world_process_zero() and (folder / BEST).is_file():
            best.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / BEST, best)
        now, then = self.settings(), manifest["settings"]
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                self.say(f"warning: {name} was {then.get(name)} in {folder.name} and is now {now.get(name)}")
        try:
            with _library():
                # What UPA.load_system does, except that it forgets the best score and the evaluations since.
                weights = safetensors.torch.load_file(folder / WEIGHTS)
                for module in UPA.get_pai_modules(self.model, 0):
                    module.set_this_output_dimensions(weights[f"{module.name[1:]}.this_output_dimensions"])
                UPA.load_net_from_dict(self.model, weights)
                self.model.load_state_dict(weights)  # the library passes over tensors of another shape
                GPA.pai_tracker.reset_module_vector(self.model, False)
                GPA.pai_tracker.from_string(UPA.string_from_tensor(self.model.tracker_string))
                GPA.pai_tracker.saved_time = time.time()
                GPA.pai_tracker.loaded = True
        except (KeyError, RuntimeError) as error:
            raise PerforatedError(f"{folder} does not fit this network: {str(error)[:400]}") from error
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.train_seconds, self.complete = manifest["train_seconds"], manifest["complete"]
        self.accelerator.wait_for_everyone()

    def settings(self) -> dict:
        """What a resumed run should share with the run that wrote the checkpoint."""
        settings = self.args.to_dict() | vars(self.model.dendrite_args)
        settings = {name: value for name, value in settings.items() if not HARMLESS.search(name)}
        settings |= {"world_size": self.args.world_size}
        for name in ("train_dataset", "eval_dataset", "test_dataset"):
            data = getattr(self, name)
            if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, dict):
                settings[name] = f"{len(data)} examples, first {zlib.crc32(repr(data[0]).encode()):08x}"
        return json.loads(json.dumps(settings, default=str))

    # -------------------------------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def _signals(self):
        """Ctrl-C and SIGTERM end the run after a checkpoint; a second one at once.

        The Trainer's just-in-time checkpoint saves in the middle of a step, after dropout has drawn its random numbers
        and before the weights have changed: a run resumed from there would not repeat an uninterrupted one.
        """

        def handler(number, frame):
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number
            self.say("stopping after the next checkpoint; press Ctrl-C again to stop at once")

        self.signal, old = None, {}
        try:
            with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
                old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
            yield
        finally:
            for number, previous in old.items():
                signal.signal(number, previous)

    def stop_requested(self) -> bool:
        """Whether a signal came. Several processes agree every ten steps, so that all stop at the same one."""
        if self.args.world_size > 1:
            if self.state.global_step % 10:
                return False
            flag = torch.tensor([self.signal or 0], device=self.args.device)
            self.signal = int(self.accelerator.gather(flag).max()) or None
        return bool(self.signal)

    # ----------------------------------------------------------------------------------------------------------- plot

    def draw(self) -> None:
        """Write `<save_name>.png` (ours) and the tracker's own graphs and tables (`<save_name>_tracker...`)."""
        self._drawn, cycles = time.monotonic(), self.cycles()
        if not self.is_world_process_zero() or not cycles:
            return
        member = GPA.pai_tracker.member_vars
        improved = member["epoch_last_improved"]
        with _library():
            # Between a restructure and the next score it points past the scores, where save_graphs of 3.2.9 fails.
            member["epoch_last_improved"] = min(improved, len(member["accuracies"]) - 1)
            GPA.pai_tracker.making_graphs = True
            GPA.pai_tracker.save_graphs("_tracker")
            GPA.pai_tracker.making_graphs, member["epoch_last_improved"] = False, improved

        test = "test_" + self.score_name.removeprefix("eval_")
        scores = self.scores().rename(columns={self.score_name: "validation", test: "test"}).set_index("step")
        table = pandas.DataFrame(cycles).rename(columns={test: "test"}).set_index("dendrites")
        unit, parts = self.score_name.removeprefix("eval_"), [part for part in ("validation", "test") if part in scores]
        value = table[parts[-1] if "test" in parts else "best_validation"]
        if unit == "accuracy":
            scores[parts], value, unit = 100 * (1 - scores[parts]), 100 * (1 - value), "error (%)"
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        scores.plot(y=parts, style=["-", "--"], ax=left, xlabel="training steps", ylabel=unit)
        for dendrites, rows in scores.groupby("dendrites"):
            left.axvline(rows.index[0], color="0.6", linewidth=1)
            left.annotate(f" {dendrites}", (rows.index[0], 0.95), xycoords=("data", "axes fraction"))
        # Up to the ninth decile: the first steps would flatten the rest.
        low, high = scores[parts].min().min(), scores[parts].quantile(0.9).max()
        left.set(ylim=(low - 0.2 * (high - low) - 1e-6, high + 0.2 * (high - low) + 1e-6))
        left.set_title("A line where so many dendrites came into each layer")
        value.plot.bar(ax=right, color="0.8", edgecolor="0.2", rot=0, xlabel="dendrites in each layer", ylabel=unit)
        labels = [f"{v:.3g}\n{parameters:,}" for v, parameters in zip(value, table["parameters"], strict=True)]
        right.bar_label(right.containers[0], labels)
        right.margins(y=0.2)
        right.set_title(f"{parts[-1].capitalize()} {unit}, and parameters")
        temporary = Path(GPA.pc.get_save_name(), "plot.unfinished.png")
        figure.savefig(temporary, dpi=100)
        temporary.replace(temporary.with_name(f"{GPA.pc.get_save_name()}.png"))
