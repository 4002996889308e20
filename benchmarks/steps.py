"""Networks with random weights, dendrites from this package, perforatedai or LoRA of peft, and timing of steps."""

import contextlib
import io
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from perforated_trainer import DendriteArguments, perforate  # noqa: E402
from perforated_trainer.convert import dimension_of_neurons, plan_dendrites  # noqa: E402
from perforated_trainer.growth import Growth  # noqa: E402
from perforated_trainer.pai import GPA, UPA  # noqa: E402
from perforated_trainer.report import peak_memory  # noqa: E402

NETWORKS = "MNIST", "BERT", "ResNet"
PACKAGE, LIBRARY, LORA = "perforated_trainer", "perforatedai", "LoRA of peft"


def build(name: str, batch_size: int, small: bool = False) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a network with random weights.

    Args:
        name (`str`): One of `NETWORKS`.
        batch_size (`int`): Examples in the batch.
        small (`bool`): Build BERT and ResNet with few layers and neurons.

    Returns:
        `tuple`: The network, and a batch for it.
    """
    labels = torch.arange(batch_size) % 2
    if name == "MNIST":
        from mnist_huggingface_perforatedai import MnistCnnConfig, MnistCnnForImageClassification

        model = MnistCnnForImageClassification(MnistCnnConfig())
        return model, {"pixel_values": torch.randn(batch_size, 1, 28, 28), "labels": labels}
    if name == "BERT":
        hidden, depth = (32, 1) if small else (256, 4)
        config = BertConfig(
            vocab_size=1000,
            max_position_embeddings=64,
            hidden_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=4 * hidden,
        )
        return BertForSequenceClassification(config), {
            "input_ids": torch.randint(1000, (batch_size, 64)),
            "labels": labels,
        }
    widths = [16, 32] if small else [64, 128, 256]
    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=widths, depths=[1] * len(widths), layer_type="basic", num_labels=2
    )
    return ResNetForImageClassification(config), {
        "pixel_values": torch.randn(batch_size, 3, 32, 32),
        "labels": labels,
    }


def training_arguments(device: str) -> TrainingArguments:
    return TrainingArguments("run", use_cpu=device == "cpu", eval_strategy="steps", metric_for_best_model="loss")


class Dendrites:
    """A network that gets dendrites in one of three ways, in place. A process can hold one with `LIBRARY` at a time.

    Args:
        model (`nn.Module`): The network, on its device.
        batch (`dict`): A batch for it, on the same device.
        way (`str`): `PACKAGE`, `LIBRARY` or `LORA`.
        rank (`int`, *optional*): Rank of the dendrites or of LoRA; all weights but those of the classifier are frozen.
    """

    def __init__(self, model: nn.Module, batch: dict, way: str, rank: int | None = None):
        self.model, self.batch, self._way = model, batch, way
        self._args = DendriteArguments(max_dendrites=10, switch_mode="fixed", dendrite_rank=rank)
        if rank:
            self._args.freeze_base, self._args.modules_to_train = True, ["classifier"]
        training = training_arguments(next(model.parameters()).device.type)
        plan = plan_dendrites(model, self._args, training)
        if way == PACKAGE:
            perforate(model, self._args, training)
            self._growth = Growth(model, self._args, plan, "eval_loss", False)
        elif way == LORA:
            import peft

            names = [name for name in plan.names if not name.startswith("classifier")]
            config = peft.LoraConfig(r=rank, target_modules=names, modules_to_save=["classifier"])
            self.model = peft.get_peft_model(model, config)
        else:
            self._convert(plan.names)
        self._added = 0

    def _convert(self, names: list[str]) -> None:
        """Convert the network with perforatedai as in its documentation."""
        dimensions, handles = {}, []
        for name in names:
            module = self.model.get_submodule(name)

            def note(module, inputs, output, name=name):
                dimensions[f".{name}"] = [-1] * output.ndim
                dimensions[f".{name}"][dimension_of_neurons(module, output.ndim)] = 0

            handles.append(module.register_forward_hook(note))
        with torch.no_grad():
            self.model(**self.batch)
        for handle in handles:
            handle.remove()
        GPA.pc = type(GPA.pc)()
        for name in "configuration_confirmed unwrapped_modules_confirmed weight_decay_accepted silent".split():
            getattr(GPA.pc, f"set_{name}")(True)  # never prompt on standard input
        device = next(self.model.parameters()).device
        GPA.pc.set_testing_dendrite_capacity(False)
        GPA.pc.set_max_dendrites(10)
        GPA.pc.set_use_cuda(device.type == "cuda")
        GPA.pc.set_device(device)
        GPA.pc.set_module_names_to_perforate([])
        GPA.pc.set_module_ids_to_perforate(list(dimensions))
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = UPA.perforate_model(
                self.model, doing_pai=True, save_name="perforatedai", making_graphs=False, maximizing_score=True
            )
        for module in UPA.get_pai_modules(self.model, 0):
            module.set_this_output_dimensions(dimensions[module.name])

    def add(self) -> None:
        """Add one dendrite to each layer."""
        self._added += 1
        if self._way == PACKAGE:
            self._growth.unused.clear()  # each layer is used in each step
            self._growth.add_score(1 / self._added, step=self._added, end_of_cycle=True)
        elif self._way == LIBRARY:
            self.model.train()
            self.model(**self.batch).loss.backward()  # perforatedai reads the output shapes from a gradient
            GPA.pai_tracker.set_optimizer_instance(torch.optim.AdamW(self.model.parameters()))
            with contextlib.redirect_stdout(io.StringIO()):
                GPA.pai_tracker.add_validation_score(self._added / 10, self.model, force_switch=True)


def time_steps(
    model: nn.Module,
    batch: dict,
    steps: int,
    autocast: torch.dtype | None = None,
    compiler: str | None = None,
    at_least: float = 0.0,
) -> tuple[float, float]:
    """Train on one batch and time the steps.

    Args:
        model (`nn.Module`): The network.
        batch (`dict`): A batch for it, on the same device.
        steps (`int`): Number of steps that are timed together, after two warm-up steps.
        autocast (`torch.dtype`, *optional*): Data type of mixed precision.
        compiler (`str`, *optional*): Backend of `torch.compile`; not compiled by default.
        at_least (`float`): Seconds for which `steps` steps are timed again and again. The median counts.

    Returns:
        `tuple[float, float]`: Steps per second, and peak memory in MiB (on the CPU: of the process so far).
    """
    device = next(model.parameters()).device.type
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    scaler = torch.amp.GradScaler(device, enabled=autocast is torch.float16)
    model.train()
    forward = torch.compile(model, backend=compiler) if compiler else model
    times = []
    for step in itertools.count(-2):
        if step >= 0 and step % steps == 0:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            if step and times[-1] - times[0] >= at_least:
                break
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = forward(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    if not math.isfinite(loss.item()):
        raise ArithmeticError("the loss is not finite")
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float(peak_memory().split()[0].replace(",", ""))
    return steps / seconds, peak
