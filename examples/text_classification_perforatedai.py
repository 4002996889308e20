"""Adapt a pretrained text classifier with low-rank dendrites. The pretrained network is frozen.

    python examples/text_classification_perforatedai.py --save_name emotion
    python examples/text_classification_perforatedai.py --dataset_name my.csv --model_name_or_path my/model

Training starts with one dendrite of rank 8 on each linear layer. After each cycle of four epochs another one is added,
as long as the validation accuracy improves. To train the baseline, in which only the head is trained, rerun the same
command with `--control_of emotion`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

sys.path.append(str(Path(__file__).resolve().parent.parent))  # of a clone, if the package is not installed
from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, parse_arguments, run_script

DEFAULTS = {
    "save_name": "textPAI",
    # Dendrites: one of rank 8 from the first step, up to three; the pretrained weights are frozen.
    "dendrite_rank": 8,
    "num_initial_dendrites": 1,
    "freeze_base": True,
    "max_dendrites": 3,
    "dendrite_init_scale": 0.1,  # small, because the learning rate is high
    "switch_mode": "fixed",
    # A cycle: four epochs with a linear schedule. The new head needs a high learning rate, and shares it.
    "num_train_epochs": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "metric_for_best_model": "accuracy",
    "report_to": "none",
}


@dataclass
class DataArguments:
    """A pretrained model and labeled texts."""

    model_name_or_path: str = HfArg(
        default="sentence-transformers/all-MiniLM-L6-v2", help="Pretrained model: a name on the Hub or a folder."
    )
    dataset_name: str = HfArg(default="dair-ai/emotion", help="Dataset on the Hub, or a CSV file with a header.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset on the Hub.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    label_column: str = HfArg(default="label", help="Column of the labels.")
    max_seq_length: int = HfArg(default=128, help="Longer texts are truncated to this many tokens.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training texts.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of validation and of test texts.")


def load_texts(args: DataArguments) -> tuple[datasets.DatasetDict, list[str]]:
    """Load the texts.

    A missing validation or test split is 15% of the training texts. The splits do not depend on the seed.

    Args:
        args (`DataArguments`): Dataset and names of its columns.

    Returns:
        `tuple[DatasetDict, list[str]]`: The texts in three splits with integer labels, and the names of the labels.
    """
    if args.dataset_name.endswith(".csv"):
        found = datasets.load_dataset("csv", data_files=args.dataset_name)
    else:
        found = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    if missing := {args.text_column, args.label_column} - set(found["train"].column_names):
        raise ValueError(f"no column {missing.pop()!r}, there are {', '.join(found['train'].column_names)}")
    found = found.select_columns([args.text_column, args.label_column])
    found = found.rename_columns({args.text_column: "text", args.label_column: "labels"})
    found = found.filter(lambda row: row["text"] and row["labels"] is not None)
    if not isinstance(found["train"].features["labels"], datasets.ClassLabel):
        found = found.class_encode_column("labels")
    for part in ("test", "validation"):
        if part not in found:
            split = found["train"].train_test_split(0.15, seed=0)
            found["train"], found[part] = split["train"], split["test"]
    for part, data in found.items():
        limit = args.max_train_samples if part == "train" else args.max_eval_samples
        found[part] = data.shuffle(seed=0).select(range(min(len(data), limit or len(data))))
    return found, found["train"].features["labels"].names


def compute_metrics(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(argv=None) -> int:
    kinds = (DataArguments, DendriteArguments, TrainingArguments)
    data_args, dendrite_args, training_args = parse_arguments(kinds, argv, DEFAULTS)
    datasets.disable_progress_bars()
    set_seed(training_args.seed)  # for the weights of the new head
    name = data_args.dataset_name
    try:
        texts, labels = load_texts(data_args)
        name = data_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PerforatedError(f"{name}: {str(error).splitlines()[0]}") from error
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    limit = {"truncation": True, "max_length": data_args.max_seq_length}
    parts = texts.map(lambda rows: tokenizer(rows["text"], **limit), batched=True, remove_columns="text")

    trainer = PerforatedTrainer(
        model=model,
        args=training_args,
        dendrite_args=dendrite_args,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        test_dataset=parts["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_results({"name": data_args.dataset_name})
    if dendrite_args.freeze_base and not dendrite_args.control_of:
        trainer.save_model(f"{training_args.output_dir}/dendrites", dendrites_only=True)  # a few megabytes, to share
    return 0


def main(argv=None) -> int:
    """Run with the given flags, by default those of `sys.argv`. Returns the exit status."""
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())
