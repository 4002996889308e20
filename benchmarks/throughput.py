"""Training speed compared with the library's own forward and with bare loops; what the start and a whole run cost.

    python benchmarks/throughput.py

The same network, data, optimizer and clipping, without augmentation, in three ways, in turn:

    trainer    `PerforatedTrainer` with the script's settings
    bare loop  a PyTorch loop over the same layers, each computed with its dendrites as one product
    library    a PyTorch loop over the library's own layers, as its authors show it

The library keeps one tracker per process, so there are two processes, which take turns; ratios are those of
neighbouring runs. On the CPU, one thread, seed 0. Prints Markdown tables with machine, versions and command.
"""

import argparse
import contextlib
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
sys.path.insert(0, str(ROOT))
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
# Dendrites, batch: what the trainer should reach of the library's loop, or without dendrites of the bare loop.
TARGETS = {(0, 64): 0.85, (0, 512): 0.95, (3, 64): 1.5, (3, 512): 1.5, (5, 64): 1.6, (5, 512): 1.6}
WHOLE, START_UP = 0.8, 1.05
PARTS = {  # of a whole run: function, the end of its file's name, and what it does
    ("training_step", "transformers/trainer.py"): "forward and backward",
    ("augment", "mnist_huggingface_perforatedai.py"): "augmentation",
    ("step", "accelerate/optimizer.py"): "the optimizer",
    ("_clip_grad_norm", "transformers/trainer.py"): "clipping",
    ("get_batch_samples", "transformers/trainer.py"): "the loader",
    ("zero_grad", "torch/nn/modules/module.py"): "zero_grad",
    ("call_event", "transformers/trainer_callback.py"): "callbacks",
    ("evaluate", "perforated_trainer/trainer.py"): "evaluation of validation and test",
    ("_decide", "perforated_trainer/trainer.py"): "the tracker, restructures",
    ("_save_checkpoint", "perforated_trainer/trainer.py"): "checkpoints",
    ("_load_from_checkpoint", "perforated_trainer/trainer.py"): "loading at the start of a cycle",
    ("draw", "perforated_trainer/callbacks.py"): "pictures",
}
INSIDE = ("on_evaluate", "on_prediction_step")  # callers in an evaluation, which counts as a whole


# ------------------------------------------------------------------------------------------------- a process of its own


def worker(ours: bool, data_dir: str | None) -> None:
    """Answer each line of standard input, {"dendrites":, "case":, "batch":, "steps":}, with steps a second."""
    import torch
    from transformers import TrainerCallback, TrainingArguments, set_seed
    from transformers.utils import logging

    import mnist_huggingface_perforatedai as script

    class Done(Exception):
        """Ends a run after its last timed step."""

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            if state.global_step == warm_up:
                self.began = time.perf_counter()
            elif state.global_step == warm_up + steps:
                self.speed = steps / (time.perf_counter() - self.began)
                raise Done

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    set_seed(0)
    flags = script.TRAINING_DEFAULTS | {"eval_steps": 10**9, "save_strategy": "no", "dataloader_drop_last": True}
    training = TrainingArguments("run", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **flags)
    _, data, *_ = script.load_data(script.DataArguments(data_dir=data_dir))
    pixel_values, labels = data[:].values()  # floats, as a loop by hand would have them
    model = script.MnistCnnForImageClassification(script.MnistCnnConfig())
    if ours:
        from perforated_trainer import DendriteArguments, PerforatedTrainer, perforate
        from perforated_trainer.scaffold import GPA

        model = perforate(model, DendriteArguments(max_dendrites=10, overwrite_run=True), training)
        tracker = PerforatedTrainer(model=model, args=training, eval_dataset=data).tracker
        tracker.folder = Path.cwd()
    else:
        from perforatedai import globals_perforatedai as GPA
        from perforatedai import modules_perforatedai as MPA
        from perforatedai import utils_perforatedai as UPA

        from perforated_trainer import scaffold

        # The script has imported our trainer: put back what the library has there itself.
        MPA.PAINeuronModule.forward = scaffold._librarys_forward
        MPA.filter_backward = scaffold._librarys_filter_backward

        for setting in "configuration_confirmed unwrapped_modules_confirmed weight_decay_accepted silent".split():
            getattr(GPA.pc, f"set_{setting}")(True)
        GPA.pc.set_testing_dendrite_capacity(False)
        GPA.pc.set_max_dendrites(10)
        with contextlib.redirect_stdout(sys.stderr):
            model = UPA.perforate_model(
                model, doing_pai=True, save_name="run", making_graphs=False, maximizing_score=True
            )
            for module in UPA.get_pai_modules(model, 0):
                if isinstance(module.main_module, torch.nn.Conv2d):
                    module.set_this_output_dimensions([-1, 0, -1, -1])

    def add_dendrite():
        model.train()
        model(pixel_values[:8], labels[:8]).loss.backward()
        GPA.pai_tracker.set_optimizer_instance(torch.optim.AdamW(model.parameters()))
        score = GPA.pai_tracker.member_vars["num_dendrites_added"] / 100 + 0.1  # each a better one
        with contextlib.redirect_stdout(sys.stderr), tracker._open() if ours else contextlib.nullcontext():
            GPA.pai_tracker.add_validation_score(score, model, force_switch=True)

    def loop(batch, augmented):
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, fused=True)
        parameters, done = list(model.parameters()), 0
        model.train()
        while True:
            for index in torch.randperm(len(data)).split(batch)[: len(data) // batch]:
                if done == warm_up:
                    began = time.perf_counter()
                images = pixel_values.index_select(0, index)
                images = script.augment(images) if augmented else images
                model(images, labels.index_select(0, index)).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == warm_up + steps:
                    return steps / (time.perf_counter() - began)

    for line in sys.stdin:
        task = json.loads(line)
        steps, warm_up = task["steps"], max(2, task["steps"] // 10)
        while GPA.pai_tracker.member_vars["num_dendrites_added"] < task["dendrites"]:
            add_dendrite()
        if task["case"] == "trainer":
            training.per_device_train_batch_size, clock = task["batch"], Clock()
            trainer = PerforatedTrainer(
                model=model,
                args=training,
                train_dataset=data,
                eval_dataset=torch.utils.data.Subset(data, range(10)),
                data_collator=lambda rows: rows,
                compute_metrics=script.compute_metrics,
                callbacks=[clock],
            )
            with contextlib.suppress(Done), contextlib.redirect_stdout(sys.stderr):
                trainer.train()
            speed = clock.speed
        else:
            speed = loop(task["batch"], task["case"] == "augmented loop")
        print(json.dumps(speed), flush=True)


# --------------------------------------------------------------------------------------------------------- measurements


def start(command: list[str], **kwargs) -> subprocess.Popen:
    """Start Python in an empty folder of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    folder = tempfile.TemporaryDirectory()
    process = subprocess.Popen([sys.executable, *command], cwd=folder.name, env=environment, text=True, **kwargs)
    process.folder = folder  # it goes with the process
    return process


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    error = process.communicate()[1]
    if process.returncode:
        sys.exit(f"{shlex.join(command)[:200]} failed:\n{error[-2000:]}")
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
    parser.add_argument("--worker", choices=["ours", "library"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker == "ours", args.data_dir)
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "accelerate", "perforatedai"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, {versions};")
    print(f"seed 0; medians of {args.repeats}; `{shlex.join(['python', *sys.argv])}`")
    data = ["--data_dir", args.data_dir] if args.data_dir else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    workers = {name: start([__file__, "--worker", name, *data], **pipes) for name in ("ours", "library")}

    def speed(case, dendrites, batch):
        process = workers["library" if case == "library" else "ours"]
        steps = args.steps if batch < 512 else max(4, args.steps // 3)
        print(json.dumps({"case": case, "dendrites": dendrites, "batch": batch, "steps": steps}), file=process.stdin)
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    cases, rows, augmented = ["trainer", "bare loop", "library"], [], []
    for dendrites in args.dendrites:
        for batch in (64, 512):
            turns = []
            for turn in range(args.repeats):  # another case first in each
                order = cases[turn % 3 :] + cases[: turn % 3]
                measured = {case: speed(case, dendrites, batch) for case in order}
                turns.append([measured[case] for case in cases])
            medians = [statistics.median(column) for column in zip(*turns, strict=True)]
            bare, library = (statistics.median(turn[0] / turn[case] for turn in turns) for case in (1, 2))
            target = TARGETS.get((dendrites, batch))
            told = judged(library if dendrites else bare, target) if target else ""
            rows.append([dendrites, batch, *medians, bare, library, told])
    head = "dendrites | batch | trainer, steps/s | bare loop | library | / bare loop | / library | target"
    table(head, rows)
    for process in workers.values():
        process.stdin.close()
        process.wait()

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
    workers["ours"] = start([__file__, "--worker", "ours", *data], **pipes)
    batch, steps = run["settings"]["per_device_train_batch_size"], [*run["restarts"], run["global_step"]]
    needed, before = 0.0, 0
    for dendrites, last in enumerate(steps):  # a dendrite that is tried anew costs as much as one more
        augmented = [speed("augmented loop", min(dendrites, run["cycles"][-1]["dendrites"]), batch) for _ in range(3)]
        needed, before = needed + (last - before) / statistics.median(augmented), last
    workers["ours"].stdin.close()
    workers["ours"].wait()
    whole = needed / run["train_seconds"]
    words = f"a whole run of {run['global_step']:,} steps (s), its steps in the bare loop, with augmentation"
    rows.append([words, run["train_seconds"], needed, whole, judged(whole, WHOLE)])
    table("measure | value | compared with | ratio | target", rows)
    table("a whole run under cProfile, which slows Python's own part down | share of the training, %", profile)


if __name__ == "__main__":
    main()
