"""A trained model in pipelines, in other runtimes, and in the code of `docs/deploy.md` and of the model card."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import models
import numpy
import pytest
import small_bert
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, ViTImageProcessor, pipeline

from mnist_huggingface_perforatedai import DataArguments, load_data, read_embedded
from perforated_trainer import layers

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """Folder with `mnistHF`, `bertMLM` and two images, in which the code of the pages can be run."""
    folder = tmp_path_factory.mktemp("deploy")
    shutil.copytree(finished / "run", folder / "mnistHF")
    before = Path.cwd()
    os.chdir(folder)
    try:
        small_bert.train("bertMLM")
    finally:
        os.chdir(before)
    for name, image in zip(("digit", "picture"), test_digits()[0], strict=False):
        Image.fromarray(image.numpy()).save(folder / f"{name}.png")
    return folder


def test_digits():
    """The test images of `kills.FLAGS`: gray values, uint8 (200, 28, 28), and the dataset."""
    return read_embedded()[1][0][:200], load_data(DataArguments(max_train_samples=500, max_eval_samples=200))[3]


test_digits.__test__ = False


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def card_of(folder, name):
    """The model card, with the folder name of the pages instead of "run", the folder of `finished`."""
    return (folder / name / "final/README.md").read_text().replace("run/final", "mnistHF/final")


STOCK = """
from transformers import pipeline
try:
    pipeline("fill-mask", model="bertMLM/final")
except (OSError, ValueError) as error:  # a pipeline tries several classes
    print(error)
"""
FILL = """
from transformers import pipeline
fill = pipeline("fill-mask", model="bertMLM/final"{})
print([answer["score"] for answer in fill("the value of the [MASK] is an object", top_k=3)])
"""


@pytest.fixture(scope="module")
def printed(folder):
    """What each piece of code prints, by name: run one after the other in two new processes without perforatedai, with
    the package and without it."""
    docs = blocks((ROOT / "docs/deploy.md").read_text())
    loads = [code for code in docs if "perforated" not in code and "from_pretrained" in code]
    alone = {"stock": STOCK, "fill": FILL.format(", trust_remote_code=True"), "docs alone": "\n".join(loads)}
    package = {"fill with the package": "import perforated_trainer\n" + FILL.format("")}
    if all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime"))):
        package["docs"] = "\n".join(docs)
    for name in ("mnistHF", "bertMLM"):
        for number, code in enumerate(blocks(card_of(folder, name))):
            (package if "import perforated_trainer" in code else alone)[f"{name} {number}"] = code
    return run(alone, folder, False) | run(package, folder, True)


def run(codes, folder, package):
    """Run pieces of code in a new process where perforatedai cannot be imported; without `package`, neither can
    perforated_trainer."""
    blocked = ["perforatedai"] + ([] if package else ["perforated_trainer"])
    script = f"""
import contextlib, io, json, sys
for name in {blocked}:
    sys.modules[name] = None
printed = {{}}
for name, code in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, name, "exec"), {{"__name__": "code"}})
    printed[name] = output.getvalue()
print(json.dumps(printed))
"""
    environment = os.environ | {"HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT) if package else ""}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        input=json.dumps(codes),
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------ pipelines


def test_pipeline_answers_for_pngs_with_the_accuracy_of_the_results(finished, tmp_path):
    (images, digits), files = test_digits(), []
    for number, image in enumerate(images):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image.numpy()).save(files[-1])
    classify = pipeline("image-classification", model=str(finished / "run/final"), trust_remote_code=True)
    answers = classify(files, batch_size=50, top_k=10)
    assert sorted(answer["label"] for answer in answers[0]) == [str(digit) for digit in range(10)]
    labels = digits[:]["labels"].tolist()
    right = [int(answer[0]["label"]) == label for answer, label in zip(answers, labels, strict=True)]
    results = json.loads((finished / "run/results.json").read_text())
    assert sum(right) / len(right) == results["final"]["test_accuracy"]
    # The processor computes as transformers does, which rounds differently from torchvision.
    ours = digits[:]["pixel_values"]
    processor = ViTImageProcessor.from_pretrained(finished / "run/final")
    theirs = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    assert theirs.shape == (len(files), 3, 28, 28)
    assert (theirs - ours).abs().max() < 1e-6
    with torch.no_grad():
        assert torch.equal(classify.model(theirs).logits, classify.model(theirs[:, :1]).logits)
        assert (classify.model(theirs).logits - classify.model(ours).logits).abs().max() < 1e-5


def test_pipeline_takes_large_and_gray_images(finished, tmp_path):
    classify = pipeline("image-classification", model=str(finished / "run/final"), trust_remote_code=True)
    image = Image.fromarray(test_digits()[0][0].numpy())
    large = image.resize((280, 280))
    assert classify(image)[0]["label"] == classify(large)[0]["label"]
    assert classify.image_processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize("name", ["fill with the package", "fill"])
def test_fill_mask_pipeline_gives_the_scores_of_the_model(folder, printed, name):
    model = AutoModelForMaskedLM.from_pretrained(folder / "bertMLM/final")
    inputs = small_bert.tokenizer()("the value of the [MASK] is an object", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["input_ids"] == models.MASK]
    assert json.loads(printed[name]) == pytest.approx(logits.softmax(-1).topk(3).values[0].tolist(), rel=1e-5)


def test_stock_transformers_without_the_code_is_an_error(printed):
    assert "no file named model.safetensors" in printed["stock"]


# ------------------------------------------------------------------------------------------------ the card and the docs


@pytest.mark.parametrize("name", ["mnistHF", "bertMLM"])
def test_model_card_has_the_scores_and_code_that_runs(folder, printed, name):
    text = card_of(folder, name)
    card, results = ModelCard(text), json.loads((folder / name / "results.json").read_text())["final"]
    ModelCard.load(folder / name / "final" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == {"mnistHF": "image-classification", "bertMLM": "fill-mask"}[name]
    measured = {}
    for result in card.data.eval_results:
        assert "MNIST digits" in result.dataset_name or name == "bertMLM"
        measured[result.metric_name] = result.metric_value
    for key, value in results.items():
        metric = "dendrites of a layer" if key == "dendrites" else key.replace("_", " ")
        assert measured.pop(metric) == value
    without = json.loads((folder / name / "results.json").read_text())["cycles"][0]["parameters"]
    assert measured == {"parameters without dendrites": without}
    assert f"{results['parameters']:,}" in text and f"{without:,}" in text
    codes = blocks(text)
    assert len(codes) == {"mnistHF": 2, "bertMLM": 3}[name]
    assert f'pipeline("{data["pipeline_tag"]}"' in codes[0]
    for number, code in enumerate(codes):
        output = printed[f"{name} {number}"]
        assert ("label" in output or "token_str" in output) == ("pipeline" in code)


def test_code_of_the_page_runs(folder, printed):
    if "docs" not in printed:
        pytest.skip("onnxscript or onnxruntime is not installed")
    assert "label" in printed["docs"] and "token_str" in printed["docs"]
    for name in ("mnist.onnx", "bert.onnx", "mnist.int8.onnx", "bert.int8.onnx", "mnist.pt2"):
        assert (folder / name).stat().st_size > 1000
        assert not (folder / f"{name}.data").exists()
    for name in ("mnist.onnx", "bert.onnx"):
        for path in (ROOT, sys.prefix):
            assert str(path).encode() not in (folder / name).read_bytes()


# ------------------------------------------------------------------------------------------------------- other runtimes


def resnet():
    """A small ResNet with two dendrites on each convolution and linear layer."""
    torch.manual_seed(0)
    model = models.build("ResNetForImageClassification")
    for module in list(model.modules()):
        if layers.can_fuse(module):
            layers.add_dendrites(module, 2)
    for name, parameter in model.named_parameters():
        if "dendrite_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def case(kind, folder):
    """A model, inputs of two examples, their dynamic dimensions, and inputs of `count` examples."""
    batch = torch.export.Dim("batch")
    if kind == "bert":
        model = AutoModelForMaskedLM.from_pretrained(folder / "bertMLM/final")
        length = torch.export.Dim("length", max=model.config.max_position_embeddings)
        free = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}

        def inputs(count):
            ids = torch.randint(1, 900, (count, 8 + count % 5))
            mask = torch.ones_like(ids)
            mask[0, -2:] = 0
            return {"input_ids": ids, "attention_mask": mask}
    else:
        shape = {"mnist": (1, 28, 28), "resnet": (3, 28, 28)}[kind]
        free = {"pixel_values": {0: batch}}
        model = resnet()
        if kind == "mnist":
            path = folder / "mnistHF/final"
            model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)

        def inputs(count):
            return {"pixel_values": torch.randn(count, *shape)}

    return model, inputs, free


@pytest.mark.parametrize("kind", ["mnist", "bert", "resnet"])
def test_exported_program_equals_the_model_at_any_batch_size(kind, folder):
    model, inputs, free = case(kind, folder)
    exported = torch.export.export(model, (), inputs(2), dynamic_shapes=free).module()
    for count in (1, 3, 64):
        batch = inputs(count)
        with torch.no_grad():
            torch.testing.assert_close(exported(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mnist", "bert", "resnet"])
def test_onnx_and_int8_equal_the_model(kind, folder, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, inputs, free = case(kind, folder)
    program = torch.onnx.export(
        model, (), kwargs=inputs(2), dynamic_shapes=free, dynamo=True, output_names=["logits"], verbose=False
    )
    ClearMetadataAndDocStringPass()(program.model)
    plain, small = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    program.save(plain)
    quantize_dynamic(plain, small, weight_type=QuantType.QUInt8)
    for file, limit in ((plain, 1e-5), (small, 0.05)):
        session = onnxruntime.InferenceSession(file)
        for count in (1, 3, 64):
            batch = inputs(count)
            with torch.no_grad():
                expected = model(**batch).logits.numpy()
            logits = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0]
            assert logits.shape == expected.shape
            scale = 1 if file == plain else numpy.abs(expected).max()
            assert numpy.abs(logits - expected).max() < limit * scale
    if kind == "bert":  # in smaller ones the graph is most of the file
        assert small.stat().st_size < plain.stat().st_size / 2


# --------------------------------------------------------------------------------------------------- number of matmuls


class Count(TorchDispatchMode):
    """Counts the matmuls and convolutions that PyTorch computes."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "conv2d")

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] += any(product in name for product in self.PRODUCTS)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "layer, matmuls",
    [(torch.nn.Linear(6, 4), 2), (torch.nn.Conv2d(6, 4, 3), 2), (torch.nn.Conv2d(6, 4, 3, groups=2), 4)],
)
def test_dendrites_of_a_layer_add_at_most_one_matmul(layer, matmuls):
    for dendrites, expected in ((0, 1), (3, matmuls)):
        part = layers.add_dendrites(copy.deepcopy(layer), dendrites)
        with Count() as count, torch.no_grad():
            part(torch.randn(2, 6) if isinstance(layer, torch.nn.Linear) else torch.randn(2, 6, 5, 5))
        assert 1 <= count.calls.total() <= expected, count.calls


def test_saved_network_computes_at_most_two_matmuls_per_layer(folder):
    model = AutoModelForImageClassification.from_pretrained(folder / "mnistHF/final", trust_remote_code=True)
    assert [layer.num_dendrites for layer in layers.layers_with_dendrites(model).values()] == [2] * 4
    with Count() as count, torch.no_grad():
        model(torch.randn(2, 1, 28, 28))
    assert 4 <= count.calls.total() <= 8, count.calls
