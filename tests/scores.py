"""Train a few steps without dropout and evaluate: `scores.py SAMPLES BATCH_SIZE`, on any number of processes."""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

import mnist_huggingface_perforatedai as script
from perforated_trainer import DendriteArguments, PerforatedTrainer, perforate

samples, batch = int(sys.argv[1]), int(sys.argv[2])
args = TrainingArguments(
    output_dir="run",
    use_cpu=True,
    per_device_train_batch_size=batch,
    per_device_eval_batch_size=batch,
    optim="sgd",  # Adam's first steps are signs of gradients: rounding can flip one
    learning_rate=0.05,
    eval_strategy="steps",
    eval_steps=100,
    logging_steps=1,
    max_steps=6,
    metric_for_best_model="accuracy",
    remove_unused_columns=False,
    report_to="none",
)
set_seed(0)
_, train, validation, _ = script.load_data(script.DataArguments(max_train_samples=320, max_eval_samples=samples))
model = script.MnistCnnForImageClassification(script.MnistCnnConfig())
model = perforate(model, DendriteArguments(), args)
trainer = PerforatedTrainer(
    model=model,
    args=args,
    train_dataset=train,
    eval_dataset=validation,
    data_collator=lambda rows: rows,
    compute_metrics=script.compute_metrics,
)
scores = trainer.evaluate()
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
scores["losses"] = losses
if args.process_index == 0:
    Path("scores.json").write_text(json.dumps(scores))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
