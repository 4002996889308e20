"""The model card: the README.md next to a model."""

import json
import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .report import count, number, unit

TASKS = {  # the end of a model's class name: its pipeline, its Auto class, and an example input of the pipeline
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification", "picture.png"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM", "Some text with one [MASK]."),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "Some text."),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "Some text."),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "Some text"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM", "Some text"),
}


def add_metadata(card: str, language=None, license=None, tags=(), finetuned_from=None, dataset=None) -> str:
    """The card with the metadata that `Trainer.create_model_card` receives.

    Args:
        card (`str`): A value of `model_card`.
        language, license, finetuned_from (`str`, *optional*): As in `Trainer.create_model_card`.
        tags, dataset (`str` or `list[str]`, *optional*): As in `Trainer.create_model_card`.

    Returns:
        `str`: The changed card.
    """
    card = ModelCard(card)
    tags = [tags] if isinstance(tags, str) else tags or ()
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags])) or None
    given = {"language": language, "license": license, "base_model": finetuned_from}
    for name, value in given.items():
        if value is not None:
            setattr(card.data, name, value)
    if dataset is not None:
        card.data.datasets = [dataset] if isinstance(dataset, str) else list(dataset)
    return str(card)


def model_card(
    results: dict,
    name: str,
    model_class: str,
    processor: bool,
    custom_code: bool,
    path: str,
    mask: str | None = None,
    layers: dict[str, int] | None = None,
    auto_class: str | None = None,
    has_code: bool = True,
    is_plain: bool = False,
) -> str:
    """The README.md of a model: metadata with the scores, and the lines that load it, ready to copy.

    Args:
        results (`dict`): What `results.json` holds.
        name (`str`): Name of the model on the Hub.
        model_class (`str`): Name of the model's class, such as "BertForMaskedLM".
        processor (`bool`): Whether an image processor or a tokenizer is saved with the model.
        custom_code (`bool`): Whether the model's class is not one of transformers.
        path (`str`): Argument of `from_pretrained`: the model's folder, or its name on the Hub with the user's.
        mask (`str`, *optional*): The mask token of the tokenizer.
        layers (`dict[str, int]`, *optional*): Number of dendrites of each layer that has some, by its name.
        auto_class (`str`, *optional*): The Auto class in the model's `config.json`. By default that of the task.
        has_code (`bool`): Whether all code that the model needs is saved with it.
        is_plain (`bool`): Whether the model is a `torch.nn.Module` that is not one of transformers.

    Returns:
        `str`: The text, with YAML front matter.
    """
    layers, final = layers or {}, results["final"]
    end = next((end for end in TASKS if model_class.endswith(end)), None)
    stock = not layers and not custom_code  # a model of transformers like any other
    task, auto, example = TASKS.get(end, (None, auto_class or (model_class if stock else "AutoModel"), ""))
    data = results["dataset"].get("name")
    scores = {key: value for key, value in final.items() if key not in ("dendrites", "parameters")}
    first = results["cycles"][0] if results["cycles"] else final
    without = first["parameters"] if layers and not first["dendrites"] else None
    metadata = ModelCardData(
        library_name="pytorch" if is_plain else "transformers",
        pipeline_tag=None if is_plain else task,
        tags=["perforated-ai", "dendrites"] if layers else None,
        datasets=[data] if re.fullmatch(r"[\w.-]+/[\w.-]+", data or "") else None,  # its name on the Hub
        model_name=name,
        eval_results=_eval_results(scores, final, without, bool(layers), task or "other", data or "not named") or None,
    )
    card = f"""---
{metadata.to_yaml()}
---
# {_one_line(name)}

{_description(model_class, layers, final["parameters"], without, data)}
"""
    if scores:
        rows = [(key.replace("_", " "), number(value)) for key, value in scores.items()]
        card += "\n" + "".join(
            f"| {_cell(key)} | {_cell(value)} |\n" for key, value in [("score", "value"), ("---", "---"), *rows]
        )
    card += "\n## How to use it\n"

    def loads(trust=""):
        return [f"from transformers import {auto}", "", f"model = {auto}.from_pretrained({_quoted(path)}{trust})"]

    def uses(trust=""):
        if not (task and processor):
            return loads(trust)
        call = f'model = pipeline("{task}", model={_quoted(path)}{trust})'
        shows = f"print(model({_quoted(example.replace('[MASK]', mask or '[MASK]'))}))"
        return ["from transformers import pipeline", "", call, shows]

    package, trust = "import perforated_trainer  # lets transformers load dendrites", ", trust_remote_code=True"
    if is_plain:
        lines = ["from perforated_trainer import load_perforated_model", ""]
        lines.append(f"model = load_perforated_model({model_class}(), {_quoted(path)})")
        return (
            f"{card}\nIn a program that defines `{model_class}`, for a new module without dendrites:\n{_block(lines)}"
        )
    if not has_code:
        card += f"\nThe code of `{model_class}` is not saved with the model. In a program that defines it:\n"
        lines = [f"model = {model_class}.from_pretrained({_quoted(path)})"]
        card += _block([package, "", *lines] if layers else lines)
    elif stock:
        card += _block(uses())
    else:
        of = "dendrites" if not custom_code else "model and its dendrites" if layers else "model"
        card += f"\nWith PyTorch and transformers alone. The code of the {of} is saved next to the weights:\n"
        card += _block(uses(trust))
        if not custom_code:
            card += "\nWith the package `perforated_trainer`, which needs no `trust_remote_code`:\n"
            card += _block([package, *uses()])
    if has_code and task and processor:
        card += "\nThe network itself:\n" + _block(loads("" if stock else trust))
    if layers:
        card += (
            "\nIf transformers prints `Unknown quantization type, got dendrites`, it was loaded in another way.\n"
            "Do not delete `quantization_config` from `config.json`, as it then proposes: it describes the dendrites.\n"
        )
    return card


def _description(
    model_class: str, layers: dict[str, int], parameters: int, without: int | None, data: str | None
) -> str:
    """What the model is, in one paragraph."""
    words = f"A `{model_class}`"
    if layers:
        least, most = min(layers.values()), max(layers.values())
        dendrites = count(most, "dendrite") if least == most else f"{least} to {most} dendrites"
        kinds = dict.fromkeys(re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2] for name in layers)
        shown = f" ({', '.join(f'`{kind}`' for kind in kinds)})" if len(kinds) <= 8 and all(kinds) else ""
        words += f" with {dendrites} in {'each of ' if len(layers) > 1 else ''}{count(len(layers), 'layer')}{shown}, "
        words += "trained with Perforated AI's dendrites"
    words += f". {parameters:,} parameters"
    words += f"; {without:,} without dendrites." if without else "."
    return words + (f" Trained on: {_one_line(data)}." if data else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _one_line(text).replace("\\", "\\\\").replace("|", "\\|")


def _quoted(text: str) -> str:
    """A text as a literal of Python."""
    return json.dumps(text, ensure_ascii=False)


def _block(lines: list[str]) -> str:
    return "\n".join(["", "```python", *lines, "```", ""])


def dendrites_card(model_class: str, base: dict, layers: dict[str, int], trained: int) -> str:
    """The README.md of a folder that holds dendrites without their base.

    Args:
        model_class (`str`): Name of the model's class.
        base (`dict`): As `sharing.base_of` returns it.
        layers (`dict[str, int]`): Number of dendrites of each layer that has some, by its name.
        trained (`int`): Number of parameters in the folder.

    Returns:
        `str`: The text, with YAML front matter.
    """
    number = max(layers.values(), default=0)
    name, on_the_hub = base["name"], re.fullmatch(r"[\w.-]+/[\w.-]+", base["name"])
    metadata = ModelCardData(
        library_name="transformers",
        tags=["perforated-ai", "dendrites"],
        base_model=name if on_the_hub else None,
    )
    quantized = f", quantized ({base['quantized']})" if base.get("quantized") else ""
    place = "" if on_the_hub else " That is the name by which it was loaded, and may be a path of another machine."
    alone = f"""
Or in one call, if the base can be found by its name:

```python
import perforated_trainer
from transformers import {model_class}

model = {model_class}.from_pretrained("this folder")
```
"""
    return f"""---
{metadata.to_yaml()}
---
# Dendrites for {_one_line(name)}

The {trained:,} trained parameters of a `{model_class}`: {count(number, "dendrite")} per layer in
{count(len(layers), "layer")}, and what was trained next to them. The base, {_one_line(name)}{quantized}, is not in this
folder.{place}

```python
from perforated_trainer import load_dendrites
from transformers import {model_class}

base = {model_class}.from_pretrained({_quoted(name)})
model = load_dendrites(base, "this folder")
```
{"" if quantized else alone}"""


def _eval_results(scores, final, without, has_dendrites, task, data) -> list[EvalResult]:
    """The scores for `model-index`. Dendrites and parameters are metrics of the last part of the data, the test's."""

    def result(split, kind, value, name):
        kind_of_data = re.sub(r"[^\w./-]+", "-", data)
        return EvalResult(task, kind_of_data, data, kind, value, dataset_split=split, metric_name=name)

    numbers = {key: value for key, value in scores.items() if isinstance(value, (int, float))}  # not a list or None
    results = [result(key.split("_")[0], unit(key), value, key.replace("_", " ")) for key, value in numbers.items()]
    if results and has_dendrites:
        split = results[-1].dataset_split
        results.append(result(split, "dendrites", final["dendrites"], "dendrites of a layer"))
        results.append(result(split, "parameters", final["parameters"], "parameters"))
        if without:
            results.append(result(split, "parameters", without, "parameters without dendrites"))
    return results
