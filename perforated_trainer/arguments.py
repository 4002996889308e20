"""The arguments of dendrites and their validation, and the one type of error."""

import functools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

# Arguments of the Trainer that do not work with dendrites, and what to use instead.
REFUSED = {
    "fsdp": "use DistributedDataParallel instead: torchrun --nproc_per_node N",
    "deepspeed": "use DistributedDataParallel instead: torchrun --nproc_per_node N",
    "save_only_model": "a run cannot be resumed exactly without the optimizer; use the model in `final/`",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM already save a checkpoint before the run ends",
    "auto_find_batch_size": "set --per_device_train_batch_size; --testing_dendrite_capacity shows whether it fits",
}

LAYER_TYPES = ("PAISequential", "Conv1d", "Conv2d", "Conv3d", "Linear", "Conv1D")  # get dendrites by default


class PerforatedError(RuntimeError):
    """A problem that the user can solve: print it as one line and end with `exit_status`.

    Args:
        message: what is wrong and what to do; line breaks become spaces.
        exit_status: the status with which a script should end.
    """

    def __init__(self, message: str, exit_status: int = 2):
        super().__init__(" ".join(str(message).split()))
        self.exit_status = exit_status


@dataclass
class DendriteArguments:
    """
    Arguments of dendrites, next to `TrainingArguments`. One "epoch" of perforatedai's names is one evaluation.

    Args:
        save_name (`str`, *optional*): Name of the run; on a command line, also of its folder if there is no
            `--output_dir`.
        doing_pai (`bool`, defaults to `True`): Add dendrites. If `False`: same network and stopping rule, none added.
        testing_dendrite_capacity (`bool`, defaults to `False`): Add three dendrites, one at each evaluation, to test
            memory. Not a real run.
        switch_mode (`str`, defaults to `"history"`): What ends a cycle: `"history"`, a plateau of the monitored metric;
            `"fixed"`, the end of one training of `num_train_epochs` or `max_steps` with its schedule.
        max_dendrites (`int`, defaults to 5): Maximum number of dendrites per layer, including those that the model
            already has.
        n_epochs_to_switch (`int`, defaults to 10): Evaluations without improvement before a dendrite is added.
        history_lookback (`int`, defaults to 1): The monitored metric is averaged over this many evaluations.
        improvement_threshold (`float` or `list[float]`, defaults to `[0.0001]`): Minimum relative improvement; several
            values: one per number of dendrites added, the last one for all others.
        improvement_threshold_raw (`float`, defaults to 1e-5): Minimum absolute improvement.
        max_dendrite_tries (`int`, defaults to 2): Attempts at a dendrite that does not help, before training ends.
        dendrite_activation (`str`, *optional*): Activation of the dendrites, a name in
            `perforated_trainer.layers.ACTIVATIONS`. `"sigmoid"` by default, `"tanh"` with a rank.
        dendrite_rank (`int`, *optional*): Rank of the dendrites' weights; full rank by default. For pretrained models.
        dendrite_init_scale (`float`, *optional*): Initial size of a dendrite. Full rank: standard deviation of its
            weights, 0.01 by default. With a rank: its weight in the output, 1 by default, as alpha / r of LoRA; its
            second factor begins with zeros. The activation must be 0 at 0 and have a slope there, as tanh has. With
            others, such as sigmoid: standard deviation of its second factor, 0.1 by default.
        num_initial_dendrites (`int`, defaults to 0): Dendrites that the network begins with.
        freeze_base (`bool`, defaults to `False`): Train the dendrites, newly initialized layers and `modules_to_train`
            alone. Frozen layers get dendrites.
        modules_to_train (`list[str]`, *optional*): Modules that are trained in full with `freeze_base`: names, suffixes
            or regular expressions, as peft's `modules_to_save`.
        dendrite_learning_rate_factor (`float`, defaults to 1.0): Factor of the learning rate after the first dendrite
            addition; 0.25 is often recommended.
        max_parameters (`int`, *optional*): Add no dendrite that gives the model more parameters than this.
        module_names_to_perforate (`list[str]`): Types of layers that get dendrites, unless tied, frozen or an output
            embedding. Linear, Conv1D and convolutions by default.
        module_ids_to_perforate (`list[str]`): Additional modules that get dendrites, even if tied or frozen.
        perforate_last_blocks (`int`, *optional*): Add dendrites in the last N blocks only.
        module_names_to_track, module_ids_to_track (`list[str]`): Types and names of modules that get no dendrites, nor
            anything in them.
        join_normalization (`bool`, defaults to `False`): A convolution and the normalization after it get dendrites as
            one block.
        output_dimensions (`list[int]`, *optional*): 0 for the dimension of the neurons, -1 for others. Found for each
            layer by default.
        control_of (`str`, *optional*): Folder of a finished run: train a step-matched baseline without dendrites.
        overwrite_run (`bool`, defaults to `False`): Replace the run that the folder already holds.
    """

    save_name: str | None = HfArg(default=None, help="Name of the run, and of its folder if --output_dir is not given.")
    doing_pai: bool = HfArg(default=True, help="Add dendrites. False: same network and stopping rule, no dendrites.")
    testing_dendrite_capacity: bool = HfArg(
        default=False, help="Add three dendrites, one at each evaluation, to test memory. Not a real run."
    )
    switch_mode: str = HfArg(
        default="history",
        help="What ends a cycle. history: a plateau of the monitored metric. fixed: the end of one training of "
        "num_train_epochs or max_steps with its whole schedule, for fine-tuning.",
    )
    max_dendrites: int = HfArg(
        default=5, help="Maximum number of dendrites per layer, including those that the model already has."
    )
    n_epochs_to_switch: int = HfArg(default=10, help="Evaluations without improvement before a dendrite is added.")
    history_lookback: int = HfArg(default=1, help="The monitored metric is averaged over this many evaluations.")
    improvement_threshold: list[float] = HfArg(
        default_factory=lambda: [0.0001],
        help="Minimum relative improvement; several values: one per number of dendrites added.",
    )
    improvement_threshold_raw: float = HfArg(default=1e-5, help="Minimum absolute improvement.")
    max_dendrite_tries: int = HfArg(default=2, help="Attempts at a dendrite that does not help, before training ends.")
    dendrite_activation: str | None = HfArg(
        default=None, help="Activation of the dendrites: sigmoid, tanh, relu, ... Default: sigmoid, with a rank tanh."
    )
    dendrite_rank: int | None = HfArg(
        default=None, help="Rank of the dendrites' weights, for pretrained models. Default: full rank."
    )
    dendrite_init_scale: float | None = HfArg(
        default=None,
        help="Initial size of a dendrite. Default: 0.01, the standard deviation of its weights; with --dendrite_rank "
        "1, its weight in the output, or for sigmoid 0.1, the standard deviation of its second factor.",
    )
    num_initial_dendrites: int = HfArg(default=0, help="Dendrites that the network begins with.")
    freeze_base: bool = HfArg(
        default=False,
        help="Train dendrites, newly initialized layers and --modules_to_train only. Frozen layers get dendrites.",
    )
    modules_to_train: list[str] = HfArg(
        default_factory=list, help="Modules that are trained in full with --freeze_base: names or patterns as below."
    )
    dendrite_learning_rate_factor: float = HfArg(
        default=1.0, help="Factor of the learning rate after the first dendrite addition; 0.25 is often recommended."
    )
    max_parameters: int | None = HfArg(
        default=None, help="Add no dendrite that gives the model more parameters than this."
    )
    module_names_to_perforate: list[str] = HfArg(
        default_factory=lambda: list(LAYER_TYPES),
        help="Types of layers that get dendrites, unless tied, frozen or an output embedding.",
    )
    module_ids_to_perforate: list[str] = HfArg(
        default_factory=list,
        help="Additional modules that get dendrites, even if tied or frozen: a full name, a suffix (query), or a "
        "regular expression matched against the full name; of what it matches, the layers of the usual types.",
    )
    perforate_last_blocks: int | None = HfArg(
        default=None, help="Add dendrites in the last N blocks only, and to module_ids_to_perforate."
    )
    module_names_to_track: list[str] = HfArg(
        default_factory=list, help="Types of modules that get no dendrites, nor anything in them."
    )
    module_ids_to_track: list[str] = HfArg(
        default_factory=list, help="Modules that get no dendrites, nor anything in them: names or patterns as above."
    )
    join_normalization: bool = HfArg(
        default=False,
        help="A convolution and the normalization after it get dendrites as one block: before a normalization, "
        "a dendrite can lose its effect.",
    )
    output_dimensions: list[int] | None = HfArg(
        default=None, help="0 for the dimension of the neurons, -1 for others: -1 -1 0. Default: found for each layer."
    )
    control_of: str | None = HfArg(
        default=None,
        help="Folder of a finished run. Trains a step-matched baseline without dendrites and reports the difference "
        "with its confidence interval.",
    )
    overwrite_run: bool = HfArg(default=False, help="Replace the run that the folder already holds.")

    def __post_init__(self):
        for name in ("improvement_threshold", "modules_to_train", "module_names_to_perforate"):
            value = getattr(self, name)
            if isinstance(value, (int, float, str)):  # a single value is as good as a list of one
                setattr(self, name, [value])
            elif value is not None:
                setattr(self, name, list(value))
        for name in ("module_ids_to_perforate", "module_names_to_track", "module_ids_to_track"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))

    @property
    def activation(self) -> str:
        """`dendrite_activation`, or its default."""
        return self.dendrite_activation or ("tanh" if self.dendrite_rank else "sigmoid")


# Argument: its type, its smallest value, and whether that value itself is allowed.
_LIMITS = {
    "max_dendrites": (int, 0, True),
    "n_epochs_to_switch": (int, 0, True),
    "history_lookback": (int, 1, True),
    "max_dendrite_tries": (int, 1, True),
    "num_initial_dendrites": (int, 0, True),
    "dendrite_rank": (int, 1, True),
    "max_parameters": (int, 1, True),
    "perforate_last_blocks": (int, 1, True),
    "improvement_threshold_raw": (float, 0, True),
    "dendrite_learning_rate_factor": (float, 0, False),
    "dendrite_init_scale": (float, 0, False),
}


def _check_numbers(args: DendriteArguments) -> None:
    """Raise PerforatedError for a number that makes no sense."""
    values = {name: getattr(args, name) for name in _LIMITS}
    thresholds = args.improvement_threshold
    if not thresholds:
        raise PerforatedError("--improvement_threshold: at least one number is needed")
    limits = [(name, values[name], *limit) for name, limit in _LIMITS.items() if values[name] is not None]
    limits += [("improvement_threshold", value, float, 0, True) for value in thresholds]
    for name, value, kind, least, included in limits:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        whole = kind is float or (number and float(value).is_integer())
        if not number or not whole or value < least or (value == least and not included):
            what = "a whole number" if kind is int else "a number"
            raise PerforatedError(
                f"--{name} {value!r}: it must be {what} {f'of at least {least}' if included else f'above {least}'}"
            )
        if kind is int:  # 8.0 is a whole number, too
            setattr(args, name, int(value))
    if args.num_initial_dendrites > args.max_dendrites:
        raise PerforatedError(
            f"--num_initial_dendrites {args.num_initial_dendrites} is above --max_dendrites {args.max_dendrites}"
        )


def run_name(training_args: TrainingArguments) -> str:
    """The name of a run: the last part of its folder."""
    return Path(training_args.output_dir).resolve().name


def from_command_line(training_args: TrainingArguments | None) -> bool:
    """Whether the arguments were parsed by `parse_arguments`: messages then name flags, else the Python call."""
    return getattr(training_args, "from_command_line", False)


def in_python(message: str) -> str:
    """A message with arguments of Python instead of flags: `name` for `--name`, and `name=8` for `--name 8`."""
    message = re.sub(r"(?<![\w-])--([a-z]\w+) (\d[\d.]*\d|\d)(?![\d.]*\w)", r"\1=\2", message)
    return re.sub(r"(?<![\w-])--(?=[a-z]\w+)", "", message)


def plain_hints(method):
    """Decorator for a method of a trainer: its errors name flags only if there is a command line that has them."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except PerforatedError as error:
            if from_command_line(getattr(self, "args", None)) or (plain := in_python(str(error))) == str(error):
                raise
            raise PerforatedError(plain, error.exit_status) from error.__cause__

    return wrapper


def is_resumed(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks for a checkpoint; on a command line "false" is a text."""
    return str(resume_from_checkpoint or False).lower() != "false"


def refuse_arguments(values: dict) -> None:
    """Raise PerforatedError for values of TrainingArguments, by name, that cannot go with dendrites."""
    for argument, reason in REFUSED.items():
        if values.get(argument):
            raise PerforatedError(f"--{argument} does not go with dendrites: {reason}")
    if values["eval_strategy"] == "no":
        raise PerforatedError("--eval_strategy no: dendrites are added by validation scores; use steps or epoch")
    if values["save_strategy"] == "best":
        raise PerforatedError("--save_strategy best: the best model is kept anyway; use steps, epoch or no")


def check_arguments(dendrite_args: DendriteArguments, args: TrainingArguments) -> None:
    """Raise PerforatedError for settings that cannot go with dendrites, or not on this machine."""
    refuse_arguments(vars(args))
    if dendrite_args.save_name not in (None, run_name(args)):
        raise PerforatedError(
            f"--save_name {dendrite_args.save_name!r} is not the last part of --output_dir {args.output_dir}: give one "
            "of the two, and a save name without a path separator"
        )
    _check_schedule(dendrite_args, args)
    _check_numbers(dendrite_args)
    if not args.metric_for_best_model:
        raise PerforatedError("--metric_for_best_model is needed: it decides when a dendrite is added")
    check_direction(args)
    if args.device.type == "xla":
        raise PerforatedError("TPUs are not supported; use DistributedDataParallel on GPUs or CPUs: torchrun")
    if args.fp16 and args.device.type == "cpu":
        raise PerforatedError("--fp16 needs a GPU and would be ignored; on the CPU use --bf16 and --use_cpu")
    # Without a GPU the Trainer takes several processes for separate runs, which would race for one folder.
    if int(os.environ.get("WORLD_SIZE", "1")) > args.world_size:
        raise PerforatedError("several processes without a GPU: --use_cpu is needed, which trains them with gloo")


# Lower is better. TrainingArguments sets greater_is_better itself: True unless the name of the metric ends in "loss".
_ERRORS = set("wer cer ter mse rmse mae mape perplexity ppl ce nll".split())


def check_direction(args: TrainingArguments) -> str | None:
    """Raise PerforatedError if a metric that is known to be an error would be maximized.

    Returns:
        `str`: A warning if the name of the metric only contains that of an error, else None.
    """
    name = args.metric_for_best_model.removeprefix("eval_").lower()
    if not args.greater_is_better:
        return None
    if name in _ERRORS:
        raise PerforatedError(
            f"--metric_for_best_model {args.metric_for_best_model} would be maximized, and lower is better: set "
            "--greater_is_better false (greater_is_better=False)"
        )
    parts = set(re.split(r"[^a-z0-9]+", name))
    if parts & (_ERRORS | {"error", "err", "errors", "loss"}):
        return f"warning: {args.metric_for_best_model} is maximized; if lower is better, set --greater_is_better false"
    return None


_ENDLESS = ("constant", "constant_with_warmup", "reduce_lr_on_plateau", "inverse_sqrt", "greedy")
_ENDLESS_EPOCHS = 100_000  # from here on, a training is taken to be without an end


def has_an_end(args: TrainingArguments) -> bool:
    """Whether the learning rate schedule is made for a number of steps."""
    return args.lr_scheduler_type not in _ENDLESS


def _check_schedule(dendrite_args: DendriteArguments, args: TrainingArguments) -> None:
    """Raise PerforatedError where a cycle or a schedule would never end."""
    mode = dendrite_args.switch_mode
    if mode not in ("history", "fixed"):
        raise PerforatedError(f"--switch_mode {mode}: use history or fixed")
    if args.max_steps > 0 or args.num_train_epochs < _ENDLESS_EPOCHS:
        return
    epochs, instead = f"--num_train_epochs {args.num_train_epochs:,.0f}", "--num_train_epochs 3, say, or --max_steps"
    if mode == "fixed":
        raise PerforatedError(f"--switch_mode fixed with {epochs}: one cycle would never end; set {instead}")
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if has_an_end(args):
        raise PerforatedError(
            f"--lr_scheduler_type {kind} with {epochs} would never decay: use constant or reduce_lr_on_plateau, or "
            f"--switch_mode fixed with {instead}, which gives each cycle a whole schedule"
        )
    if args.get_warmup_steps(10**9) > args.get_warmup_steps(10):
        raise PerforatedError(f"a warm-up that is a share of {epochs} would never end: give its --warmup_steps")


# Arguments that say where a run writes, how it reports or what is done next to the training, not what it computes.
_HARMLESS = set(
    "output_dir resume_from_checkpoint overwrite_run save_name save_strategy save_steps save_total_limit "
    "save_on_each_node restore_callback_states_from_checkpoint load_best_model_at_end logging_dir logging_strategy "
    "logging_steps logging_first_step log_level log_level_replica log_on_each_node report_to run_name project "
    "trackio_space_id "
    "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision disable_tqdm "
    "do_train do_eval do_predict dataloader_pin_memory dataloader_persistent_workers include_num_input_tokens_seen "
    "skip_memory_metrics ddp_timeout logging_nan_inf_filter".split()
)


def compared_settings(dendrite_args: DendriteArguments, training_args: TrainingArguments) -> dict:
    """The settings that a resumed run should share with the run that it continues, as JSON has them."""
    own = vars(dendrite_args) | {"dendrite_activation": dendrite_args.activation}
    settings = training_args.to_dict() | own | {"world_size": training_args.world_size}
    settings = {name: value for name, value in settings.items() if name not in _HARMLESS}
    if dendrite_args.switch_mode != "fixed" and not has_an_end(training_args):  # then these only say when to stop
        del settings["max_steps"], settings["num_train_epochs"]
    return json.loads(json.dumps(settings, default=str))
