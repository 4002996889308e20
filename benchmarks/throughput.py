"""Training speed beside the usual ways, and what evaluations, restructures, the start and memory cost.

    python benchmarks/throughput.py --data_dir mnist

Four ways to train the same network with dendrites, with the same batch size, optimizer and clipping, in turn:
the script's path, the stock Trainer with torchvision's transform per image, the stock Trainer over tensors, and a bare
PyTorch loop over them, the limit. On the CPU, seed 0. Prints Markdown tables with machine, versions and command.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CASES = ("script", "torchvision", "tensors", "bare loop")
IMPORTS = "import torch, perforatedai; from transformers import Trainer; import os; os._exit(0)"
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


def worker(args) -> dict:
    """One process, as the tracker is one per process: measure what `args.part` names."""
    import torch
    from perforatedai import globals_perforatedai as GPA
    from torchvision.transforms import v2
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed
    from transformers.utils import logging

    import mnist_huggingface_perforatedai as script
    from perforated_trainer import DendriteArguments, PerforatedTrainer, load_perforated_model, perforate

    class Done(Exception):
        """Ends a run after its last timed step, before an evaluation or a checkpoint."""

    class Clock(TrainerCallback):
        """Times `steps` steps after a warm-up."""

        def __init__(self, warm_up, steps):
            self.warm_up, self.steps = warm_up, steps

        def on_step_end(self, arguments, state, control, **kwargs):
            if state.global_step == self.warm_up:
                self.began = time.perf_counter()
            elif state.global_step == self.warm_up + self.steps:
                self.speed = self.steps / (time.perf_counter() - self.began)
                raise Done

    class Images(torch.utils.data.Dataset):
        """What torchvision's MNIST does for an item: an image from the array, then the transform."""

        transform = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.1307,), (0.3081,))]
        )

        def __init__(self, images, labels):
            self.images, self.labels = images, labels

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            from PIL import Image

            picture = Image.fromarray(self.images[index].numpy())
            return {"pixel_values": self.transform(picture), "labels": int(self.labels[index])}

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    set_seed(0)
    eval_steps = {"restructure": 10, "evaluation": max(1, args.evaluation_steps // 5)}  # 500 of 2,500 by default
    flags = script.TRAINING_DEFAULTS | {
        "output_dir": "run",
        "use_cpu": True,
        "eval_steps": eval_steps.get(args.part, 10**9),
        "save_steps": args.evaluation_steps,
        "save_strategy": "steps" if args.part == "evaluation" else "no",
        "remove_unused_columns": False,
        "dataloader_drop_last": args.part not in eval_steps,  # all timed batches of one size
        "disable_tqdm": True,
    }
    training = TrainingArguments(**flags)
    if args.case != "script":  # in the "memory" of the script's path only what that needs
        images, labels, *_ = script.read_idx(args.data_dir) if args.data_dir else script.read_embedded()
        per_image = Images(images, labels)
    if args.case != "torchvision":
        _, tensors, validation, test = script.load_data(script.DataArguments(data_dir=args.data_dir))
    config = script.MnistCnnConfig(widths=[args.width * width for width in (4, 8, 16)])
    model = script.MnistCnnForImageClassification(config)
    capacity = args.part == "restructure"
    dendrites = DendriteArguments(save_name="run", max_dendrites=10, testing_dendrite_capacity=capacity)
    model = perforate(model, dendrites, training)

    def run(trainer_class, callback, data, **kwargs):
        trainer = trainer_class(
            model=model,
            args=training,
            train_dataset=data,
            data_collator=default_data_collator if isinstance(data, Images) else lambda batch: batch,
            compute_metrics=script.compute_metrics,
            callbacks=[callback],
            **kwargs,
        )
        with contextlib.suppress(Done), contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return trainer

    def add_dendrite():
        """One more for each layer, as after an evaluation, through the tracker alone."""
        model(torch.rand(8, 1, 28, 28), torch.arange(8)).loss.backward()
        GPA.pai_tracker.set_optimizer_instance(torch.optim.AdamW(model.parameters()))
        score = GPA.pai_tracker.member_vars["num_dendrites_added"] / 100 + 0.1  # each a better one
        with contextlib.redirect_stdout(sys.stderr):
            GPA.pai_tracker.add_validation_score(score, model, force_switch=True)

    if args.part == "speed":
        pixel_values, labels = tensors[:].values()  # floats

    def bare_loop(batch_size, warm_up, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, fused=True)
        parameters, done = list(model.parameters()), 0
        model.train()
        while True:
            for index in torch.randperm(len(tensors)).split(batch_size)[: len(tensors) // batch_size]:
                if done == warm_up:
                    began = time.perf_counter()
                model(pixel_values.index_select(0, index), labels.index_select(0, index)).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == warm_up + steps:
                    return steps / (time.perf_counter() - began)

    def speed(case, batch_size=64):
        """Steps a second of one run."""
        steps = args.steps if batch_size == 64 else max(4, args.steps // 4)
        warm_up = max(2, steps // 10)
        if case == "bare loop":
            return bare_loop(batch_size, warm_up, steps)
        training.per_device_train_batch_size = batch_size
        data = per_image if case == "torchvision" else tensors
        clock = Clock(warm_up, steps)
        few = torch.utils.data.Subset(data, range(10))  # PerforatedTrainer wants an eval_dataset
        run(PerforatedTrainer if case == "script" else Trainer, clock, data, eval_dataset=few)
        return clock.speed

    def current():
        """A trainer of the network as it is now: it counts and writes what is deployed."""
        return PerforatedTrainer(model=model, args=training, eval_dataset=validation)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB; Linux counts in KiB

    def grow(last):
        """The network with each number of dendrites up to the last."""
        yield 0
        for count in range(1, last + 1):
            add_dendrite()
            yield count

    if args.part == "memory":
        speed(args.case)
        return {"peak": peak()}
    if args.part == "growth":
        points = []
        for _ in grow(args.dendrites):
            rates = [speed("script") for _ in range(args.repeats)]
            points.append([current().parameters(), 1000 / statistics.median(rates), round(peak())])
        return {"points": points}
    if args.part == "speed":
        steps, logits = [], []
        for dendrites in grow(3):
            if dendrites not in (0, 3):
                continue
            for batch_size in (64, 512):
                turns = []
                for turn in range(args.repeats):  # another case first in each
                    order = CASES[turn % 4 :] + CASES[: turn % 4]
                    speeds = {case: speed(case, batch_size) for case in order}
                    turns.append([speeds[case] for case in CASES])
                medians = [statistics.median(column) for column in zip(*turns, strict=True)]
                ratios = [statistics.median(turn[0] / turn[case] for turn in turns) for case in (1, 2, 3)]
                steps.append([dendrites, batch_size, *medians, *ratios])
            current().save_model("final")
            models, turns = (model.eval(), load_perforated_model(type(model), "final")), []
            images = validation[:1000]["pixel_values"]
            for _ in range(6 * args.repeats + 1):  # short ones
                turns.append([])
                for network in models:
                    with torch.no_grad():
                        began = time.perf_counter()
                        count = sum(network(images).logits.numel() for _ in range(max(1, args.steps // 10)))
                        turns[-1].append(count / (time.perf_counter() - began))
            medians = [statistics.median(column) for column in zip(*turns[1:], strict=True)]  # the first warms up
            logits.append([dendrites, *medians, statistics.median(b / a for a, b in turns[1:])])
        return {"steps": steps, "logits": logits}

    class Timed(PerforatedTrainer):
        """Seconds in the forward passes of evaluations, apart from the tracker's work."""

        forward = 0.0

        def evaluation_loop(self, *arguments, **kwargs):
            began = time.perf_counter()
            output = super().evaluation_loop(*arguments, **kwargs)
            self.forward += time.perf_counter() - began
            return output

    class Pauses(TrainerCallback):
        """Time between steps at which the Trainer evaluated, and within all others."""

        def __init__(self):
            self.pauses = []

        def on_step_begin(self, arguments, state, control, **kwargs):
            if state.global_step == 0:
                self.began = time.perf_counter()
            elif state.global_step % arguments.eval_steps == 0:
                self.pauses.append(time.perf_counter() - self.ended)
            if args.part == "evaluation" and state.global_step == args.evaluation_steps:
                self.total = time.perf_counter() - self.began
                raise Done

        def on_step_end(self, arguments, state, control, **kwargs):
            self.ended = time.perf_counter()

    pauses = Pauses()
    trainer = run(Timed, pauses, tensors, eval_dataset=validation, test_dataset=test)
    if args.part == "restructure":
        return {"restructure": statistics.median(pauses.pauses)}
    trainer.draw()  # the first loads matplotlib
    began = time.perf_counter()
    trainer.draw()
    graph = time.perf_counter() - began
    return {"pauses": sum(pauses.pauses), "forward": trainer.forward, "total": pauses.total, "graph": graph}


def launch(command: list[str]) -> tuple[str, float]:
    """Standard output and seconds of a process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        run = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{shlex.join(command)[:200]} failed:\n{run.stderr[-2000:]}")
        return run.stdout, time.perf_counter() - began


def table(head: str, rows: list) -> None:
    columns = head.split(" | ")
    print("\n| " + head + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=os.path.abspath, help="folder of IDX files; else the embedded digits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=200, help="timed steps of a run at batch size 64; a quarter at 512"
    )
    parser.add_argument("--evaluation_steps", type=int, default=2500, help="steps to measure bookkeeping over")
    parser.add_argument("--max_dendrites", type=int, default=8, help="how far the growth is measured")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8], help="multiples of widths 4-8-16")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--dendrites", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(worker(args)))
        return
    import numpy

    def measure(part, **flags):
        flags = {"steps": args.steps, "repeats": args.repeats, "evaluation_steps": args.evaluation_steps} | flags
        command = [str(Path(__file__).resolve()), "--part", part]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command += ["--data_dir", args.data_dir] if args.data_dir else []
        return json.loads(launch(command)[0].splitlines()[-1])

    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "accelerate", "perforatedai"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, {versions}; ")
    print(f"seed 0; medians of {args.repeats}; `{shlex.join(['python', *sys.argv])}`")

    result = measure("speed")
    head = "dendrites | batch | script, steps/s | per image | tensors | bare loop | / per image | / tensors | / bare"
    table(head, result["steps"])
    table("dendrites | scaffolded, logits/s | final, logits/s | final / scaffolded", result["logits"])

    start = ["-c", START, "--save_name", "run", "--use_cpu"]
    start += ["--data_dir", args.data_dir] if args.data_dir else []
    times = [(launch(["-c", IMPORTS])[1], launch(start)[1]) for _ in range(args.repeats)]
    imports, first = (statistics.median(column) for column in zip(*times, strict=True))
    peaks = [[measure("memory", case=case)["peak"] for case in CASES[:2]] for _ in range(min(3, args.repeats))]
    ours, usual = (statistics.median(column) for column in zip(*peaks, strict=True))
    cost = measure("evaluation")
    training = cost["total"] - cost["pauses"]
    work = cost["pauses"] - cost["forward"]
    restructure, between = measure("restructure")["restructure"], 500 / result["steps"][0][2]
    table(
        "measure | value | beside | ratio",
        [
            ["launch to first step (s), beside the imports", first, imports, first / imports],
            ["peak memory (MiB), beside torchvision's", ours, usual, ours / usual],
            ["evaluations' bookkeeping (s), beside training", work, training, work / training],
            ["a graph (s), beside the 60 s between two", cost["graph"], 60.0, cost["graph"] / 60],
            ["evaluations' forward passes (s), beside training", cost["forward"], training, cost["forward"] / training],
            ["a restructure, last step to next (s), beside 500 steps", restructure, between, restructure / between],
        ],
    )
    points = measure("growth", dendrites=args.max_dendrites)["points"]
    table("dendrites | parameters | ms a step | peak memory (MiB)", [[n, *point] for n, point in enumerate(points)])
    slope, constant = numpy.polyfit(range(len(points)), [point[1] for point in points], 1)
    print(f"\nfitted: {constant:.3g} ms and {slope:.3g} ms a dendrite")
    widths = [1, *args.widths]
    points = [points[0]] + [measure("growth", width=width)["points"][0] for width in args.widths]
    table("width | parameters | ms a step | peak memory (MiB)", [[w, *p] for w, p in zip(widths, points, strict=True)])
    power = numpy.polyfit(numpy.log(widths), numpy.log([point[1] for point in points]), 1)[0]
    print(f"\nfitted: ms a step grow with the width to the power {power:.2f}")


if __name__ == "__main__":
    main()
