"""Kill real runs of the script at seeded random times, resume them, and compare with a run that was never killed.

    python tests/kills.py --kills 50

Prints one line per kill. The exit status is 1 if a resumed run ends with different results or weights.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
# Small, but with at least two dendrite additions and several checkpoints in each cycle.
FLAGS = "--max_train_samples 500 --max_eval_samples 200 --eval_steps 5 --save_steps 7 --logging_steps 5".split()
FLAGS += "--per_device_train_batch_size 32 --n_epochs_to_switch 2 --max_dendrites 2 --save_name run".split()

# Each run is a process that is forked from a server which has only imported the script. This saves the ten seconds of
# imports that a new interpreter would take.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mnist_huggingface_perforatedai", "kills"])


def _redirect(log: str, streams: tuple = (1, 2)) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in streams:
        os.dup2(file, stream)


def _run(folder: Path, flags: list[str], before=None) -> None:
    os.chdir(folder)
    _redirect("log.txt")
    import mnist_huggingface_perforatedai

    if before:
        before()
    sys.argv = ["mnist_huggingface_perforatedai.py", *flags]
    sys.exit(mnist_huggingface_perforatedai.main())


def start(folder: Path, *flags: str, before=None) -> multiprocessing.Process:
    """Start the script in `folder`, with small settings and `flags`; its output goes to `log.txt` there."""
    process = processes.Process(target=_run, args=(folder, [*FLAGS, *flags], before))
    process.start()
    return process


def _in_fork(command, folder, environment, log, streams):
    """Run a script as a command line would, in a process that has imported the libraries already."""
    os.chdir(folder or ".")
    os.environ.update(environment)
    _redirect(log, streams)
    sys.argv = command[1:]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    runpy.run_path(command[1], run_name="__main__")


def forked(command, cwd=None, env=None, **kwargs):
    """As `subprocess.run` of a script, which would import the libraries for ten seconds. Only stdout is captured."""
    if command[0] != sys.executable:
        return subprocess.run(command, cwd=cwd, env=env, **kwargs)
    with tempfile.NamedTemporaryFile("r") as output:
        process = processes.Process(target=_in_fork, args=(command, cwd, dict(env or os.environ), output.name, (1,)))
        process.start()
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stdout=output.read(), stderr="see above")


def start_ranks(
    folder: Path, script: Path, *flags: str, number: int = 2, machines: bool = False
) -> list[multiprocessing.Process]:
    """Start a script in several processes that train together, with what torchrun tells each; output to log.txt.

    With `machines` each is on a machine of its own: in the folder of its rank, with its output in `<rank>.txt`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": number}
    everywhere["LOCAL_WORLD_SIZE"] = 1 if machines else number
    ranks = []
    for rank in range(number):
        own = {"RANK": rank, "LOCAL_RANK": 0 if machines else rank}
        environment = {name: str(value) for name, value in (everywhere | own).items()}
        command = [sys.executable, str(script), *flags]
        place = (folder / str(rank), environment, f"../{rank}.txt") if machines else (folder, environment, "log.txt")
        ranks.append(processes.Process(target=_in_fork, args=(command, *place, (1, 2))))
        ranks[-1].start()
    return ranks


def statuses(ranks: list[multiprocessing.Process], seconds: float = 120) -> list[int | None]:
    """Wait for processes, and return the exit status of each."""
    for rank in ranks:
        rank.join(seconds)
    return [rank.exitcode for rank in ranks]


def outcome(folder: Path, name: str = "run") -> tuple[dict, dict]:
    """The results without times and command, and the bytes of the files of the final model without its card."""
    results = json.loads((folder / name / "results.json").read_text())
    for key in ("train_seconds", "steps_per_second", "command"):
        del results[key]
    files = (path for path in sorted((folder / name / "final").iterdir()) if path.suffix in (".safetensors", ".json"))
    return results, {path.name: path.read_bytes() for path in files}


def run_to_end(folder: Path, *flags: str) -> float:
    """Run without a kill. Returns the duration in seconds; raises RuntimeError if the run fails."""
    began = time.monotonic()
    process = start(folder, *flags)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit status {process.exitcode}: {(folder / 'log.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def kill_and_resume(folder: Path, seconds: list[float], *flags: str) -> None:
    """Kill the run after each of `seconds`, resume it after each kill, then let it complete."""
    resume = []
    for delay in seconds:
        process = start(folder, *flags, *resume)
        process.join(delay)
        process.kill()
        process.join()
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
        run_to_end(Path(whole), "--max_steps", "10", "--save_name", "warm-up")  # the server's imports
        seconds = run_to_end(whole, *flags)
        expected = outcome(whole)
        dendrites = [cycle["dendrites"] for cycle in expected[0]["cycles"]]
        print(f"uninterrupted: {seconds:.1f} s, {expected[0]['global_step']} steps, dendrites {dendrites}", flush=True)
        times, same = [], 0
        for number in range(args.kills):
            folder = Path(root, f"kill-{number}")
            folder.mkdir()
            times.append(generator.uniform(0.0, 1.0) * seconds)
            kill_and_resume(folder, times[-1:], *flags)
            equal = outcome(folder) == expected
            same += equal
            print(f"killed after {times[-1]:5.1f} s: {'identical' if equal else 'DIFFERENT'}", flush=True)
    spread = f"{min(times):.1f} to {max(times):.1f} s, median {statistics.median(times):.1f} s"
    print(f"{same} of {args.kills} identical; killed after {spread} of {seconds:.1f} s")
    return int(same != args.kills)


if __name__ == "__main__":
    sys.exit(main())
