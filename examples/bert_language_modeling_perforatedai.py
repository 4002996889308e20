"""Masked language modeling with BERT and artificial dendrites, until they no longer help.

    python examples/bert_language_modeling_perforatedai.py

Without flags it trains a small BERT from scratch on the Python language reference, which is part of every Python
installation. No network access is required.
"""

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import datasets
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.hf_argparser import HfArg

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for a clone in which the package is not installed
from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    main_process,
    parse_arguments,
    perforate,
    run_script,
)

# Chosen on validation scores. Any flag of TrainingArguments can be given on the command line.
DEFAULTS = {
    "save_name": "bertMLM",
    "num_train_epochs": 1_000_000,  # effectively unlimited: training stops when dendrites stop helping
    "eval_strategy": "steps",
    "eval_steps": 200,
    "logging_steps": 200,
    "save_steps": 2000,
    "save_total_limit": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"factor": 0.3, "patience": 3},  # a patience below n_epochs_to_switch
    "metric_for_best_model": "loss",
    "n_epochs_to_switch": 7,
    "improvement_threshold": [1e-3],
    "max_dendrites": 1,
    "report_to": "none",
}
# A BERT that trains in minutes on a CPU. No dropout: masks are new in each step, so it only slowed this small model.
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
SMALL |= {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class ModelArguments:
    """Which BERT to train, and its size."""

    model_name_or_path: str | None = HfArg(default=None, help="Pretrained model: a name on the Hub or a folder.")
    config_overrides: str | None = HfArg(
        default=None, help="Overrides for the config of the small BERT: hidden_size=64,num_hidden_layers=2"
    )
    tokenizer_name: str | None = HfArg(
        default=None, help="Tokenizer; default: that of the model, or one trained on the training text."
    )
    vocab_size: int = HfArg(default=1000, help="Vocabulary size of a tokenizer that is trained.")
    width: float = HfArg(
        default=1.0,
        help="Factor on intermediate_size and hidden_size (rounded to a multiple of two per attention head). With a "
        "value other than 1, training starts from random weights, because pretrained weights do not fit another width.",
    )


@dataclass
class DataArguments:
    """Which text to train on, and how it is split and masked."""

    dataset_name: str | None = HfArg(default=None, help="Text dataset on the Hub.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset on the Hub.")
    train_file: str | None = HfArg(default=None, help="Training text: a txt, csv or json file.")
    validation_file: str | None = HfArg(default=None, help="Validation text: a txt, csv or json file.")
    validation_split_percentage: int = HfArg(
        default=10, help="If there is no validation text: share of the text for validation, and the same for test."
    )
    max_seq_length: int = HfArg(default=32, help="Number of tokens per sequence.")
    mlm_probability: float = HfArg(default=0.15, help="Fraction of the tokens that are masked.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training sequences.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of validation and of test sequences.")


def read_python_reference() -> list[str]:
    """Paragraphs of the Python language reference, without duplicates."""
    from pydoc_data.topics import topics

    paragraphs = chain.from_iterable(re.split(r"\n\s*\n", topics[topic]) for topic in sorted(topics))
    return list(dict.fromkeys(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()))


def read_files(args: DataArguments) -> dict[str, list[str]]:
    """Texts of each split of a dataset on the Hub, or of files. Raises OSError or ValueError if they cannot be read."""
    if args.dataset_name:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file or args.train_file}
        for part, file in files.items():
            if not file or not Path(file).is_file() or Path(file).suffix not in (".txt", ".csv", ".json"):
                raise PerforatedError(f"--{part}_file {file}: it must be an existing txt, csv or json file")
        kind = Path(args.train_file).suffix[1:].replace("txt", "text")
        data = datasets.load_dataset(kind, data_files={part: file for part, file in files.items() if file})
        if not args.validation_file:
            del data["validation"]
    column = "text" if "text" in data["train"].column_names else data["train"].column_names[0]
    return {part: [text for text in rows[column] if text and text.strip()] for part, rows in data.items()}


def read_texts(args: DataArguments) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the data, and its texts for train, validation and, if available, test."""
    name = args.dataset_name or (args.train_file and Path(args.train_file).name)
    if name or args.validation_file:
        try:
            texts = read_files(args)
        except (OSError, ValueError, KeyError) as error:
            raise PerforatedError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
    else:
        name, texts = f"reference of Python {sys.version.split()[0]}", {"train": read_python_reference()}
    if "validation" not in texts:
        # Twenty consecutive paragraphs go to the same split, so that most sequences are contained in one.
        every, whole = round(100 / args.validation_split_percentage), texts["train"]
        texts = {"train": [], "validation": [], "test": []}
        for index, text in enumerate(whole):
            texts[{0: "validation", 1: "test"}.get(index // 20 % every, "train")].append(text)
    return name, texts


def train_tokenizer(texts: list[str], vocab_size: int) -> BertTokenizer:
    """Train a WordPiece tokenizer of lowercase text. The same texts give the same tokenizer."""
    tokenizer = BertTokenizer().backend_tokenizer
    characters = Counter(chain.from_iterable(map(tokenizer.normalizer.normalize_str, texts)))
    alphabet = sorted(character for character, _ in characters.most_common(1000) if not character.isspace())
    # The trainer of tokenizers 0.23 numbers characters in the random order of a hash table and breaks ties by these
    # numbers, so they are passed as special tokens. The returned tokenizer has the vocabulary only, without these.
    start = [*BertTokenizer().get_vocab(), *alphabet, *(f"##{character}" for character in alphabet)]
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=start, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab())


def make_data(args: DataArguments, mask: DataCollatorForLanguageModeling, texts: dict[str, list[str]]):
    """Return sequences of `max_seq_length` tokens for each split; validation and test are masked once."""
    size, parts = args.max_seq_length, {}
    mask_once = replace(mask, seed=0)
    for part in ("train", "validation", "test"):
        tokens = mask.tokenizer(texts[part], verbose=False)["input_ids"] if texts.get(part) else []
        ids = list(chain.from_iterable(tokens))
        limit = args.max_train_samples if part == "train" else args.max_eval_samples
        rows = [{"input_ids": ids[i : i + size]} for i in range(0, len(ids) - size + 1, size)][:limit]
        if not rows and part != "test":
            raise PerforatedError(f"the {part} text is shorter than one sequence of {size} tokens")
        if rows:
            data = datasets.Dataset.from_list(rows) if part == "train" else datasets.Dataset.from_dict(mask_once(rows))
            parts[part] = data.with_format("torch")
    return parts


class MaskingTrainer(PerforatedTrainer):
    """Draws new masks for the training sequences in each step; the masks of validation and test are fixed.

    Masks are drawn in `training_step`, not in the collator: batches are collated one step ahead, so a resumed run would
    draw other masks.
    """

    def __init__(self, *args, mask: DataCollatorForLanguageModeling, **kwargs):
        super().__init__(*args, data_collator=default_data_collator, **kwargs)
        self.mask = mask

    def training_step(self, model, inputs, num_items_in_batch=None):
        masked = self.mask([{"input_ids": ids} for ids in inputs["input_ids"].cpu()])
        return super().training_step(model, masked, num_items_in_batch)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics[f"{metric_key_prefix}_loss"]
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700))  # avoids an overflow
        return output


def build_model(args: ModelArguments, max_seq_length: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the pretrained model, or build one from scratch. Raises OSError or ValueError if that is not possible."""
    if name := args.model_name_or_path:
        if args.config_overrides:
            raise ValueError("--config_overrides is for a model from scratch, not for --model_name_or_path")
        config = AutoConfig.from_pretrained(name)
    else:
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=max_seq_length, **SMALL)
        if args.config_overrides:
            config.update_from_string(args.config_overrides)
    if args.width != 1:
        whole = 2 * config.num_attention_heads
        config.hidden_size = max(1, round(config.hidden_size * args.width / whole)) * whole
        config.intermediate_size = max(1, round(config.intermediate_size * args.width))
    if config.vocab_size < len(tokenizer) or config.max_position_embeddings < max_seq_length:
        raise ValueError(
            f"it takes {config.vocab_size} tokens in sequences of {config.max_position_embeddings}, not "
            f"{len(tokenizer)} in sequences of --max_seq_length {max_seq_length}"
        )
    if name and args.width == 1:
        return AutoModelForMaskedLM.from_pretrained(name)
    return AutoModelForMaskedLM.from_config(config)


def check(*arguments) -> None:
    limits = {"mlm_probability": (0.01, 0.99), "validation_split_percentage": (1, 30), "max_seq_length": (8, 100_000)}
    limits |= {"max_train_samples": (1, math.inf), "max_eval_samples": (1, math.inf), "width": (0.01, 100)}
    for name, value in chain.from_iterable(vars(args).items() for args in arguments):
        low, high = limits.get(name, (-math.inf, math.inf))
        if name in limits and value is not None and not low <= value <= high:
            raise PerforatedError(f"--{name} {value}: it must be between {low} and {high}")


def run(argv=None) -> int:
    kinds = (ModelArguments, DataArguments, DendriteArguments, TrainingArguments)
    model_args, data_args, dendrite_args, training_args = parse_arguments(kinds, argv, DEFAULTS)
    check(model_args, data_args)
    datasets.disable_progress_bars()
    set_seed(training_args.seed)
    name, texts = read_texts(data_args)
    pretrained = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        if pretrained:
            tokenizer = AutoTokenizer.from_pretrained(pretrained)
        else:
            tokenizer = train_tokenizer(texts["train"], model_args.vocab_size)
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability)
        parts = make_data(data_args, mask, texts)
        model = build_model(model_args, data_args.max_seq_length, tokenizer)
    except (OSError, ValueError, TypeError) as error:
        raise PerforatedError(f"{pretrained or 'the model'}: {str(error).splitlines()[0]}") from error
    # transformers assumes that a forward with **kwargs averages the loss over accumulated batches; BERT's does not.
    model.accepts_loss_kwargs = False

    model = perforate(model, dendrite_args, training_args)
    trainer = MaskingTrainer(
        model=model,
        args=training_args,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        test_dataset=parts.get("test"),
        mask=mask,
        processing_class=tokenizer,
    )
    if main_process():
        print(f"network: {type(model).__name__}, {trainer.num_parameters:,} parameters, on {training_args.device}")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_results({"name": name})
    if training_args.push_to_hub:
        trainer.push_to_hub()  # final/, the model with its card
    return 0


def main(argv=None) -> int:
    """Run with the given flags, by default those of `sys.argv`. Returns the exit status."""
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())
