"""The model card: the README.md that lies beside a model."""

import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .report import count, unit

TASKS = {  # the end of a model's class name: the pipeline that it is for, its Auto class, and what the pipeline reads
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification", "picture.png"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM", "Some text with one [MASK]."),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "Some text."),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "Some text."),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "Some text"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM", "Some text"),
}


def add_metadata(card: str, language=None, license=None, tags=(), finetuned_from=None, dataset=None) -> str:
    """The card with what `Trainer.create_model_card` is told of a model; each is a text, some may be a list."""
    card = ModelCard(card)
    tags = [tags] if isinstance(tags, str) else tags or ()
    card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
    given = {"language": language, "license": license, "base_model": finetuned_from}
    for name, value in given.items():
        if value is not None:
            setattr(card.data, name, value)
    if dataset is not None:
        card.data.datasets = [dataset] if isinstance(dataset, str) else list(dataset)
    return str(card)


def model_card(
    results: dict, name: str, model_class: str, processor: bool, custom_code: bool, path: str, mask: str | None = None
) -> str:
    """The README.md of the model: metadata with the scores, and the lines that load it, ready to copy.

    Args:
        results: what `results.json` holds.
        name: of the model on the Hub.
        model_class: the class of the model, such as "BertForMaskedLM".
        processor: whether an image processor or a tokenizer lies beside the model.
        custom_code: whether the model's class is not one of transformers'.
        path: what `from_pretrained` gets: the model's folder, or its name on the Hub with the user's.
        mask: the tokenizer's word for a hidden token.
    """
    end = next((end for end in TASKS if model_class.endswith(end)), None)
    task, auto, example = TASKS.get(end, (None, None if custom_code else model_class, None))
    auto = auto or "AutoModel"
    data, final = results["dataset"].get("name", "not named"), results["final"]
    without = results["cycles"][0]["parameters"] if results["cycles"] else final["parameters"]
    scores = {key: value for key, value in final.items() if key not in ("dendrites", "parameters")}
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["perforated-ai", "dendrites"],
        datasets=[data] if re.fullmatch(r"[\w.-]+/[\w.-]+", data) else None,  # its name on the Hub
        model_name=name,
        eval_results=_eval_results(scores, final, without, task or "other", data) or None,
    )
    loads = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{path}"'
    if task and processor:
        example = example.replace("[MASK]", mask or "[MASK]")
        uses = f'from transformers import pipeline\n\nmodel = pipeline("{task}", model="{path}"'
        shows = f')\nprint(model("{example}"))'
    else:
        uses, shows = loads, ")"
    alone = uses + ", trust_remote_code=True" + shows
    shown = "\n".join(f"| {key.replace('_', ' ')} | {value:.4f} |" for key, value in scores.items())
    card = f"""---
{metadata.to_yaml()}
---
# {name}

A `{model_class}` with {count(final["dendrites"], "dendrite")} in each layer that can have some, trained with Perforated
AI's dendrites. {final["parameters"]:,} parameters; {without:,} without dendrites. Trained on: {data}.

| score | value |
| --- | --- |
{shown}

## How to use it

With PyTorch and transformers alone. The code for the dendrites lies beside the weights:

```python
{alone}
```
"""
    if not custom_code:
        card += f"""
With the package `perforated_trainer`, which needs no `trust_remote_code`:

```python
import perforated_trainer  # its import teaches transformers to load dendrites
{uses + shows}
```
"""
    if uses is not loads:
        card += f"""
The network itself:

```python
{loads}, trust_remote_code=True)
```
"""
    return card


def _eval_results(scores: dict, final: dict, without: int, task: str, data: str) -> list[EvalResult]:
    """The scores for `model-index`. Dendrites and parameters are metrics of the last part of the data, the test's."""

    def result(split, kind, value, name):
        kind_of_data = re.sub(r"[^\w./-]+", "-", data)
        return EvalResult(task, kind_of_data, data, kind, value, dataset_split=split, metric_name=name)

    results = [result(key.split("_")[0], unit(key), value, key.replace("_", " ")) for key, value in scores.items()]
    if results:
        split = results[-1].dataset_split
        results += [
            result(split, "dendrites", final["dendrites"], "dendrites of a layer"),
            result(split, "parameters", final["parameters"], "parameters"),
            result(split, "parameters", without, "parameters without dendrites"),
        ]
    return results
