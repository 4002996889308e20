"""The model card: the README.md that lies beside a model."""

import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .report import count, unit

TASKS = {  # the end of a model's class name, and the pipeline that it is for
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
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


def model_card(results: dict, name: str, model_class: str, processor: bool, custom_code: bool) -> str:
    """The README.md of the model: metadata with the scores, and the lines that load it, ready to copy.

    Args:
        results: what `results.json` holds.
        name: of the model on the Hub.
        model_class: the class of the model, such as "BertForMaskedLM".
        processor: whether an image processor or a tokenizer lies beside the model.
        custom_code: whether the model's class is not one of transformers'.
    """
    task = next((task for end, task in TASKS.items() if model_class.endswith(end)), None)
    data, final = results["dataset"].get("name", "not named"), results["final"]
    scores = {key: value for key, value in final.items() if key not in ("dendrites", "parameters")}
    evaluations = [
        EvalResult(
            task_type=task or "other",
            dataset_type=re.sub(r"[^\w./-]+", "-", data),
            dataset_name=data,
            dataset_split=key.split("_")[0],
            metric_type=unit(key),
            metric_value=value,
            metric_name=key.replace("_", " "),
        )
        for key, value in scores.items()
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["perforated-ai", "dendrites"],
        model_name=name,
        eval_results=evaluations or None,
    )
    without = results["cycles"][0]["parameters"] if results["cycles"] else final["parameters"]
    code = "import perforated_trainer\n"
    trusted = ", trust_remote_code=True" if custom_code else ""
    if task and processor:
        code += f'from transformers import pipeline\n\nmodel = pipeline("{task}", model="."{trusted})'
    elif custom_code:
        auto = f"AutoModel{next((end for end in TASKS if model_class.endswith(end)), '')}"
        code += f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("."{trusted})'
    else:
        code += f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained(".")'
    shown = "\n".join(f"| {key.replace('_', ' ')} | {value:.4f} |" for key, value in scores.items())
    return f"""---
{metadata.to_yaml()}
---
# {name}

A `{model_class}` with {count(final["dendrites"], "dendrite")} in each layer that can have some, trained with Perforated
AI's dendrites. {final["parameters"]:,} parameters; {without:,} without dendrites. Trained on: {data}.

| score | value |
| --- | --- |
{shown}

To use it from this folder (`"."` is its path, or its name on the Hub):

```python
{code}
```

Without `perforated_trainer`, the code in the folder does the same: leave out that import and give
`trust_remote_code=True`.
"""
