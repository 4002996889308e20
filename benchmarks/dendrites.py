"""What dendrites give on MNIST: runs the experiment, several seeds each, and prints the table.

    python benchmarks/dendrites.py --data_dir DIR          the complete MNIST, from IDX files
    python benchmarks/dendrites.py --groups a b            the data that the script finds without --data_dir
    python benchmarks/dendrites.py --data_dir DIR --table  only the table and the plot of what is recorded

Groups, all with the script's defaults; further flags go to the script:
    a  the network with dendrites
    b  the same network without, same stopping rule
    c  a wider network without, at the parameter count that (a) of the same seed ended with
    d  (b) for as many steps as (a) of the same seed; optimizer, learning rate and dropout change where they did in (a)
    f  (c) trained as (d): the wider network for as many steps, with the same changes
    e  at 1.5, 2 and 3 times the width, with dendrites (e+) and without (e-), three seeds; (a) and (b) are width 1

One process a core, one JSON line a run in benchmarks/results/dendrites.jsonl; what is there is not run again.
"""

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

from jobs import in_processes, recorded

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "dendrites.jsonl"
WIDTHS = [4, 8, 16]
SEEDS = [42, 43, 44, 45, 46]
NAMES = {  # in the order of the table
    "b": "without dendrites",
    "d": "without, as long as with",
    "a": "with dendrites",
    "c": "wider, without",
    "f": "wider, as long as with",
    "e-": "without",
    "e+": "with dendrites",
}
SETTINGS = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs per_device_train_batch_size eval_steps max_dendrites "
    "n_epochs_to_switch improvement_threshold weight_decay max_grad_norm"
).split()


def widths_for(count: int) -> list[int]:
    """Widths in about the proportions 1 : 2 : 4 whose network has as nearly `count` parameters as can be."""

    def distance(widths):
        first, second, hidden = widths
        parameters = 26 * first + (25 * first + 1) * second + (4 * second + 1) * hidden + 10 * (hidden + 1)
        return abs(parameters - count)

    near = [(w, 2 * w + i, 4 * w + j) for w in range(1, 100) for i in (-1, 0, 1) for j in range(-3, 4)]
    return list(min(near, key=distance))


# ------------------------------------------------------------------------------------------------------------- one run


def run(seed: int, flags: list[str], widths=WIDTHS, dendrites=True, restarts=None, library=None, dropout=None) -> dict:
    """Train once, in the current folder, and return the record.

    `flags` are the script's. `restarts`: train without dendrites up to the last of these steps and start optimizer and
    learning rate afresh, from the best weights so far, at the others. `library`: settings of GPA.pc that no flag sets.
    `dropout`: the dropout rate from the first dendrite (with `restarts`: the first restart) on, None: unchanged.
    """
    import torch
    from transformers import TrainingArguments, set_seed

    import mnist_huggingface_perforatedai as script
    from perforated_trainer import GPA, DendriteArguments, PerforatedTrainer, parse_arguments, perforate

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
                    self.weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}
                self.complete = self.state.global_step >= restarts[-1]
                self.cycle_ended = self.state.global_step in restarts
                if self.cycle_ended:  # as where a dendrite comes: on from the best network, with another dropout
                    self.model.load_state_dict(self.weights, strict=False)
                    self.set_dropout(dropout)
            if self.cycle_ended:
                self.ends.append(self.state.global_step)

    for name, value in (library or {}).items():
        value = getattr(torch, value) if name == "pai_forward_function" else value
        getattr(GPA.pc, f"set_{name}")(value)
    flags = [*flags, "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "true", "--seed", str(seed)]
    flags += ["--doing_pai", str(dendrites and restarts is None)]
    kinds = (script.DataArguments, DendriteArguments, TrainingArguments)
    arguments = parse_arguments(
        kinds, flags, script.TRAINING_DEFAULTS, script.PLATEAU_DEFAULTS, **script.DENDRITE_DEFAULTS
    )
    data_args, dendrite_args, training_args = arguments
    dendrite_args.dropout_with_dendrites = dropout
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
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    settings = {name: value for name, value in trainer.settings().items() if name in SETTINGS}
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
        "cycles": trainer.cycles(),
        "cycle_ends": trainer.ends,
        "stopped_by": trainer.stopped_by,
        "settings": settings | {"library": library, "dropout": dropout},
        "versions": {name: version(name) for name in ("torch", "transformers", "perforatedai", "accelerate")},
    }


# ----------------------------------------------------------------------------------------------------- table and plot


def reduction(records: list[dict], other: str) -> str:
    """How much lower the test error of (a) is, %: mean over the seeds that have both, paired t interval of 95 %."""
    from scipy.stats import t

    error = {(record["group"], record["seed"]): record["test_error"] for record in records}
    values = [100 * (1 - error["a", s] / error[other, s]) for g, s in error if g == "a" and (other, s) in error]
    if len(values) < 2:
        return "".join(f"{value:.1f} (one seed, no interval)" for value in values)
    mean = statistics.mean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f}), {len(values)} seeds"


def print_table(records: list[dict]) -> None:
    print("\n| group | widths | seeds | dendrites | parameters | steps | CPU s | validation error, % | test error, % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = {}
    for record in records:  # the widths of (c) and (f) follow the number of dendrites that (a) kept
        widths = () if record["group"] in "cf" else tuple(record["widths"])
        rows.setdefault((list(NAMES).index(record["group"]), widths), []).append(record)
    for (index, widths), runs in sorted(rows.items()):
        group, name = list(NAMES.items())[index]
        cells = [f"{name} ({group})", "-".join(map(str, widths)) or "as (a)", len(runs)]
        cells.append(f"{statistics.mean(run['dendrites'] for run in runs):.1f}")
        cells += [f"{statistics.mean(run[key] for run in runs):,.0f}" for key in ("parameters", "steps", "cpu_seconds")]
        for key in ("validation_error", "test_error"):
            errors = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
            cells.append(f"{statistics.mean(errors):.2f}{spread}")
        print("|", " | ".join(map(str, cells)), "|")
    print()
    for other in "bcdf":
        if text := reduction(records, other):
            print(f"test error of (a) lower than that of ({other}), %: {text}")


def draw(records: list[dict], path: Path) -> None:
    """Test error (mean and standard deviation of the seeds) against deployed parameters, with and without dendrites."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for groups, style, label in ((("b", "e-"), "o--", "without dendrites"), (("a", "e+"), "s-", "with dendrites")):
        runs, points = {}, []
        for record in (record for record in records if record["group"] in groups):
            runs.setdefault(tuple(record["widths"]), []).append((record["parameters"], record["test_error"]))
        for widths, values in runs.items():
            sizes, errors = zip(*values, strict=True)
            points.append((statistics.mean(sizes), statistics.mean(errors), statistics.pstdev(errors)))
            place = {"xytext": (-6, -14), "ha": "right"} if "b" in groups else {"xytext": (0, 10), "ha": "center"}
            axes.annotate("-".join(map(str, widths)), points[-1][:2], textcoords="offset points", **place)
        if points:
            axes.errorbar(*zip(*sorted(points), strict=True), fmt=style, capsize=3, label=label)
    axes.set(xlabel="deployed parameters", ylabel="test error (%)", xscale="log", xticks=(2e3, 5e3, 1e4, 2e4, 4e4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(0.1)
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--groups", nargs="+", default=list("abcdfe"), choices=list("abcdfe"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.job:
        Path("record.json").write_text(json.dumps(run(**json.loads(args.job))))
        return
    import mnist_huggingface_perforatedai as script

    label = {"data": args.data_dir.name if args.data_dir else "default", "flags": list(flags)}
    flags += ["--data_dir", str(args.data_dir.resolve())] if args.data_dir else []
    todo = [(group, WIDTHS, seed) for seed in args.seeds for group in args.groups if group != "e"]
    for factor in (1.5, 2, 3) if "e" in args.groups else ():
        wide = [round(factor * width) for width in WIDTHS]
        todo += [(group, wide, seed) for seed in args.seeds[:3] for group in ("e-", "e+")]

    def mine():
        return [record for record in recorded(args.results) if label.items() <= record.items()]

    def next_run():
        """The first run that is not recorded and whose (a) is, where it needs that."""
        done = mine()
        for group, widths, seed in list(todo):
            job = {"seed": seed, "flags": flags, "widths": widths, "dendrites": group in ("a", "e+")}
            job["dropout"] = script.DENDRITE_DEFAULTS["dropout_with_dendrites"]
            same = [record for record in done if (record["group"], record["seed"]) == (group, seed)]
            if any(group in "cf" or record["widths"] == widths for record in same):
                todo.remove((group, widths, seed))
                continue
            if group in "cdf":
                grown = [record for record in done if (record["group"], record["seed"]) == ("a", seed)]
                if not grown:
                    continue
                job["restarts"] = grown[0]["cycle_ends"] if group in "df" else None
                job["widths"] = widths_for(grown[0]["parameters"]) if group in "cf" else widths
            todo.remove((group, widths, seed))
            return label | {"group": group}, job, args.results
        return None

    if not args.table:
        in_processes(next_run, args.processes)
    print_table(mine())
    if any(record["group"] == "e+" for record in mine()):
        draw(mine(), args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
