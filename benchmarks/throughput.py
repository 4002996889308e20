"""Training speed compared with the stock Trainer, a bare loop and perforatedai's own; the start and a whole run.

    python benchmarks/throughput.py

The same network, data, optimizer and clipping, without augmentation, in four ways, in turn:

    trainer        `PerforatedTrainer` with the script's settings
    stock Trainer  `transformers.Trainer` with the same settings, on the same network with its dendrites
    bare loop      a PyTorch loop over the same layers
    perforatedai   a PyTorch loop over perforatedai's own layers, as its authors show it

Ratios are medians of those of neighboring runs. On the CPU, one thread, seed 0. Prints Markdown tables with machine,
versions and command.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import pstats
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# `import perforatedai` alone imports next to nothing; its users import this module.
IMPORTS = """
import os, torch
from perforatedai import utils_perforatedai
from transformers import Trainer
os._exit(0)
"""
START = """
import os, sys
from transformers import TrainerCallback, trainer
class First(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        os._exit(0)
trainer.DEFAULT_CALLBACKS.append(First)
import mnist_huggingface_perforatedai
sys.exit(mnist_huggingface_perforatedai.main() or 1)
"""
# Dendrites, batch: what the trainer should reach of perforatedai's loop, or without dendrites of the bare loop.
TARGETS = {(0, 64): 0.87, (0, 512): 0.95, (3, 64): 1.5, (3, 512): 1.5, (5, 64): 1.6, (5, 512): 1.6}
WHOLE, START_UP = 0.85, 1.05
PARTS = {  # of a whole run: function, the end of its file's name, and what it does
    ("training_step", "transformers/trainer.py"): "forward and backward",
    ("augment", "mnist_huggingface_perforatedai.py"): "augmentation",
    ("step", "accelerate/optimizer.py"): "the optimizer",
    ("_clip_grad_norm", "transformers/trainer.py"): "clipping",
    ("get_batch_samples", "transformers/trainer.py"): "the loader",
    ("zero_grad", "torch/nn/modules/module.py"): "zero_grad",
    ("call_event", "transformers/trainer_callback.py"): "callbacks",
    ("evaluate", "perforated_trainer/trainer.py"): "evaluation of validation and test, plots",
    ("_decide", "perforated_trainer/trainer.py"): "decisions, dendrites, restarts",
    ("_save_checkpoint", "perforated_trainer/trainer.py"): "checkpoints",
    ("draw", "perforated_trainer/callbacks.py"): "plots at the end",
}
INSIDE = ("on_evaluate", "on_prediction_step")  # callers in an evaluation, which counts as a whole


# -------------------------------------------------------------------------------------------------- steps per second


class Done(Exception):
    """Ends a run after its last timed step."""


class Speed:
    """Steps per second of the script's network with a number of dendrites, in the current folder."""

    def __init__(self, dendrites: int, data_dir: str | None):
        import torch
        from steps import LIBRARY, Dendrites
        from transformers import TrainingArguments, set_seed
        from transformers.utils import logging

        import mnist_huggingface_perforatedai as script
        from perforated_trainer import DendriteArguments

        logging.set_verbosity_error()
        torch.set_num_threads(1)
        set_seed(0)
        flags = script.TRAINING_DEFAULTS | {"eval_steps": 10**9, "save_strategy": "no", "dataloader_drop_last": True}
        self.training = TrainingArguments("run", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **flags)
        _, self.data, *_ = script.load_data(script.DataArguments(data_dir=data_dir))
        self.rows = self.data[:]  # floats, as a loop by hand would have them
        self.augment, self.compute_metrics = script.augment, script.compute_metrics
        self.dendrites = DendriteArguments(
            num_initial_dendrites=dendrites, max_dendrites=10, overwrite_run=True, dendrite_init_scale=0.1
        )
        self.model = script.MnistCnnForImageClassification(script.MnistCnnConfig())
        self.trainer()  # makes the dendrites
        other = script.MnistCnnForImageClassification(script.MnistCnnConfig())
        self.library = Dendrites(other, {name: rows[:8] for name, rows in self.rows.items()}, LIBRARY)
        for _ in range(dendrites):
            self.library.add()

    def trainer(self, *callbacks, stock: bool = False):
        import torch
        from transformers import PrinterCallback, ProgressCallback, Trainer

        from perforated_trainer import PerforatedTrainer

        settings = {
            "model": self.model,
            "args": self.training,
            "train_dataset": self.data,
            "eval_dataset": torch.utils.data.Subset(self.data, range(10)),
            "data_collator": lambda rows: rows,
            "compute_metrics": self.compute_metrics,
            "callbacks": list(callbacks),
        }
        if not stock:
            return PerforatedTrainer(dendrite_args=self.dendrites, **settings)
        trainer = Trainer(**settings)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def measure(self, case: str, batch: int, steps: int) -> float:
        """Steps per second of one of the ways; "augmented loop" is the bare loop with the script's augmentation."""
        warm_up = max(2, steps // 10)
        if case in ("trainer", "stock Trainer"):
            return self._of_trainer(batch, warm_up, steps, stock=case != "trainer")
        return self._of_loop(self.library.model if case == "perforatedai" else self.model, case, batch, warm_up, steps)

    def _of_trainer(self, batch, warm_up, steps, stock):
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            def on_step_end(self, arguments, state, control, **kwargs):
                if state.global_step == warm_up:
                    self.began = time.perf_counter()
                elif state.global_step == warm_up + steps:
                    self.speed = steps / (time.perf_counter() - self.began)
                    raise Done

        self.training.per_device_train_batch_size, clock = batch, Clock()
        with contextlib.suppress(Done), contextlib.redirect_stdout(io.StringIO()):
            self.trainer(clock, stock=stock).train()
        return clock.speed

    def _of_loop(self, model, case, batch, warm_up, steps):
        import torch

        pixel_values, labels = self.rows.values()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.training.learning_rate, fused=True)
        parameters, done = list(model.parameters()), 0
        model.train()
        while True:
            for index in torch.randperm(len(labels)).split(batch)[: len(labels) // batch]:
                if done == warm_up:
                    began = time.perf_counter()
                images = pixel_values.index_select(0, index)
                images = self.augment(images) if case == "augmented loop" else images
                model(images, labels.index_select(0, index)).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == warm_up + steps:
                    return steps / (time.perf_counter() - began)


def compare_speeds(args) -> list:
    """The rows of the first table."""
    cases, rows = ["trainer", "stock Trainer", "bare loop", "perforatedai"], []
    for dendrites in args.dendrites:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            speed = Speed(dendrites, args.data_dir)
            for batch in (64, 512):
                turns, steps = [], args.steps if batch < 512 else max(4, args.steps // 3)
                for turn in range(args.repeats):  # another case first in each
                    order = cases[turn % 4 :] + cases[: turn % 4]
                    measured = {case: speed.measure(case, batch, steps) for case in order}
                    turns.append([measured[case] for case in cases])
                medians = [statistics.median(column) for column in zip(*turns, strict=True)]
                ratios = [statistics.median(turn[0] / turn[case] for turn in turns) for case in (1, 2, 3)]
                target = TARGETS.get((dendrites, batch))
                note = judged(ratios[2 if dendrites else 1], target) if target else ""
                rows.append([dendrites, batch, *medians, *ratios, note])
    return rows


def seconds_in_bare_loop(run: dict, args) -> float:
    """How long the steps of a run take in the bare loop with augmentation."""
    batch, needed, before = run["settings"]["per_device_train_batch_size"], 0.0, 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for dendrites, last in enumerate([*run["restarts"], run["global_step"]]):  # a second try costs as much
            speed = Speed(min(dendrites, run["cycles"][-1]["dendrites"]), args.data_dir)
            timed = [speed.measure("augmented loop", batch, args.steps) for _ in range(3)]
            needed, before = needed + (last - before) / statistics.median(timed), last
    return needed


# --------------------------------------------------------------------------------------------------------- measurements


def seconds(command: list[str]) -> float:
    """Run Python in an empty folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
        return time.perf_counter() - began


def table(head: str, rows: list) -> None:
    columns = head.split(" | ")
    print("\n| " + head + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def parts_of(profile: pstats.Stats) -> list:
    """What each part of a run takes of the training, %, the longest first; the rest is the Trainer's loop."""
    whole, shares = 0.0, {}
    for (file, _, function), (*_, cumulative, callers) in profile.stats.items():
        if function == "train" and file.endswith("perforated_trainer/trainer.py"):
            whole = cumulative
        for (name, path), words in PARTS.items():
            if function == name and file.endswith(path):
                shares[words] = cumulative - sum(c[3] for (*_, caller), c in callers.items() if caller in INSIDE)
    shares["the rest of the Trainer's loop"] = whole - sum(shares.values())
    return sorted(([words, 100 * share / whole] for words, share in shares.items()), key=lambda row: -row[1])


def judged(value: float, target: float, at_most: bool = False) -> str:
    met = value <= target if at_most else value >= target
    return f"{target} {'at most' if at_most else 'at least'}: {'met' if met else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=os.path.abspath, help="folder of IDX files; else the embedded digits")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150, help="timed steps of a run at batch 64; a third at 512")
    parser.add_argument("--dendrites", type=int, nargs="+", default=[0, 3, 5])
    parser.add_argument("--run_flags", default="", help="further flags of the whole run, to make it short")
    args = parser.parse_args()
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "accelerate", "perforatedai"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, {versions};")
    print(f"seed 0; medians of {args.repeats}; `{shlex.join(['python', *sys.argv])}`")
    data = ["--data_dir", args.data_dir] if args.data_dir else []
    table(
        "dendrites | batch | trainer, steps/s | stock Trainer | bare loop | perforatedai | / stock Trainer"
        " | / bare loop | / perforatedai | target",
        compare_speeds(args),
    )
    pairs = [(seconds(["-c", IMPORTS]), seconds(["-c", START, "--use_cpu", *data])) for _ in range(args.repeats)]
    imports, first = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    rows = [
        ["launch to first step (s), compared with the imports", first, imports, ratio, judged(ratio, START_UP, True)]
    ]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--seed", "0", "--use_cpu", "--output_dir", folder, *args.run_flags.split(), *data]
        script = str(ROOT / "mnist_huggingface_perforatedai.py")
        seconds([script, *flags])
        run = json.loads(Path(folder, "results.json").read_text())
        seconds(["-m", "cProfile", "-o", f"{folder}/profile", script, *flags, "--overwrite_run"])
        profile = parts_of(pstats.Stats(f"{folder}/profile"))
    needed = seconds_in_bare_loop(run, args)
    whole = needed / run["train_seconds"]
    words = f"a whole run of {run['global_step']:,} steps (s), its steps in the bare loop, with augmentation"
    rows.append([words, run["train_seconds"], needed, whole, judged(whole, WHOLE)])
    table("measure | value | compared with | ratio | target", rows)
    table("a whole run under cProfile, which slows Python's own part down | share of the training, %", profile)


if __name__ == "__main__":
    main()
