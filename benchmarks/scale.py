"""Cost of dendrites in larger networks: steps per second and peak memory, compared with perforatedai's layers.

    python benchmarks/scale.py

A BERT (4 layers, hidden size 256, sequences of 64) and a ResNet (basic blocks, widths 64 to 256, images of 32x32) with
random weights and data, without the Trainer. Each network runs in two processes, in which dendrites are added one by
one: one with the layers of this package, one with those of perforatedai and its tracker. Runs on the CPU with one
thread. Prints a Markdown table with machine, versions and command. For a GPU, use benchmarks/gpu.py.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version


def worker(name: str, way: str, args) -> None:
    """Print steps per second and peak memory so far in MiB for each number of dendrites."""
    import torch
    from steps import Dendrites, build, time_steps
    from transformers import set_seed

    torch.set_num_threads(1)
    set_seed(0)
    dendrites = Dendrites(*build(name, args.batch), way)
    for number in range(args.dendrites + 1):
        if number:
            dendrites.add()
        timed = [time_steps(dendrites.model, dendrites.batch, args.steps) for _ in range(3)]
        print(json.dumps([number, statistics.median(speed for speed, _ in timed), timed[-1][1]]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dendrites", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per measurement")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, ", end="")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "perforatedai")), end="; ")
    print(f"`{shlex.join(['python', *sys.argv])}`\n")
    print("| network | dendrites | steps/s | perforatedai | ratio | memory, MiB | perforatedai |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("BERT", "ResNet"):
        rows = []
        for way in ("perforated_trainer", "perforatedai"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, os.path.abspath(__file__), "--worker", name, way, *sys.argv[1:]]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            rows.append([json.loads(line) for line in done.stdout.splitlines()])
        for (dendrites, speed, memory), (_, other, other_memory) in zip(*rows, strict=True):
            cells = f"{speed:.2f}", f"{other:.2f}", f"{speed / other:.2f}", f"{memory:,.0f}", f"{other_memory:,.0f}"
            print(f"| {name} | {dendrites} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
