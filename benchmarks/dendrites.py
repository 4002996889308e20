"""What dendrites give on MNIST: runs the experiment, several seeds each, and prints the table.

    python benchmarks/dendrites.py --data_dir DIR          the complete MNIST, from IDX files
    python benchmarks/dendrites.py --groups a b            the 5,000 embedded digits, if the Hub cannot be reached
    python benchmarks/dendrites.py --table                 only the table and the plot of what is recorded

Groups, all with the defaults of the script:
    a  the network with dendrites
    b  the same network without, same stopping rule
    c  a wider network without, at the parameter count that (a) of the same seed ended with
    d  (b) for as many steps as (a) of the same seed, optimizer and learning rate restarted where (a) restarted them
    e  with (e+) and without dendrites (e-) at 1.5, 2 and 3 times the width; (a) and (b) are the widths times 1

One process a core, one JSON line a run in benchmarks/results/dendrites.jsonl. What is there is not run again: stop it
and start it again as you like.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dendrites.jsonl"
WIDTHS = (4, 8, 16)
SEEDS = (42, 43, 44, 45, 46)
PACKAGES = ("torch", "transformers", "perforatedai", "accelerate")


def parameters(first: int, second: int, hidden: int) -> int:
    """Parameters of the script's network of these widths, without dendrites."""
    return 26 * first + (25 * first + 1) * second + (4 * second + 1) * hidden + 10 * (hidden + 1)


def widths_for(count: int) -> list[int]:
    """Widths in about the proportions 1 : 2 : 4 whose network has as nearly `count` parameters as can be."""
    near = [(w, 2 * w + i, 4 * w + j) for w in range(1, 100) for i in (-1, 0, 1) for j in range(-3, 4)]
    return list(min(near, key=lambda widths: abs(parameters(*widths) - count)))


# ------------------------------------------------------------------------------------------------------------- one run


def run(seed: int, flags: list[str], widths=WIDTHS, dendrites=True, restarts=None, library=None, dropout=None) -> dict:
    """Train once, in the current folder, and return the record.

    `flags` are the script's. `restarts`: train without dendrites up to the last of these steps and start optimizer and
    learning rate afresh, from the best weights so far, at the others. `library`: settings of GPA.pc that no flag sets.
    `dropout`: the dropout rates from the first dendrite (with `restarts`: the first restart) on.
    """
    import torch
    from transformers import TrainerCallback, set_seed

    sys.path.insert(0, str(ROOT))
    import mnist_huggingface_perforatedai as script
    from perforated_trainer import GPA, PerforatedTrainer, perforate

    class NextCycles(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step and dropout is not None:
                layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
                for layer, rate in zip(layers, dropout, strict=True):
                    layer.p = rate

    class Quick(PerforatedTrainer):
        """Draws nothing; goes by `restarts`, not by the tracker, where there are some."""

        ends, weights, best = [], None, -1.0

        def draw(self):
            pass

        def add_score(self, metrics):
            if restarts is None:
                super().add_score(metrics)
            else:
                if metrics[self.score_name] > self.best:
                    self.best = metrics[self.score_name]
                    self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
                self.complete = self.state.global_step >= restarts[-1]
                self.cycle_ended = self.state.global_step in restarts
                if self.cycle_ended:  # as the tracker does, which goes on from the best network
                    self.model.load_state_dict(self.weights)
            if self.cycle_ended:
                self.ends.append(self.state.global_step)

    torch.set_num_threads(1)
    for name, value in (library or {}).items():
        value = getattr(torch, value) if name == "pai_forward_function" else value
        getattr(GPA.pc, f"set_{name}")(value)
    keep = ["--save_strategy", "no", "--use_cpu", "--disable_tqdm", "true"]
    flags = [*flags, *keep, "--seed", str(seed), "--doing_pai", str(dendrites and restarts is None)]
    data_args, dendrite_args, training_args = script.parse_arguments(flags)
    set_seed(seed)
    data_name, train, validation, test = script.load_data(data_args)
    model = script.MnistCnnForImageClassification(script.MnistCnnConfig(widths=widths))
    trainer = Quick(
        model=perforate(model, dendrite_args, training_args),
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=test,
        data_collator=lambda batch: batch,
        compute_metrics=script.compute_metrics,
        callbacks=[NextCycles()],
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    if trainer.stopped_by == "signal":
        sys.exit("stopped by a signal: not recorded")
    return {
        "seed": seed,
        "widths": list(widths),
        "dataset": {"name": data_name, "train": len(train), "validation": len(validation), "test": len(test)},
        "dendrites": trainer.dendrites(),
        "parameters": trainer.parameters(),
        "steps": trainer.state.global_step,
        "cpu_seconds": round(seconds, 1),
        "validation_error": 100 * (1 - trainer.evaluate()["eval_accuracy"]),
        "test_error": 100 * (1 - trainer.evaluate(test, metric_key_prefix="test")["test_accuracy"]),
        "cycles": [{key: cycle[key] for key in script.CYCLE} for cycle in trainer.cycles()],
        "cycle_ends": trainer.ends,
        "stopped_by": trainer.stopped_by,
        "settings": {
            name: value for name, value in trainer.settings().items() if name in SETTINGS or name.startswith("n_epochs")
        }
        | {"library": library, "dropout": dropout},
        "versions": {package: version(package) for package in PACKAGES},
    }


SETTINGS = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs per_device_train_batch_size eval_steps max_dendrites "
    "improvement_threshold weight_decay max_grad_norm"
).split()


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def run_apart(label: dict, job: dict, results: Path) -> None:
    """Run `job` in a process and a folder of its own and append `label` and its record to `results`."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{label} failed: {done.stderr[-2000:]}", file=sys.stderr)
            return
        record = label | json.loads(Path(folder, "record.json").read_text()) | {"commit": commit()}
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a") as file:  # one write of one line: a kill leaves a whole line or none
        file.write(json.dumps(record) + "\n")
    print(f"{json.dumps(label)}: {record['dendrites']} dendrites, {record['parameters']:,} parameters,", end=" ")
    print(f"{record['steps']:,} steps, {record['cpu_seconds']:.0f} s, validation {record['validation_error']:.2f} %")


def recorded(results: Path) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in results.read_text().splitlines()]
    return []


def in_processes(next_run, number: int) -> None:
    """Run what `next_run` gives, (label, job, results), `number` at a time, until it gives None and none is running."""
    lock, running = threading.Lock(), []

    def worker():
        while True:
            with lock:
                entry = next_run()
                running.extend([entry] if entry else [])
            if entry:
                run_apart(*entry)
                with lock:
                    running.remove(entry)
            elif not running:
                return
            else:  # one that is running may make another possible
                time.sleep(1)

    threads = [threading.Thread(target=worker) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def job(group: str, widths: list[int], seed: int, flags: list[str], done: list[dict]) -> dict | None:
    """The arguments of `run`; None while the run of (a) that it depends on is not recorded."""
    sys.path.insert(0, str(ROOT))
    import mnist_huggingface_perforatedai as script

    values = {"seed": seed, "flags": flags, "widths": widths, "dropout": script.DROPOUTS_WITH_DENDRITES}
    if group in ("c", "d"):
        with_dendrites = next((r for r in done if r["group"] == "a" and r["seed"] == seed), None)
        if with_dendrites is None:
            return None
        if group == "c":
            values["widths"] = widths_for(with_dendrites["parameters"])
        else:
            values["restarts"] = with_dendrites["cycle_ends"]
    return values | {"dendrites": group in ("a", "e+")}


# ----------------------------------------------------------------------------------------------------- table and plot


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else float('nan'):.2f}"


def reduction(records: list[dict], other: str) -> str:
    """Less test error of (a) than of `other`, %: mean over the seeds that have both, paired t interval of 95 %."""
    from scipy.stats import t

    error = {(record["group"], record["seed"]): record["test_error"] for record in records}
    values = [100 * (1 - error["a", s] / error[other, s]) for g, s in error if g == "a" and (other, s) in error]
    if len(values) < 2:
        return " ".join(f"{value:.1f} (one seed, no interval)" for value in values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f}), {len(values)} seeds"


def print_table(records: list[dict]) -> None:
    print("\n| group | widths | seeds | dendrites | parameters | steps | CPU s | validation error, % | test error, % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = {}
    for record in records:  # the widths of (c) follow the number of dendrites that (a) kept
        widths = "as (a)" if record["group"] == "c" else "-".join(map(str, record["widths"]))
        rows.setdefault((record["group"], len(widths), widths), []).append(record)
    for (group, _, widths), runs in sorted(rows.items()):
        whole = " | ".join(
            f"{statistics.mean(run[name] for run in runs):,.{digits}f}"
            for name, digits in (("dendrites", 1), ("parameters", 0), ("steps", 0), ("cpu_seconds", 0))
        )
        errors = " | ".join(mean_and_spread([run[name] for run in runs]) for name in ("validation_error", "test_error"))
        print(f"| {group} | {widths} | {len(runs)} | {whole} | {errors} |")
    print()
    for other in "bcd":
        if text := reduction(records, other):
            print(f"test error of (a) below that of ({other}), %: {text}")


def draw(records: list[dict], path: Path) -> None:
    """Test error against deployed parameters, with and without dendrites."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for groups, style, label in ((("b", "e-"), "o--", "without dendrites"), (("a", "e+"), "s-", "with dendrites")):
        runs = {}
        for record in records:
            if record["group"] in groups:
                runs.setdefault(tuple(record["widths"]), []).append(record)
        points = [
            [statistics.mean(r["parameters"] for r in group), statistics.mean(errors), statistics.pstdev(errors)]
            for group in runs.values()
            for errors in [[r["test_error"] for r in group]]
        ]
        if points:
            axes.errorbar(*zip(*sorted(points), strict=True), fmt=style, capsize=3, label=label)
    axes.set(xlabel="deployed parameters", ylabel="test error (%)", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with MNIST's IDX files; else what the script finds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--groups", nargs="+", default=list("abcde"), choices=list("abcde"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()  # what it does not know goes to the script
    if args.job:
        Path("record.json").write_text(json.dumps(run(**json.loads(args.job))))
        return
    data = args.data_dir.name if args.data_dir else "default"

    def mine():
        labels = {"data": data, "flags": flags}
        return [r for r in recorded(args.results) if labels.items() <= r.items()]

    todo = [(group, WIDTHS, seed) for seed in args.seeds for group in "abcd" if group in args.groups]
    for factor in (1.5, 2, 3) if "e" in args.groups else ():
        wide = [round(factor * width) for width in WIDTHS]
        todo += [(group, wide, seed) for seed in args.seeds[:3] for group in ("e-", "e+")]
    known = [(r["group"], r["seed"]) + ((tuple(r["widths"]),) if r["group"][0] == "e" else ()) for r in mine()]
    todo = [e for e in todo if (e[0], e[2]) + ((tuple(e[1]),) if e[0][0] == "e" else ()) not in known]
    all_flags = flags + (["--data_dir", str(args.data_dir.resolve())] if args.data_dir else [])

    def next_run():
        for entry in todo:
            if values := job(*entry, all_flags, mine()):
                todo.remove(entry)
                label = {"group": entry[0], "data": data, "flags": flags}
                return label, values, args.results
        return None

    if not args.table:
        in_processes(next_run, args.processes)
    if todo and not args.table:
        print(f"not run, because (a) of the same seed is missing: {todo}", file=sys.stderr)
    print_table(mine())
    draw(mine(), args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
