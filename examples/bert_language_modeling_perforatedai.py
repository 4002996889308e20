"""Masked-language modeling with BERT and artificial dendrites, until they no longer help.

    python examples/bert_language_modeling_perforatedai.py

Without flags: a small BERT from scratch, on the reference of the Python language that every Python carries; no network.
"""

import json
import math
import re
import shlex
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parent.parent))  # perforated_trainer.py of a clone
from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    ignore_shared_tensors,
    is_resumed,
    perforate,
    refuse_arguments,
)

# Chosen on validation scores. Any flag of TrainingArguments can be given on the command line.
TRAINING_DEFAULTS = {
    "num_train_epochs": 1_000_000,  # practically endless: the tracker says when training is complete
    "eval_strategy": "steps",
    "eval_steps": 100,
    "logging_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "metric_for_best_model": "loss",
    "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
    "report_to": "none",
}
PLATEAU_DEFAULTS = {"factor": 0.3, "patience": 2}  # a patience below n_epochs_to_switch
DENDRITE_DEFAULTS = {"save_name": "bertMLM", "n_epochs_to_switch": 8}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each epoch has other masks: no overfitting


@dataclass
class ModelArguments:
    """Which BERT to train, and how large."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to go on from, a folder or a name on the Hub. Default: a small BERT."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes of the small BERT's config, such as hidden_size=128,num_hidden_layers=4."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer. Default: the model's, or one trained on the training text."}
    )
    vocab_size: int = field(default=2000, metadata={"help": "Entries of a tokenizer that is trained here."})
    width: float = field(
        default=1.0,
        metadata={
            "help": "Factor on hidden_size, rounded to whole attention heads of two, and on intermediate_size. Other "
            "than 1 it trains from scratch, a model that was named too: its weights do not fit another width."
        },
    )


@dataclass
class DataArguments:
    """Which text to train on, and how it is cut and masked."""

    dataset_name: str | None = field(default=None, metadata={"help": "Text data set of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Text to train on: a txt, csv or json file."})
    validation_file: str | None = field(default=None, metadata={"help": "Text that decides on dendrites."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "Without a validation part: percentage kept apart for it, and as much for a test."}
    )
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a sequence: the text is cut into such blocks."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many sequences at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many sequences at most."})


# ------------------------------------------------------------------------------------------------------------ the data


def read_python_reference() -> list[str]:
    """Paragraphs of the Python language reference, each once: topics repeat one another."""
    from pydoc_data.topics import topics

    paragraphs = chain.from_iterable(re.split(r"\n\s*\n", topics[topic]) for topic in sorted(topics))
    return list(dict.fromkeys(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()))


def read_texts(args: DataArguments) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the data, and texts for "train", "validation" and, where there are any, "test"."""
    if args.dataset_name is None and args.train_file is None:
        if args.validation_file:
            raise PerforatedError("--validation_file without --train_file")
        name, texts = f"reference of Python {sys.version.split()[0]}", {"train": read_python_reference()}
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        files = {part: file for part, file in files.items() if file}
        for part, file in files.items():
            if not Path(file).is_file():
                raise PerforatedError(f"--{part}_file {file}: there is no such file")
            if Path(file).suffix not in (".txt", ".csv", ".json"):
                raise PerforatedError(f"--{part}_file {file}: it must be a txt, csv or json file")
        datasets.disable_progress_bars()
        try:
            if args.dataset_name:
                name, data = args.dataset_name, datasets.load_dataset(args.dataset_name, args.dataset_config_name)
            else:
                kind = Path(args.train_file).suffix[1:].replace("txt", "text")
                name, data = Path(args.train_file).name, datasets.load_dataset(kind, data_files=files)
        except Exception as error:
            raise PerforatedError(f"the text cannot be read: {str(error).splitlines()[0]}") from error
        if "train" not in data:
            raise PerforatedError(f"--dataset_name {name}: it has no train part, only {', '.join(data)}")
        column = "text" if "text" in data["train"].column_names else data["train"].column_names[0]
        parts = {part: data[part][column] for part in ("train", "validation", "test") if part in data}
        texts = {part: [text for text in column if text.strip()] for part, column in parts.items()}
    if "validation" not in texts:
        if not 1 <= args.validation_split_percentage <= 30:
            raise PerforatedError(f"--validation_split_percentage {args.validation_split_percentage}: from 1 to 30")
        # Twenty paragraphs in a row go to the same part, so that most sequences lie whole in it.
        every, whole, texts = round(100 / args.validation_split_percentage), texts["train"], {}
        for index, text in enumerate(whole):
            part = {0: "validation", 1: "test"}.get(index // 20 % every, "train")
            texts.setdefault(part, []).append(text)
    return name, texts


def train_tokenizer(texts: list[str], vocab_size: int) -> BertTokenizer:
    """A WordPiece tokenizer of lower-case English, the same for the same texts."""
    from tokenizers.trainers import WordPieceTrainer

    tokenizer = BertTokenizer().backend_tokenizer
    characters = Counter(chain.from_iterable(map(tokenizer.normalizer.normalize_str, texts)))
    alphabet = sorted(char for char, _ in characters.most_common(1000) if not char.isspace())
    # The trainer of tokenizers 0.23 numbers characters in the random order of a hash table, and breaks ties by their
    # numbers. Given in advance they have numbers; a vocabulary without marks of special tokens is made of the result.
    start = [*BertTokenizer().get_vocab(), *alphabet, *(f"##{char}" for char in alphabet)]
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=start, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab())


def cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], args: DataArguments, limit: int | None):
    """Tokenize texts, join them and cut them into sequences of `max_seq_length` tokens."""
    ids = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
    size = args.max_seq_length
    rows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][:limit]
    return datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch")


def load_data(args: DataArguments, tokenizer, texts):
    """Return training, validation and test data (or None) and the collator.

    Training sequences are masked anew each time, those of the others once, so that their scores can be compared.
    """
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    mask_once = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability, seed=0)

    def collate(rows):
        return default_data_collator(rows) if "labels" in rows[0] else mask(rows)

    parts = {}
    for part, lines in texts.items():
        data = cut(tokenizer, lines, args, args.max_train_samples if part == "train" else args.max_eval_samples)
        if len(data) == 0:
            raise PerforatedError(f"the {part} text is shorter than one sequence of {args.max_seq_length} tokens")
        if part != "train":
            data = datasets.Dataset.from_dict(dict(mask_once(list(data)))).with_format("torch")
        parts[part] = data
    return parts["train"], parts["validation"], parts.get("test"), collate


# ----------------------------------------------------------------------------------------------------------- the model


def load_tokenizer(args: ModelArguments, texts: list[str]) -> PreTrainedTokenizerBase:
    if name := args.tokenizer_name or args.model_name_or_path:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise PerforatedError(f"the tokenizer {name} cannot be had: {str(error).splitlines()[0]}") from error
    return train_tokenizer(texts, args.vocab_size)


def build_model(args: ModelArguments, data_args: DataArguments, tokenizer) -> PreTrainedModel:
    """The model that was named, or one from scratch."""
    name, size = args.model_name_or_path, data_args.max_seq_length
    if name and args.config_overrides:
        raise PerforatedError("--config_overrides is for a model from scratch, not for --model_name_or_path")
    try:
        if name:
            config = AutoConfig.from_pretrained(name)
        else:
            config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=size, **SMALL)
            if args.config_overrides:
                config.update_from_string(args.config_overrides)
        if args.width != 1:
            whole = 2 * config.num_attention_heads
            config.hidden_size = max(1, round(config.hidden_size * args.width / whole)) * whole
            config.intermediate_size = max(1, round(config.intermediate_size * args.width))
        if config.vocab_size < len(tokenizer) or config.max_position_embeddings < size:
            raise ValueError(
                f"the model is made for {config.vocab_size} tokens in sequences of {config.max_position_embeddings}, "
                f"not for {len(tokenizer)} in sequences of --max_seq_length {size}"
            )
        if name and args.width == 1:
            return AutoModelForMaskedLM.from_pretrained(name)
        return AutoModelForMaskedLM.from_config(config)
    except (OSError, ValueError, TypeError) as error:
        raise PerforatedError(f"the model cannot be built: {str(error).splitlines()[0]}") from error


# --------------------------------------------------------------------------------------------- arguments, run, results


def parse_arguments(argv=None):
    kinds = (ModelArguments, DataArguments, DendriteArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__)
    parser.error = lambda message: sys.exit(fail(message))  # one line, not the page of flags
    parser.set_defaults(output_dir=None, **TRAINING_DEFAULTS, **DENDRITE_DEFAULTS)
    values = vars(parser.parse_args(argv))
    values["output_dir"] = values["output_dir"] or values["save_name"]
    if values["lr_scheduler_type"] == "reduce_lr_on_plateau" and values["lr_scheduler_kwargs"] is None:
        values["lr_scheduler_kwargs"] = PLATEAU_DEFAULTS
    values["remove_unused_columns"] = False  # the collator makes what the model takes
    if not 0 < values["mlm_probability"] < 1:
        raise PerforatedError(f"--mlm_probability {values['mlm_probability']}: it must lie between 0 and 1")
    for name, least in {"max_seq_length": 8, "vocab_size": 200, "max_train_samples": 1, "max_eval_samples": 1}.items():
        if values[name] is not None and values[name] < least:
            raise PerforatedError(f"--{name} {values[name]}: at least {least}")
    if values["width"] <= 0:
        raise PerforatedError(f"--width {values['width']}: it must be above 0")
    refuse_arguments(values)  # before TrainingArguments finds other words for it
    try:
        return parser.parse_dict(values)
    except (ValueError, ImportError, TypeError) as error:
        raise PerforatedError(str(error).splitlines()[0]) from error


def fail(message: str, status: int = 2) -> int:
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    return status


def write_results(trainer: PerforatedTrainer, folder: Path, data: dict) -> None:
    """Write `final/`, then `results.json`; each whole or not at all."""
    final = {"dendrites": trainer.dendrites(), "parameters": trainer.parameters()}
    final["validation_loss"] = trainer.evaluate()["eval_loss"]
    if trainer.test_dataset is not None:
        final["test_loss"] = trainer.evaluate(trainer.test_dataset, metric_key_prefix="test")["test_loss"]
    packages = ("torch", "transformers", "tokenizers", "datasets", "perforatedai", "accelerate", "safetensors")
    results = {
        "stopped_by": trainer.stopped_by,
        "dataset": data,
        "seed": trainer.args.seed,
        "cycles": [{key: cycle[key] for key in CYCLE if key in cycle} for cycle in trainer.cycles()],
        "final": final,
        "global_step": trainer.state.global_step,
        "train_seconds": round(trainer.train_seconds, 3),
        "command": shlex.join(sys.argv),
        "versions": {package: version(package) for package in packages} | {"python": sys.version.split()[0]},
    }
    if not trainer.args.should_save:
        return
    unfinished = folder / "final.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer.save_model(str(unfinished))
    shutil.rmtree(folder / "final", ignore_errors=True)
    unfinished.replace(folder / "final")
    unfinished = folder / "results.json.unfinished"
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(folder / "results.json")


CYCLE = ("dendrites", "parameters", "global_step", "best_validation", "test_loss")


def print_results(results: dict, folder: Path) -> None:
    print("\ndendrites  parameters  at step  validation loss  perplexity  test perplexity")
    for cycle in results["cycles"]:
        loss, test = cycle["best_validation"], math.exp(cycle.get("test_loss", math.nan))
        print(
            f"{cycle['dendrites']:9}  {cycle['parameters']:10,}  {cycle['global_step']:7,}  "
            f"{loss:15.4f}  {math.exp(loss):10.2f}  {test:15.2f}"
        )
    final = results["final"]
    print(f"final: {final['dendrites']} dendrites, {final['parameters']:,} parameters, ", end="")
    print(f"validation perplexity {math.exp(final['validation_loss']):.2f}")
    print(f"data: {results['dataset']['name']}; stopped by {results['stopped_by']} at step {results['global_step']:,}")
    print(f"model: {folder}/final   plot: {folder}/{folder}.png   results: {folder}/results.json")


def run(argv=None) -> int:
    warnings.simplefilter("ignore")
    model_args, data_args, dendrite_args, training_args = parse_arguments(argv)
    folder = Path(dendrite_args.save_name)
    if is_resumed(training_args.resume_from_checkpoint) and (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text())
        if results["stopped_by"] == "tracker":
            print(f"the run in {folder} is complete")
            print_results(results, folder)
            return 0

    logging.disable_progress_bar()
    set_seed(training_args.seed)
    name, texts = read_texts(data_args)
    tokenizer = load_tokenizer(model_args, texts["train"])
    train, validation, test, collate = load_data(data_args, tokenizer, texts)
    model = build_model(model_args, data_args, tokenizer)
    # transformers takes a forward with **kwargs to average over several batches; this one averages over its own.
    model.accepts_loss_kwargs = False

    ignore_shared_tensors()  # safetensors may write tied weights twice
    # TEMPORARY, until perforated_trainer does this
    from perforated_trainer import GPA

    GPA.pc.set_output_dimensions([-1, -1, 0])
    GPA.pc.set_module_ids_to_track([".cls.predictions.decoder"])
    model = perforate(model, dendrite_args, training_args)
    trainer = PerforatedTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=test,
        data_collator=collate,
        processing_class=tokenizer,
    )
    sizes = {"train": len(train), "validation": len(validation)} | ({"test": len(test)} if test else {})
    trainer.say(f"data: {name}; sequences: {', '.join(f'{size:,} {part}' for part, size in sizes.items())}")
    trainer.say(f"network: {type(model).__name__}, {trainer.parameters():,} parameters, on {training_args.device}")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    if trainer.stopped_by == "signal":
        command = shlex.join(["python", *sys.argv, "--resume_from_checkpoint", "true"])
        trainer.say(f"stopped at step {trainer.state.global_step:,} with a checkpoint; to go on: {command}")
        return 128 + trainer.signal
    write_results(trainer, folder, {"name": name, **sizes})
    if training_args.process_index == 0:
        print_results(json.loads((folder / "results.json").read_text()), folder)
    return 0


def main(argv=None) -> int:
    """Run with the given flags, `sys.argv`'s by default; returns the exit status."""
    try:
        return run(argv)
    except PerforatedError as error:
        return fail(str(error), error.exit_status)
    except OSError as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
