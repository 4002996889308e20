"""A small BERT with dendrites, trained and saved as a user would, with a tokenizer of whole words."""

import re
from collections import Counter
from pydoc_data.topics import topics

import models
import torch
from transformers import BertTokenizer, TrainingArguments

from perforated_trainer import DendriteArguments, PerforatedTrainer


def tokenizer() -> BertTokenizer:
    """A tokenizer whose token ids are those of `models.rows`."""
    words = Counter(re.findall(r"\w+", " ".join(topics.values()).lower()))
    tokens = ["[MASK]", "[UNK]", *(word for word, _ in words.most_common(models.WORDS - 2))]
    tokens[-3:] = ["[PAD]", "[CLS]", "[SEP]"]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def train(run="bertMLM") -> PerforatedTrainer:
    """Train with two dendrite additions in the current folder; save `final/` and a model in the output folder."""
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=run,
        use_cpu=True,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        metric_for_best_model="loss",
        greater_is_better=False,
        report_to="none",
    )
    rows = models.rows("BertForMaskedLM")
    trainer = PerforatedTrainer(
        model=models.build("BertForMaskedLM"),
        args=args,
        dendrite_args=DendriteArguments(testing_dendrite_capacity=True, max_dendrites=2),
        train_dataset=rows[8:],
        eval_dataset=rows[:8],
        processing_class=tokenizer(),
    )
    trainer.train()
    trainer.save_results({"name": "reference of Python"})
    trainer.save_model()
    return trainer
