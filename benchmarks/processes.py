"""Steps and samples per second with one and with two processes, and the duration of a dendrite addition.

    python benchmarks/processes.py --widths 32 64 256 --batch_size 256

Both train the same network with dendrites on the same total batch size, on the CPU (gloo) with one thread per process;
the runs alternate. Prints a Markdown table with machine and versions.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def worker(args) -> None:
    """One run: four cycles of `args.steps` steps, with a dendrite addition after each of the first three."""
    import torch
    from transformers import TrainerCallback, TrainingArguments, set_seed

    import mnist_huggingface_perforatedai as script
    from perforated_trainer import DendriteArguments, PerforatedTrainer, perforate

    class Clock(TrainerCallback):
        """Times of the steps between evaluations, and from the last step of a cycle to the first of the next."""

        def __init__(self):
            self.cycles, self.additions, self.last = [], [], None

        def on_step_begin(self, arguments, state, control, **kwargs):
            if state.global_step % args.steps == 0 and self.last:
                self.additions.append(time.perf_counter() - self.last)
            if state.global_step % args.steps == 5:  # the first steps of a cycle allocate
                self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, **kwargs):
            self.last = time.perf_counter()
            if state.global_step % args.steps == 0:
                self.cycles.append((args.steps - 5) / (self.last - self.began))

    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    training = TrainingArguments(
        output_dir="run",
        use_cpu=True,
        per_device_train_batch_size=args.batch_size // processes,
        per_device_eval_batch_size=100,
        eval_strategy="steps",
        eval_steps=args.steps,
        save_strategy="no",
        metric_for_best_model="accuracy",
        remove_unused_columns=False,
        disable_tqdm=True,
        num_train_epochs=1000,
        report_to="none",
    )
    set_seed(0)
    _, train, validation, _ = script.load_data(script.DataArguments(max_eval_samples=100))
    model = script.MnistCnnForImageClassification(script.MnistCnnConfig(widths=args.widths))
    model = perforate(model, DendriteArguments(testing_dendrite_capacity=True), training)
    clock = Clock()
    trainer = PerforatedTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=lambda batch: batch,
        compute_metrics=script.compute_metrics,
        callbacks=[clock],
    )
    trainer.train()
    if training.process_index == 0:
        result = {"steps_per_second": clock.cycles, "addition_seconds": statistics.median(clock.additions)}
        Path("result.json").write_text(json.dumps(result | {"parameters": trainer.num_parameters}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure(processes: int, flags: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command += [str(Path(__file__).resolve()), "--worker", *flags]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        return json.loads(Path(folder, "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs=3, default=[32, 64, 256], help="widths of the three hidden layers")
    parser.add_argument("--batch_size", type=int, default=256, help="images per step, over all processes")
    parser.add_argument("--steps", type=int, default=40, help="steps per cycle")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    flags = ["--widths", *map(str, args.widths), "--batch_size", str(args.batch_size), "--steps", str(args.steps)]
    runs = {1: [], 2: []}
    for _ in range(args.repeats):
        for processes, results in runs.items():
            results.append(measure(processes, flags))
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "perforatedai"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread per process, {versions};")
    print(f"medians of {args.repeats}; widths {args.widths}, {runs[1][0]['parameters']:,} parameters at the end;")
    print(f"{args.batch_size} images per step\n")
    print("| dendrites | steps/s, one process | steps/s, two | images/s, two | efficiency |")
    print("| --- | --- | --- | --- | --- |")
    for dendrites in (0, 3):
        one, two = (statistics.median(run["steps_per_second"][dendrites] for run in runs[n]) for n in (1, 2))
        print(f"| {dendrites} | {one:.2f} | {two:.2f} | {two * args.batch_size:.0f} | {two / one / 2:.0%} |")
    one, two = (statistics.median(run["addition_seconds"] for run in runs[n]) for n in (1, 2))
    print(f"\ndendrite addition, from the last step to the next: {one:.1f} s with one process, {two:.1f} s with two")


if __name__ == "__main__":
    main()
