"""The model card: description, metadata, and the code that loads the model."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from perforated_trainer.model_card import add_metadata, model_card

NAMES = ["f1, macro", "точность", "a|b", "x: y #z", "- [1]", "'\"", "$x_1$", "{}%s", "a\nb", "---", "n" * 300]
LAYERS = {
    f"bert.encoder.layer.{i}.{name}": 2 for i in range(7) for name in ("intermediate.dense", "attention.self.key")
}


def card(layers=None, model_class="BertForSequenceClassification", scores=None, **kwargs):
    dendrites = max((layers or {"": 0}).values())
    scores = {"validation_accuracy": 0.9, "test_accuracy": 0.8} if scores is None else scores
    results = {
        "dataset": kwargs.pop("dataset", {"name": "digits"}),
        "cycles": kwargs.pop("cycles", [{"dendrites": 0, "parameters": 1000}]),
        "final": {"dendrites": dendrites, "parameters": 2345} | scores,
    }
    given = {"name": "mine", "processor": True, "custom_code": False, "path": "run/final"} | kwargs
    return model_card(results, model_class=model_class, layers=layers, **given)


def front_matter(text):
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def code(text):
    blocks = re.findall("```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        compile(block, "card", "exec")
    return blocks


@pytest.mark.parametrize(
    "layers, words",
    [
        (LAYERS, "with 2 dendrites in each of 14 layers (`dense`, `key`), trained"),
        (
            LAYERS | {"classifier": 3},
            "with 2 to 3 dendrites in each of 15 layers (`dense`, `key`, `classifier`), trained",
        ),
        ({"classifier": 1}, "with 1 dendrite in 1 layer (`classifier`), trained"),
        ({"": 1}, "with 1 dendrite in 1 layer, trained"),
        ({"features.0": 1, "features.3": 1}, "with 1 dendrite in each of 2 layers (`features`), trained"),
        ({f"layer_{i}x": 1 for i in range(9)}, "with 1 dendrite in each of 9 layers, trained"),
    ],
)
def test_card_says_how_many_layers_have_dendrites(layers, words):
    text = card(layers)
    assert words in text and "2,345 parameters; 1,000 without dendrites" in text


def test_card_of_a_model_that_began_with_dendrites_does_not_guess_its_size_without():
    text = card(LAYERS, cycles=[{"dendrites": 1, "parameters": 1500}])
    assert "2,345 parameters. " in text and "1,500" not in text and "without dendrites" not in text


def test_card_of_a_stock_model_without_dendrites_is_a_stock_card():
    text = card()
    for word in ("trust_remote_code", "perforated", "dendrite", "next to", "quantization"):
        assert word not in text.lower()
    assert code(text)[0].startswith("from transformers import pipeline\n")
    assert 'AutoModelForSequenceClassification.from_pretrained("run/final")' in code(text)[1]
    (only,) = code(card(model_class="PatchTSTForPrediction", processor=False))
    assert (
        only == "from transformers import PatchTSTForPrediction\n\n"
        'model = PatchTSTForPrediction.from_pretrained("run/final")\n'
    )


def test_card_of_a_stock_model_with_dendrites_has_both_ways_to_load_it():
    text = card(LAYERS)
    alone, package, network = code(text)
    assert 'pipeline("text-classification", model="run/final", trust_remote_code=True)' in alone
    assert package.startswith("import perforated_trainer") and "trust_remote_code" not in package
    assert network.endswith('.from_pretrained("run/final", trust_remote_code=True)\n')
    assert "Unknown quantization type, got dendrites" in text and "Do not delete `quantization_config`" in text


@pytest.mark.parametrize("auto, name", [("AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM"), (None, "AutoModel")])
def test_card_with_dendrites_loads_by_an_auto_class_only(auto, name):
    text = card({"head": 1}, model_class="PatchTSTForPrediction", processor=False, auto_class=auto)
    alone, package = code(text)
    assert f"model = {name}.from_pretrained" in alone and f"model = {name}.from_pretrained" in package


@pytest.mark.parametrize("layers, of", [(LAYERS, "model and its dendrites"), (None, "model")])
def test_card_of_a_custom_model_needs_its_code(layers, of):
    text = card(layers, model_class="MineForImageClassification", custom_code=True)
    assert f"The code of the {of} is saved next to the weights" in text and "import perforated_trainer" not in text
    assert all("trust_remote_code=True" in block for block in code(text)) and len(code(text)) == 2


@pytest.mark.parametrize("layers", [LAYERS, None])
def test_card_without_saved_code_does_not_mention_it(layers):
    text = card(layers, model_class="MineForImageClassification", custom_code=True, has_code=False)
    (only,) = code(text)
    assert "trust_remote_code" not in text and "next to" not in text and "is not saved with the model" in text
    assert only.endswith('model = MineForImageClassification.from_pretrained("run/final")\n')
    assert only.startswith("import perforated_trainer") == bool(layers)


@pytest.mark.parametrize("text", ['my "run"/final', "a\\b", "x), y", "модель"])
def test_card_code_compiles_with_any_path(text):
    for block in code(card(LAYERS, path=text)):
        (literal,) = re.findall(r'(?:model=|pretrained\()("(?:[^"\\]|\\.)*")', block)
        assert yaml.safe_load(literal) == text


@pytest.mark.parametrize("name", NAMES)
def test_card_front_matter_and_table_are_valid_with_any_name(name):
    text = card(
        LAYERS, scores={f"validation_{name}": 0.5, f"test_{name}": float("nan")}, dataset={"name": name}, name=name
    )
    data = front_matter(text)
    assert data["model-index"][0]["name"] == name
    (result,) = {str(r["dataset"]["name"]) for r in data["model-index"][0]["results"]}
    assert result == name
    kinds = [metric["type"] for r in data["model-index"][0]["results"] for metric in r["metrics"]]
    assert kinds.count(name) == 2
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert ModelCard(text).data.to_dict()["model-index"]


def test_card_with_scores_that_are_no_numbers_is_written():
    text = card(LAYERS, scores={"validation_note": None, "validation_count": 3})
    assert "| validation note | None |" in text and "| validation count | 3 |" in text
    assert "| score |" not in card(LAYERS, scores={}) and front_matter(card(LAYERS, scores={}))


@pytest.mark.parametrize(
    "dataset, named", [({}, None), ({"name": "ylecun/mnist"}, ["ylecun/mnist"]), ({"name": "x"}, None)]
)
def test_card_names_data_of_the_hub_only(dataset, named):
    text = card(LAYERS, dataset=dataset)
    assert front_matter(text).get("datasets") == named
    assert ("Trained on" in text) == bool(dataset)


def test_card_fill_mask_uses_the_mask_of_the_tokenizer():
    assert "Some text with one <mask>." in code(card(model_class="BertForMaskedLM", mask="<mask>"))[0]


@pytest.mark.parametrize("layers, tags", [(LAYERS, ["perforated-ai", "dendrites", "tiny"]), (None, ["tiny"])])
def test_add_metadata_keeps_what_is_there(layers, tags):
    text = add_metadata(
        card(layers), language="en", license="mit", tags="tiny", finetuned_from="base", dataset=["a", "b"]
    )
    data = front_matter(text)
    assert data["tags"] == tags and data["language"] == "en" and data["license"] == "mit"
    assert data["base_model"] == "base" and data["datasets"] == ["a", "b"] and data["model-index"]
    assert front_matter(add_metadata(card(layers))) == front_matter(card(layers))
