"""What a dendrite costs in larger networks: steps a second and peak memory, ours and the library's.

    python benchmarks/scale.py

A BERT (4 layers, hidden size 256, sequences of 64) and a ResNet (basic blocks, widths 64 to 256, images of 32x32) with
random weights and data, no Trainer. Each network has a process of its own for each of the two ways, in which dendrites
are added one by one: layers computed as one product, and the library's own layers. On the CPU by default. Prints a
Markdown table with machine, versions and command. On a GPU, for example:

    python benchmarks/scale.py --device cuda --batch 64 --steps 100 --autocast bfloat16
    python benchmarks/scale.py --device cuda --batch 64 --steps 100 --compile
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def build(name: str, device: str, size: int):
    """A network with random weights and a batch for it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

    labels = torch.arange(size) % 2
    if name == "BERT":
        sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        model = BertForSequenceClassification(BertConfig(vocab_size=1000, max_position_embeddings=64, **sizes))
        batch = {"input_ids": torch.randint(1000, (size, 64)), "labels": labels}
    else:
        config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256], depths=[1, 1, 1], layer_type="basic")
        config.num_labels = 2
        model = ResNetForImageClassification(config)
        batch = {"pixel_values": torch.randn(size, 3, 32, 32), "labels": labels}
    return model, {key: value.to(device) for key, value in batch.items()}


def worker(name: str, fused: bool, args) -> None:
    """Print, for each number of dendrites, steps a second and the peak memory so far in MiB."""
    import torch
    from transformers import TrainingArguments, set_seed
    from transformers.utils import logging

    from perforated_trainer import DendriteArguments, perforate, report, scaffold
    from perforated_trainer.scaffold import GPA, MPA
    from perforated_trainer.tracker import DendriteTracker

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    set_seed(0)
    model, batch = build(name, args.device, args.batch)
    dtype = getattr(torch, args.autocast or "float32")
    training = TrainingArguments(
        "run", use_cpu=args.device == "cpu", eval_strategy="steps", metric_for_best_model="loss"
    )
    model = perforate(model, DendriteArguments(max_dendrites=10), training)
    tracker = DendriteTracker.current
    tracker.folder = Path.cwd()

    def steps(number):
        optimizer = torch.optim.AdamW(model.parameters())
        tracker.set_optimizer(optimizer)
        model.train()
        forward = torch.compile(model) if args.compile and number > 1 else model
        scaler = torch.amp.GradScaler(args.device, enabled=dtype is torch.float16)
        for step in range(number + 2):
            if step == 2:
                began = time.perf_counter()
            with torch.autocast(args.device, dtype, enabled=args.autocast is not None):
                loss = forward(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return number / (time.perf_counter() - began)

    steps(1)  # the first one names the dimension of the neurons of each layer
    if not fused:  # as the library has it: its forward, and all of its scaffolding with memory of its own
        scaffold.open_layers(tracker._layers)
        for layer in tracker._layers:
            for template in layer.dendrite_module.parent_module.parameters():
                template.data = template.data.clone()
        MPA.PAINeuronModule.forward, MPA.filter_backward = (
            scaffold._librarys_forward,
            scaffold._librarys_filter_backward,
        )
    for dendrites in range(args.dendrites + 1):
        if dendrites:
            with tracker._open() if fused else contextlib.redirect_stdout(sys.stderr):
                GPA.pai_tracker.add_validation_score(1 - dendrites / 10, model, force_switch=True)
        speeds = [steps(args.steps) for _ in range(3)]
        peak = int(report.peak_memory().split()[0].replace(",", ""))
        print(json.dumps([dendrites, statistics.median(speeds), peak]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dendrites", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--autocast", choices=["bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], args.worker[1] == "fused", args)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, {args.device}, ", end="")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "perforatedai")), end="; ")
    print(f"`{shlex.join(['python', *sys.argv])}`\n")
    print("| network | dendrites | steps/s, one product | the library's | ratio | memory, MiB | the library's |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("BERT", "ResNet"):
        rows = {}
        for way in ("fused", "library"):
            flags = ["--worker", name, way]
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, *flags, *sys.argv[1:]]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            rows[way] = [json.loads(line) for line in done.stdout.splitlines()]
        for (dendrites, ours, memory), (_, theirs, their_memory) in zip(*rows.values(), strict=True):
            cells = [
                name,
                dendrites,
                f"{ours:.2f}",
                f"{theirs:.2f}",
                f"{ours / theirs:.2f}",
                f"{memory:,}",
                f"{their_memory:,}",
            ]
            print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
