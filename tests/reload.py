"""Answers, for each line `CLASS FOLDER`: the tied names and the logits of the model that was saved in this folder."""

import json
import sys

import models
import torch

from perforated_trainer import load_perforated_model

for line in sys.stdin:
    name, folder = line.split()
    model = load_perforated_model(models.model_class(name), f"{folder}/final")
    with torch.no_grad():
        logits = model(**torch.load(f"{folder}/batch.pt")).logits
    torch.save(logits, f"{folder}/reloaded.pt")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"tied": models.tied(model), "parameters": count}), flush=True)
