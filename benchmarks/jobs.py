"""Runs of a benchmark, each in a separate process and recorded as one line of JSON."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def run_apart(label: dict, job: dict, results: Path, script: str) -> None:
    """Run a job in a separate process and a temporary folder, and append its record to a file.

    Args:
        label (`dict`): Entries that are added to the record.
        job (`dict`): Arguments of the run.
        results (`Path`): JSON lines file of the records.
        script (`str`): Name of a script in this folder. It receives the job as `--job` and writes `record.json`.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name(script).resolve()), "--job", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{label} failed: {done.stderr[-2000:]}", file=sys.stderr)
            return
        record = label | json.loads(Path(folder, "record.json").read_text())
    # The commit that is checked out, with a + if files other than results differ from it.
    changed = git("status", "--porcelain", "--untracked-files=no", ":(top)", ":(top,exclude)benchmarks/results")
    record["commit"] = git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    with open(results, "a") as file:  # one write of one line
        file.write(json.dumps(record) + "\n")
    print(f"{label}, seed {record['seed']}: {record['steps']:,} steps, ", end="")
    print(f"validation error {record['validation_error']:.2f}% with {record['dendrites']} dendrites", flush=True)


def of_run(folder: Path) -> dict:
    """The record of a finished run, from its `results.json`, with versions and machine."""
    results = json.loads((folder / "results.json").read_text())
    final, control = results["final"], results.get("control", {})
    return {
        "seed": results["seed"],
        "dataset": results["dataset"],
        "dendrites": final["dendrites"],
        "parameters": final["parameters"],
        "steps": results["global_step"],
        "restarts": results["restarts"],
        "seconds": round(results["train_seconds"], 1),
        "validation_error": 100 * (1 - final["validation_accuracy"]),
        "test_error": 100 * (1 - final["test_accuracy"]),
        "cycles": results["cycles"],
        "control": {name: value for name, value in control.items() if name != "control_of"} or None,
        "stopped_by": results["stopped_by"],
        "versions": results["versions"] | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def train_and_record(trainer, name: str) -> dict:
    """Train and save the results.

    Args:
        trainer (`PerforatedTrainer`): Trainer with a test set.
        name (`str`): Name of the data.

    Returns:
        `dict`: The record of the run.
    """
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    parts = {"train": trainer.train_dataset, "validation": trainer.eval_dataset, "test": trainer.test_dataset}
    trainer.save_results({"name": name} | {part: len(data) for part, data in parts.items()})
    return of_run(trainer.run_dir) | {"cpu_seconds": round(seconds, 1)}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def recorded(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def in_processes(next_run, number: int, script: str = "dendrites.py") -> None:
    """Run jobs in parallel until `next_run` returns None and no job is running.

    Args:
        next_run (`Callable`): Returns the label, job and results file of the next run, or None if none can start now.
        number (`int`): Number of processes.
        script (`str`): As for `run_apart`.
    """
    lock, running = threading.Lock(), []

    def worker():
        while True:
            with lock:
                entry = next_run()
                running.extend([entry] if entry else [])
            if entry:
                run_apart(*entry, script)
                running.remove(entry)
            elif not running:
                return
            else:  # a run that ends may allow another one to start
                time.sleep(1)

    threads = [threading.Thread(target=worker) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
