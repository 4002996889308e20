"""Runs the script and writes a hash of its parameters at the start, at each step and evaluation, and at the end."""

import hashlib
import json
import os
import sys
from pathlib import Path

from transformers import TrainerCallback

import mnist_huggingface_perforatedai as script

hashes = []
rank = os.environ["RANK"]


def digest(model):
    values = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values.update(name.encode() + tensor.contiguous().numpy().tobytes())
    hashes.append(values.hexdigest())


class Hashing(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        digest(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        digest(model)
        if args.run_name == "rank 1 dies" and rank == "1" and state.global_step == 12:
            os._exit(1)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        digest(model)


class HashingTrainer(script.AugmentingTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Hashing())

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        digest(self.model)
        Path(f"hashes-{rank}.json").write_text(json.dumps(hashes))
        return output


script.AugmentingTrainer = HashingTrainer
sys.exit(script.main())
