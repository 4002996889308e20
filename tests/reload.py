"""Reads lines `CLASS FOLDER PART` and returns the tied names and the logits of the model in FOLDER/PART."""

import json
import sys

import models
import torch

import perforated_trainer  # noqa: F401 - the import registers dendrites with from_pretrained

sys.modules["perforatedai"] = None  # importing it is an error
for line in sys.stdin:
    name, folder, part = line.split()
    model = models.model_class(name).from_pretrained(f"{folder}/{part}")
    with torch.no_grad():
        logits = model(**torch.load(f"{folder}/batch.pt")).logits
    torch.save(logits, f"{folder}/reloaded.pt")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"tied": models.tied(model), "parameters": count}), flush=True)
