"""The settings of dendrites, what TrainingArguments cannot be with them, and the one type of error."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

# Arguments of the Trainer that dendrites change the meaning of, and what to use instead.
REFUSED = {
    "load_best_model_at_end": "the tracker itself returns the best model at the end",
    "fsdp": "use DistributedDataParallel instead: torchrun --nproc_per_node N",
    "deepspeed": "use DistributedDataParallel instead: torchrun --nproc_per_node N",
    "save_only_model": "a checkpoint without the optimizer could not go on exactly; use the model in `final/`",
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
    """Settings of Perforated AI's dendrites. One "epoch" of the tracker is one evaluation."""

    save_name: str | None = HfArg(
        default=None, help="Name of the run, and of its folder where --output_dir is not given."
    )
    doing_pai: bool = HfArg(default=True, help="Add dendrites. False: same network, same stopping rule, none added.")
    testing_dendrite_capacity: bool = HfArg(
        default=False, help="Add three dendrites at once to test memory: no real run."
    )
    switch_mode: str = HfArg(
        default="history",
        help="What ends a cycle. history: a plateau of the score. fixed: each cycle is one training of "
        "num_train_epochs or max_steps, with the whole schedule; training ends where a dendrite does not help.",
    )
    dendrite_learning_rate_factor: float = HfArg(
        default=1.0, help="The learning rate is multiplied by this in cycles with dendrites; 0.25 is often advised."
    )
    max_dendrites: int = HfArg(default=5, help="Stop after this many dendrites at the latest.")
    n_epochs_to_switch: int = HfArg(default=10, help="Evaluations without a better score before a dendrite is added.")
    history_lookback: int = HfArg(default=1, help="Scores are averaged over this many evaluations.")
    improvement_threshold: list[float] = HfArg(
        default_factory=lambda: [0.0001],
        help="Relative gain that counts as a better score; several values: one for each further try.",
    )
    improvement_threshold_raw: float = HfArg(default=1e-5, help="Absolute gain that a better score needs as well.")
    max_dendrite_tries: int = HfArg(default=2, help="Tries of a dendrite that does not help, before training ends.")
    dendrite_activation: str = HfArg(default="sigmoid", help="Activation of the dendrites: sigmoid, tanh, relu, ...")
    dendrite_init_scale: float = HfArg(default=0.01, help="Standard deviation of the weights of a new dendrite.")
    max_parameters: int | None = HfArg(
        default=None, help="Add no dendrite that would give the model more parameters than this."
    )
    module_names_to_perforate: list[str] = HfArg(
        default_factory=lambda: list(LAYER_TYPES),
        help="Types of layers that get dendrites, but not where weights are tied, frozen or logits'; none: no type.",
    )
    module_ids_to_perforate: list[str] = HfArg(
        default_factory=list,
        help="Modules that get dendrites too, whatever their weights: names, ends of names (query), or regular "
        "expressions for whole names, which mean the layers of the usual types that they match.",
    )
    perforate_last_blocks: int | None = HfArg(
        default=None, help="Give dendrites to layers in the last N blocks only, and to module_ids_to_perforate."
    )
    module_names_to_track: list[str] = HfArg(
        default_factory=list, help="Types of modules that get no dendrites, nor does anything in them."
    )
    module_ids_to_track: list[str] = HfArg(
        default_factory=list,
        help="Modules that get no dendrites, nor does anything in them: names or patterns as above.",
    )
    join_normalization: bool = HfArg(
        default=False,
        help="A convolution and the normalization that follows it get dendrites as one block: before a normalization, "
        "a dendrite can lose its effect.",
    )
    output_dimensions: list[int] | None = HfArg(
        default=None, help="0 for the dimension of the neurons, -1 for others: -1 -1 0. Default: found layer by layer."
    )
    fused: bool = HfArg(
        default=True,
        help="Compute a layer and its dendrites as one product, if not too large. False: the library's own forward.",
    )
    control_of: str | None = HfArg(
        default=None, help="Folder of a run: train the same way without dendrites, and say what they gave."
    )
    overwrite_run: bool = HfArg(default=False, help="Replace the run that the folder already holds.")


def run_name(training_args: TrainingArguments) -> str:
    """The name of a run: the last part of its folder."""
    return Path(training_args.output_dir).resolve().name


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
        raise PerforatedError("--save_strategy best: the tracker keeps the best model; use steps, epoch or no")


def check_arguments(dendrite_args: DendriteArguments, args: TrainingArguments) -> None:
    """Raise PerforatedError for settings that cannot go with dendrites, or not on this machine."""
    refuse_arguments(vars(args))
    if dendrite_args.save_name not in (None, run_name(args)):
        raise PerforatedError(
            f"--save_name {dendrite_args.save_name!r} is not the last part of --output_dir {args.output_dir}: give one "
            "of the two, and a save name without a path separator"
        )
    _check_schedule(dendrite_args, args)
    for name, good in (("dendrite_learning_rate_factor", "above 0"), ("max_dendrite_tries", "1 or more")):
        if (value := getattr(dendrite_args, name)) <= 0:
            raise PerforatedError(f"--{name} {value}: it must be {good}")
    if not args.metric_for_best_model:
        raise PerforatedError("--metric_for_best_model is needed: it decides when a dendrite is added")
    if args.device.type == "xla":
        raise PerforatedError("TPUs are not supported; use DistributedDataParallel on GPUs or CPUs: torchrun")
    if args.fp16 and args.device.type == "cpu":
        raise PerforatedError("--fp16 needs a GPU and would be ignored; on the CPU use --bf16 --use_cpu")
    # Without a GPU the Trainer takes several processes for separate runs, which would race for one folder.
    if int(os.environ.get("WORLD_SIZE", "1")) > args.world_size:
        raise PerforatedError("several processes without a GPU: --use_cpu is needed, which trains them with gloo")


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


# Arguments that say where a run writes, how it reports or what is done beside the training, not what it computes.
_HARMLESS = set(
    "output_dir resume_from_checkpoint overwrite_run save_name save_strategy save_steps save_total_limit "
    "save_on_each_node restore_callback_states_from_checkpoint logging_dir logging_strategy logging_steps "
    "logging_first_step log_level log_level_replica log_on_each_node report_to run_name project trackio_space_id "
    "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision disable_tqdm "
    "do_train do_eval do_predict dataloader_pin_memory dataloader_persistent_workers include_num_input_tokens_seen "
    "skip_memory_metrics ddp_timeout logging_nan_inf_filter".split()
)


def compared_settings(dendrite_args: DendriteArguments, training_args: TrainingArguments) -> dict:
    """The settings that a resumed run should share with the run that it goes on with, as JSON has them."""
    settings = training_args.to_dict() | vars(dendrite_args) | {"world_size": training_args.world_size}
    settings = {name: value for name, value in settings.items() if name not in _HARMLESS}
    if dendrite_args.switch_mode != "fixed" and not has_an_end(training_args):  # then these only say when to stop
        del settings["max_steps"], settings["num_train_epochs"]
    return json.loads(json.dumps(settings, default=str))
