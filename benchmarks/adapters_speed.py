"""Speed, parameters and memory of low-rank dendrites, compared with training without them and with LoRA.

    OMP_NUM_THREADS=1 python benchmarks/adapters_speed.py           measure, record, print the table
    OMP_NUM_THREADS=1 python benchmarks/adapters_speed.py --table   print the table of the last record

A BERT of hidden size 256 and 4 layers, batches of 16 sequences of 128 tokens, AdamW, one thread. All linear layers of
the blocks have dendrites, or LoRA of peft with the same rank. The networks take turns in one process, one step each,
timed by CPU time; a ratio is the median over the turns. Memory is the peak of a separate process per network, minus its
memory before the network was created. Appends one JSON line per measurement to benchmarks/results/adapters_speed.jsonl.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "adapters_speed.jsonl"
RANK = 8
WITHOUT, LOW, FULL = "without dendrites", "three dendrites of rank 8", "three dendrites of full rank"
FROZEN, ALONE, LORA = (
    "frozen, one dendrite of rank 8",
    "frozen, the same without an activation",
    "frozen, LoRA of rank 8",
)
NETWORKS = {  # arguments of DendriteArguments
    WITHOUT: None,
    LOW: {"dendrite_rank": RANK, "num_initial_dendrites": 3},
    FULL: {"num_initial_dendrites": 3},
    LORA: None,
    FROZEN: {"dendrite_rank": RANK, "num_initial_dendrites": 1, "freeze_base": True},
    ALONE: {
        "dendrite_rank": RANK,
        "num_initial_dendrites": 1,
        "freeze_base": True,
        "dendrite_activation": "identity",
    },
}
LAYERS = r"bert\.encoder\..*"
# For each measure the network to compare with, and the limit: a minimum for speed, else a maximum.
TARGETS = {LOW: {"speed": (WITHOUT, 0.75), "parameters": (WITHOUT, 1.15)}}
TARGETS |= {FROZEN: {"speed": (LORA, 1.0), "memory": (LORA, 1.05)}}


def build(name: str):
    """Build a network.

    Args:
        name (`str`): A key of `NETWORKS`.

    Returns:
        `tuple`: The network in training mode, and a batch for it.
    """
    import peft
    import torch
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from perforated_trainer import DendriteArguments, PerforatedTrainer

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    model = BertForSequenceClassification(BertConfig(vocab_size=1000, max_position_embeddings=128, **sizes))
    batch = {"input_ids": torch.randint(1000, (16, 128)), "labels": torch.arange(16) % 2}
    if name == LORA:
        linear = [n for n, m in model.bert.encoder.named_modules() if isinstance(m, torch.nn.Linear)]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linear), model)
        model.classifier.requires_grad_(True)
    elif NETWORKS[name]:
        chosen = {"module_names_to_perforate": [], "module_ids_to_perforate": [LAYERS]}
        chosen |= {"modules_to_train": ["classifier"]} if "freeze_base" in NETWORKS[name] else {}
        args = TrainingArguments("run", use_cpu=True, eval_strategy="steps", metric_for_best_model="loss")
        dendrite_args = DendriteArguments(**NETWORKS[name] | chosen)
        PerforatedTrainer(model=model, args=args, dendrite_args=dendrite_args, eval_dataset=[batch])
    return model.train(), batch


def stepper(name: str):
    """Build a network and its optimizer.

    Args:
        name (`str`): A key of `NETWORKS`.

    Returns:
        `tuple`: A function that does one training step, and the network.
    """
    import torch

    model, batch = build(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def in_use(what: str) -> float:
    """Memory of this process in MiB: current (`"VmRSS"`) or peak (`"VmHWM"`). Linux only."""
    return float(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def memory(name: str) -> None:
    """Print the peak memory of a few steps, in MiB above that before the network was created."""
    import peft  # noqa: F401 - each process imports the same
    import torch

    import perforated_trainer.trainer  # noqa: F401

    torch.set_num_threads(1)
    before = in_use("VmRSS")
    step, _ = stepper(name)
    for _ in range(4):
        step()
    print(in_use("VmHWM") - before)


def profile(name: str, rows: int) -> None:
    """Print a profile of the training step of a network, the `rows` most expensive operations first."""
    import torch

    step, _ = stepper(name)
    step()
    with torch.profiler.profile() as found:
        for _ in range(3):
            step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40))


def measure(repeats: int) -> dict:
    import torch

    torch.set_num_threads(1)
    steps = {name: stepper(name) for name in NETWORKS}
    seconds = {name: [] for name in NETWORKS}
    for _ in range(repeats + 2):
        for name, (step, _) in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    rows = {}
    for name, (_, model) in steps.items():
        found = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True)
        rows[name] = {
            "milliseconds": [round(1000 * value, 2) for value in seconds[name][2:]],  # the first two warm up
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory": round(float(found.stdout.splitlines()[-1]), 1),
        }
    packages = ("torch", "transformers", "perforatedai", "peft")
    return {
        "networks": rows,
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "command": shlex.join(["python", *sys.argv]),
    }


def compared(rows: dict, name: str, what: str, other: str) -> float:
    """Ratio of two networks.

    Args:
        rows (`dict`): The networks of a record.
        name (`str`): Network that is compared.
        what (`str`): "speed", "parameters" or "memory".
        other (`str`): Network that it is compared with.

    Returns:
        `float`: The ratio; for speed the median over paired steps.
    """
    if what != "speed":
        return rows[name][what] / rows[other][what]
    pairs = zip(rows[other]["milliseconds"], rows[name]["milliseconds"], strict=True)
    return statistics.median(reference / candidate for reference, candidate in pairs)


def print_table(record: dict) -> None:
    rows = record["networks"]
    print(f"{record['machine']}, {', '.join(' '.join(pair) for pair in record['versions'].items())}; ", end="")
    print(f"`{record['command']}`\n")
    print("| network | ms per step | speed / without | speed / LoRA | parameters | trained | memory, MiB | target |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        speeds = [f"{compared(rows, name, 'speed', other):.2f}" for other in (WITHOUT, LORA)]
        cells = [name, f"{statistics.median(row['milliseconds']):.0f}", *speeds]
        cells += [f"{row['parameters']:,}", f"{row['trained']:,}", f"{row['memory']:.0f}"]
        targets = []
        for what, (other, limit) in TARGETS.get(name, {}).items():
            found = compared(rows, name, what, other)
            met = found >= limit if what == "speed" else found <= limit
            targets.append(f"{what} {found:.2f} of {limit:.2f}, {'met' if met else 'missed'}")
        print("|", " | ".join([*cells, "; ".join(targets)]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="timed steps of each network")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--profile", choices=list(NETWORKS), help="print a profile of the training step of a network")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if args.memory:
            return memory(args.memory)
        if args.profile:
            return profile(args.profile, 20)
        if not args.table:
            record = measure(args.repeats)
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print_table(json.loads(RESULTS.read_text().splitlines()[-1]))


if __name__ == "__main__":
    main()
