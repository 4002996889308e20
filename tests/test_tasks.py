"""Scripts of transformers for six tasks, changed as in docs/any_script.md and run with its flags."""

import json
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from transformers import AutoTokenizer, Seq2SeqTrainer, Trainer

from perforated_trainer.callbacks import PlotCallback
from perforated_trainer.layers import layers_with_dendrites

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "stock_scripts.py"
HEAD, *SECTIONS = (ROOT / "docs" / "any_script.md").read_text().split("\n## ")
TASKS = {  # the class that loads the model
    "image_classification": "AutoModelForImageClassification",
    "text_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "masked_language_modeling": "AutoModelForMaskedLM",
    "causal_language_modeling": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
}
# Added to the flags of the page: cycles of one epoch, and more tries for a dendrite that does not help.
SHORT = "--output_dir run --max_dendrites 2 --max_dendrite_tries 3 --save_strategy no --use_cpu --report_to none "
SHORT += "--per_device_eval_batch_size 64 --per_device_train_batch_size "
OWN = {
    "image_classification": "8 --num_train_epochs 1 --learning_rate 1e-3",
    "text_classification": "8 --num_train_epochs 1 --learning_rate 6e-3",
    "token_classification": "16 --num_train_epochs 1 --learning_rate 5e-3",
    "masked_language_modeling": "16 --num_train_epochs 1 --learning_rate 2e-3",
    "causal_language_modeling": "16 --num_train_epochs 1 --learning_rate 2e-3",
    "translation": "8 --num_train_epochs 1 --learning_rate 1e-2 --generation_max_length 8",
}


def section(task):
    """The section of the page for a task."""
    (text,) = [text for text in SECTIONS if text.split(":")[0].lower().replace(" ", "_") == task]
    return text


def blocks(kind, text):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def turn(script, diff, own_lines=False):
    """Apply a diff. Its parts are separated by an empty line; each occurs in the script, at some indentation.

    If a script has `own_lines`, not every part must occur.
    """
    for part in diff.strip("\n").split("\n\n"):
        lines, found = part.splitlines(), False
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        for indentation in ("", "    ", "        "):
            old = "\n" + textwrap.indent(before, indentation)
            found |= old in script
            script = script.replace(old, "\n" + textwrap.indent(after, indentation))
        assert found or own_lines, f"no such lines in the script: {before}"
    return script


def flags(task):
    (line,) = blocks("bash", section(task))
    command, *words = line.replace("\\\n", " ").split()
    assert command == "python" and f"`{words[0]}`" in section(task).splitlines()[0]
    return words[1:] + (SHORT + OWN[task]).split()


def run(task, argv, monkeypatch):
    """Run the script in this process; return its trainer."""
    begin, *scripts = re.split(r"(?m)^# -+ run_\w+\.py\n", SCRIPTS.read_text())
    (script,) = [begin + script for script in scripts if f"def {task}(" in script]
    for diff in blocks("diff", HEAD):
        script = turn(script, diff, own_lines=task == "translation")
    for diff in blocks("diff", section(task)):
        script = turn(script, diff)
    module = ModuleType("script")
    monkeypatch.setitem(sys.modules, "script", module)
    monkeypatch.setattr(sys, "argv", [f"{task}.py", *argv])
    exec(compile(script, f"{task}.py", "exec"), module.__dict__)
    return getattr(module, task)()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PlotCallback, "draw", lambda *args, **kwargs: None)  # most of the time; test_script covers it


def written(name):
    return json.loads(Path("run", name).read_text())


def test_page_has_each_task():
    assert [text.split(":")[0].lower().replace(" ", "_") for text in SECTIONS[: len(TASKS)]] == list(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_task_trains_improves_and_loads(task, monkeypatch):
    trainer = run(task, flags(task), monkeypatch)
    cycles, final = trainer.cycles(), trainer.num_dendrites
    assert [cycle["dendrites"] for cycle in cycles] == list(range(len(cycles))) and len(cycles) > 1
    steps, number = trainer.restarts[0], len(trainer.restarts) + 1
    assert trainer.stopped_by == "tracker" and trainer.state.global_step == number * steps
    assert trainer.restarts == [steps * n for n in range(1, number)]

    # The metric of the script decides, and it is better with dendrites.
    metric = trainer.args.metric_for_best_model
    assert trainer.args.greater_is_better == (metric != "loss")
    scores = [cycle["best_validation"] * (-1 if metric == "loss" else 1) for cycle in cycles]
    assert final and scores[final] == max(scores) > scores[0]

    # The saved model is the trained one: the stock Trainer gets the scores of the script from it.
    kind = Seq2SeqTrainer if task == "translation" else Trainer
    model = getattr(transformers, TASKS[task]).from_pretrained("run").eval()
    layers = layers_with_dendrites(model).values()
    assert {layer.num_dendrites for layer in layers} == {final} and model.get_output_embeddings() not in layers
    assert model.num_parameters() == trainer.num_parameters
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, trainer.model.eval()(**batch).logits)
    parts = "args data_collator eval_dataset processing_class compute_metrics preprocess_logits_for_metrics"
    stock = kind(model=model, **{part: getattr(trainer, part) for part in parts.split()})
    generation = {"max_length": 8, "num_beams": 1} if task == "translation" else {}
    results, evaluated = written("all_results.json"), stock.evaluate(**generation)
    scores = {
        name: score for name, score in evaluated.items() if not re.search("epoch|runtime|per_second|preparation", name)
    }
    assert f"eval_{metric}" in scores and {name: results[name] for name in scores} == pytest.approx(scores, abs=1e-4)

    # The rest of the script has run.
    assert {"train_loss", "train_samples", "eval_samples"} <= results.keys()
    assert ("perplexity" in results) == ("modeling" in task)
    assert ("predict_loss" in results) == (task in ("token_classification", "translation"))
    predictions = [*Path("run").glob("*predict*.txt")]
    assert len(predictions) == (task in ("text_classification", "token_classification", "translation"))
    assert all(len(file.read_text().splitlines()) == 60 for file in predictions)
    assert written("trainer_state.json")["global_step"] == number * steps and Path("run/README.md").is_file()
    if task != "image_classification":
        tokenizer = AutoTokenizer.from_pretrained("run")
        assert tokenizer("the one")["input_ids"] == trainer.processing_class("the one")["input_ids"]


def test_flags_are_read_from_a_file(monkeypatch):
    """A script also accepts a JSON file of flags."""
    values = {"output_dir": "run", "use_cpu": True, "report_to": "none", "do_train": True, "do_eval": True}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "metric_for_best_model": "accuracy"}
    Path("flags.json").write_text(json.dumps(values | {"switch_mode": "fixed", "max_dendrites": 7}))
    trainer = run("text_classification", ["flags.json"], monkeypatch)
    assert trainer.dendrite_args.max_dendrites == 7 and trainer.restarts[0] == 2
