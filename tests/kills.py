"""Kill real runs of the script at seeded random times, resume them, and compare with a run that was never killed.

    python tests/kills.py --kills 50

Prints one line a kill and ends with status 1 where a resumed run ends with other results or other weights.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "mnist_huggingface_perforatedai.py"
# Small, but with at least two restructures: an evaluation takes about as long as the steps between two.
FLAGS = "--max_train_samples 1000 --max_eval_samples 200 --eval_steps 20 --save_steps 30 --logging_steps 20".split()
FLAGS += "--per_device_train_batch_size 32 --n_epochs_to_switch 3 --max_dendrites 2 --save_name run".split()


def start(folder: Path, *flags: str) -> subprocess.Popen:
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, SCRIPT, *FLAGS, *flags], cwd=folder, stdout=log, stderr=log)


def outcome(folder: Path) -> tuple[dict, bytes]:
    """The results but for times and the command, and the bytes of the final weights."""
    results = json.loads((folder / "run" / "results.json").read_text())
    for key in ("train_seconds", "steps_per_second", "command"):
        del results[key]
    return results, (folder / "run" / "final" / "model.safetensors").read_bytes()


def run_to_end(folder: Path, *flags: str) -> float:
    """Run until it ends by itself; returns the seconds that it took. Raises where it fails."""
    began = time.monotonic()
    if status := start(folder, *flags).wait():
        raise RuntimeError(f"exit status {status}: {(folder / 'log.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def kill_and_resume(folder: Path, seconds: list[float], *flags: str) -> None:
    """Kill the run after each of `seconds`, resuming in between, then let it end."""
    resume = []
    for delay in seconds:
        process = start(folder, *flags, *resume)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        resume = ["--resume_from_checkpoint", "true"]
    run_to_end(folder, *flags, *resume)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        whole.mkdir()
        seconds = run_to_end(whole, *flags)
        expected = outcome(whole)
        dendrites = [cycle["dendrites"] for cycle in expected[0]["cycles"]]
        print(f"uninterrupted: {seconds:.1f} s, {expected[0]['global_step']} steps, dendrites {dendrites}", flush=True)
        times, same = [], 0
        for number in range(args.kills):
            folder = Path(root, f"kill-{number}")
            folder.mkdir()
            times.append(generator.uniform(0.2, 1.0) * seconds)
            kill_and_resume(folder, times[-1:], *flags)
            equal = outcome(folder) == expected
            same += equal
            print(f"killed after {times[-1]:5.1f} s: {'identical' if equal else 'DIFFERENT'}", flush=True)
    spread = f"{min(times):.1f} to {max(times):.1f} s, median {statistics.median(times):.1f} s"
    print(f"{same} of {args.kills} identical; killed after {spread} of {seconds:.1f} s")
    return int(same != args.kills)


if __name__ == "__main__":
    sys.exit(main())
