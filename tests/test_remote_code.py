"""The code that is saved with a model: what is extracted, and that the folder loads without the package."""

import importlib
import json
import linecache
import os
import runpy
import subprocess
import sys
import types

import pytest
import torch
import transformers
from models import CONFIGS, build

from perforated_trainer import layers, remote_code, saving

HEAD = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
"""
CONFIG = """
class MineConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODEL = """
class Mine(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.post_init()

    def forward(self, x):
        return BaseModelOutput(self.layer(x) if USED else x)
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that imports `mine.py` with a text that defines `USED`."""
    loaded = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(text="USED = True", uses="USED", tail="", encoding="utf-8"):
        source = text + "\n" + HEAD + CONFIG + MODEL.replace("USED", uses) + tail
        (tmp_path / "mine.py").write_bytes(source.encode(encoding))
        importlib.invalidate_caches()
        return importlib.import_module("mine")

    yield load
    for name in set(sys.modules) - loaded:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def extract(module):
    """Run the code that is saved. Returns its text and the names of the constants to review."""
    text, constants = remote_code.extract(module.Mine, module.MineConfig)
    namespace = {"__name__": "saved"}
    exec(compile(text, "saved", "exec", dont_inherit=True), namespace)
    assert namespace["Mine"](namespace["MineConfig"]())(torch.zeros(1, 4)).last_hidden_state.shape == (1, 4)
    return text, [name.split(" ")[0] for name in constants]


def refused(module):
    with pytest.raises((OSError, ValueError)) as caught:
        remote_code.extract(module.Mine, module.MineConfig)
    return str(caught.value)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(remote_code.logger, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == remote_code.__name__]


def save(module, folder, code=None):
    """Save a model and its code. Returns whether the code was saved, and its text."""
    model = module.Mine(module.MineConfig())
    model.save_pretrained(folder)
    done = (code or remote_code.ModelCode(model)).save(folder, model)
    file = folder / "modeling_mine.py"
    return done, file.read_text(encoding="utf-8") if file.exists() else None


# --------------------------------------------------------------------------------------------------- no secret is saved


@pytest.mark.parametrize(
    "text, kept",
    [
        ('import os as USED\nUSED.environ["KEY"] = "hunter2"\nUSED.environ.setdefault("KEY", "hunter2")', "os as USED"),
        ('(USED, KEY), OTHER = (1, "hunter2"), "hunter2"', "USED = 1"),
        ('USED, (KEY, OTHER) = [1, ("hunter2", "hunter2")]', "USED = 1"),
        ('KEY = "hunter2"\nUSED = 1  # hunter2', "USED = 1"),
        ('import json as USED\nfor _ in range(2):\n    USED.key = "hunter2"', "import json as USED"),
        ('USED = 1\nif __name__ == "mine":\n    USED = 1\n    KEY = "hunter2"', "USED = 1"),
        ('try:\n    import json as USED\n    OTHER = 2\nexcept ImportError:\n    USED = None\nKEY = "hunter2"', "try:"),
    ],
)
def test_extract_definitions_leave_secrets_out(load, text, kept):
    code, constants = extract(load(text))
    assert kept in code and "hunter2" not in code and constants == []


@pytest.mark.parametrize(
    "text",
    [
        "with open(__file__) as file:\n    USED = file.read()",
        "for USED in range(3):\n    pass",
        "USED = 0\nwhile USED < 3:\n    USED += 1",
        "try:\n    print('hunter2')\n    USED = 1\nfinally:\n    pass",
        "import os\nos.environ['X'] = USED = 'hunter2'",
        "import os\nif os.getpid():\n    USED = 1\n    os.environ['X'] = 'hunter2'",
        "import os\nif os.getpid():\n    USED = 1\n    KEY = 'hunter2'",
        "USED = []\nfor name in 'abc':\n    USED.append(name)",
        "globals()['USED'] = 'hunter2'",
    ],
)
def test_extract_statement_that_does_more_raises(load, text):
    line = refused(load(text))
    assert "\n" not in line and "hunter2" not in line and "mine.py" in line


@pytest.mark.parametrize(
    "text",
    [
        "from transformers.utils import logging\nUSED = logging.get_logger(__name__)",
        'from typing import TypeVar\nUSED = TypeVar("USED")',
        "USED = {}\nUSED[1] = 3",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nowhere\nUSED = 1",
        "try:\n    import nowhere as USED\nexcept ImportError:\n    USED = True",
        "def USED():\n    return 1\nUSED.number = 3",
        "from math import *\nUSED = pi",
        "USED: int = 3",
        "import functools\n@functools.cache\ndef USED():\n    # a comment\n    return 1",
        "import functools\n@\\\nfunctools.cache\ndef USED():\n    return 1",
    ],
)
def test_extract_definition_is_taken_silently(load, text):
    code, constants = extract(load(text))
    assert text.split("\n")[-1] in code and constants == []


def test_model_code_constants_with_a_text_are_named_in_one_warning(load, warnings):
    mine = load(
        'NAME = "abc"\nNAMES = {}\nNAMES["a"] = f"{NAME} x"\nNUMBER, OTHER = 3, b"unused"\nUSED = NAMES and NUMBER'
    )
    code = remote_code.ModelCode(mine.Mine(mine.MineConfig()))
    assert code.is_usable and "unused" not in code.text
    (warning,) = warnings()
    assert (
        "constants: NAME (line 1 of mine.py), NAMES (line 3 of mine.py). Make sure" in warning and "abc" not in warning
    )


def test_extract_takes_what_is_needed_and_nothing_else(load):
    text = """
import sys, os.path
from torch import optim, nn as layers_of_torch
if len(sys.argv) > 999:
    sys.exit()
WIDTHS: dict[str, int] = {}
WIDTHS["a"] = 3
UNUSED = 4
def unused(): return os
def twice(function):
    return function
@twice
def width(name: layers_of_torch.Module) -> int:
    model = WIDTHS[name]  # a local variable, not the model below
    return [model for model in (model,)][0]
"""
    code, _ = extract(
        load(text, uses="width('a')", tail="\nMine.register_for_auto_class()\nmodel = Mine(MineConfig())")
    )
    for needed in ('WIDTHS["a"]', "@twice", "def twice", "import nn as layers_of_torch", "# a local"):
        assert needed in code
    for other in ("sys", "import os", "UNUSED", "unused", "optim", "register", "model = Mine"):
        assert other not in code, other


# ------------------------------------------------------------------------------------ what is saved is what was trained


def test_save_source_edited_after_construction_saves_the_old_one(load, tmp_path):
    mine = load()
    code = remote_code.ModelCode(mine.Mine(mine.MineConfig()))
    file = tmp_path / "mine.py"
    file.write_text(file.read_text().replace("self.layer(x)", "self.layer(2 * x)"))
    done, text = save(mine, tmp_path / "saved", code)
    assert done and "self.layer(x)" in text and "2 * x" not in text


@pytest.mark.parametrize(
    "old, new",
    [
        ("self.layer(x)", "self.layer(x + 1)"),
        ("def forward(self, x)", "def call(self, x)"),
        ("        self.post_init()\n", "        self.post_init()\n\n    def added(self):\n        return 1\n"),
        ("return x + 1", "return x + 2"),
        ("return 7", "return 8"),
        ("class Mine(", "class Other("),
    ],
)
def test_model_code_source_edited_before_construction_saves_nothing(load, tmp_path, warnings, old, new):
    tail = "\n    @property\n    def seven(self):\n        return 7\n"
    mine = load("def helper(x=3):\n    return x + 1\n", uses="helper()", tail=tail)
    file = tmp_path / "mine.py"
    text = file.read_text()
    file.write_text("# a comment, and lines have moved\n\n" + text)
    assert "def forward" in extract(mine)[0]
    file.write_text(text.replace(old, new))
    done, text = save(mine, tmp_path / "saved")
    assert not done and text is None and len(warnings()) == 1
    assert "auto_map" not in (tmp_path / "saved/config.json").read_text()


def test_model_code_method_replaced_at_run_time_saves_nothing(load):
    mine = load()
    mine.Mine.forward = lambda self, x: x
    assert "not the one in memory" in refused(mine)


@pytest.mark.parametrize("encoding, cookie", [("latin-1", "latin-1"), ("utf-8-sig", "utf-8"), ("utf-8", "")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_extract_encodings_and_ends_of_lines_are_read(load, encoding, cookie, end):
    text = (f"# -*- coding: {cookie} -*-\n" if cookie else "") + 'USED = "é"'
    tail = "\n    def last(self):\n        return 1\n"
    code, _ = extract(load(text.replace("\n", end), tail=tail.replace("\n", end), encoding=encoding))
    assert 'USED = "é"' in code and "def last" in code


@pytest.mark.parametrize("separator", ["\f", "\u2028", "\u2029", "\x85", "\v", "\x1c"])
def test_extract_characters_that_splitlines_knows_cut_nothing(load, separator):
    text = f'import functools\nA = "{separator}" # {separator}\n{separator if separator == chr(12) else ""}\n'
    text += "@functools.cache\ndef used():\n    return len(A)\n"
    code, _ = extract(load(text, uses="used()", tail=f"    # {separator}\n\n    def last(self):\n        return 1\n"))
    assert "def forward" in code and "def last" in code and "@functools.cache" in code


def test_model_code_damaged_source_gives_one_warning(load, tmp_path, warnings, caplog):
    mine = load()
    for damaged in (b"# coding: nothing\n", "USED = 'é'".encode("latin-1"), b"\0", b"class Mine(", None):
        caplog.clear()
        (tmp_path / "mine.py").write_bytes(damaged) if damaged else (tmp_path / "mine.py").unlink()
        assert not remote_code.ModelCode(mine.Mine(mine.MineConfig())).is_usable
        assert len(warnings()) == 1 and "\n" not in warnings()[0]


def test_model_code_class_in_a_function_gives_one_warning_with_what_to_do(tmp_path, warnings):
    class Local(transformers.BertForMaskedLM):
        pass

    model = Local(transformers.BertConfig(**CONFIGS["BertForMaskedLM"]))
    model.save_pretrained(tmp_path)
    assert not remote_code.save_code(model, tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    (warning,) = warnings()
    assert "loads only with Local.from_pretrained" in warning and "move Local into a .py file" in warning


@pytest.mark.parametrize(
    "imports, inside",
    [
        ("from .configuration import MineConfig", ""),
        ("from minepackage.configuration import MineConfig", ""),
        ("from .configuration import *", ""),
        (CONFIG, "        from minepackage.configuration import KEY\n"),
    ],
)
def test_extract_import_of_another_file_of_the_project_raises(load, tmp_path, imports, inside):
    folder = tmp_path / "minepackage"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "configuration.py").write_text(HEAD + 'KEY = "hunter2"\n' + CONFIG)
    body = MODEL.replace("        return Base", inside + "        return Base")
    (folder / "model.py").write_text(HEAD + imports + "\nUSED = 1\n" + body)
    module = importlib.import_module("minepackage.model")
    module.Mine(module.MineConfig())(torch.zeros(1, 4))
    line = refused(module)
    assert "another file of the same project" in line or "MineConfig is not defined at the top level" in line


# ------------------------------------------------------------------------------------------------------------ notebooks


@pytest.fixture
def notebook(monkeypatch):
    """A `__main__` without a file, to which cells are added; IPython keeps their texts in `In`."""

    def notebook(*cells, keeps=True):
        module = types.ModuleType("cells")
        monkeypatch.setitem(sys.modules, "cells", module)
        module.In = ["", *cells] if keeps else []
        for i, cell in enumerate(cells):
            try:
                exec(compile(cell, f"<cell {i}>", "exec"), vars(module))
            except (NameError, SyntaxError):
                continue
        return module

    return notebook


def test_extract_notebook_takes_the_last_definition_at_the_first_place(notebook):
    cells = [HEAD, "USED = 'x'", "nothing(", "get_ipython().run_line_magic('x', '')", "USED = 2", CONFIG]
    wrong = MODEL.replace("self.layer(x)", "self.layer(x + nowhere)")
    code, _ = extract(notebook(*cells, wrong, MODEL, HEAD, "model = Mine(MineConfig())"))
    assert code.count("class Mine(") == code.count("import nn") == 1 and code.index("import nn") < code.index("class")
    assert "USED = 2" in code and not [word for word in ("nowhere", "get_ipython", "model = ") if word in code]


def test_extract_notebook_class_of_an_older_cell_raises(notebook):
    old = notebook(HEAD, "USED = 2", CONFIG, MODEL).Mine
    module = notebook(HEAD, "USED = 2", CONFIG, MODEL, MODEL.replace("self.layer(x)", "self.layer(x + 1)"))
    assert "x + 1" in extract(module)[0]
    module.Mine = old
    assert "not the one in memory" in refused(module)


def test_extract_text_known_to_tracebacks_is_used(notebook, monkeypatch):
    source = HEAD + "USED = 1\n" + CONFIG + MODEL
    monkeypatch.setitem(linecache.cache, "<cell 0>", (len(source), None, source.splitlines(True), "<cell 0>"))
    assert "def forward" in extract(notebook(source, keeps=False))[0]


def test_model_code_typed_class_gives_one_warning(notebook, warnings):
    module = notebook(HEAD, "USED = 1", CONFIG, MODEL, keeps=False)
    assert not remote_code.ModelCode(module.Mine(module.MineConfig())).is_usable
    assert len(warnings()) == 1 and "its source is not available" in warnings()[0]


# ----------------------------------------------------------------------------------------------------- in the folder


def dendritic(model, *names):
    """Give layers of a model two dendrites each, with random numbers."""
    for name in names:
        layers.add_dendrites(model.get_submodule(name), 2)
    for name, parameter in model.named_parameters():
        if "dendrite" in name:
            torch.nn.init.normal_(parameter)
    return saving.make_dendritic(model)


def test_save_stock_model_without_dendrites_writes_nothing(tmp_path):
    model = build("DistilBertForSequenceClassification")
    for saved in (model, saving.make_dendritic(model)):
        saved.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert remote_code.save_code(saved, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_stock_model_with_dendrites_names_all_heads(tmp_path):
    model = dendritic(build("DistilBertForSequenceClassification"), "classifier")
    model.save_pretrained(tmp_path)
    assert remote_code.save_code(model, tmp_path)
    assert set(saving.code_of_dendrites()) == {path.name for path in tmp_path.glob("*.py")}
    code = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    for name, cls in (("", "Model"), ("ForSequenceClassification",) * 2, ("ForMaskedLM",) * 2):
        assert code[f"AutoModel{name}"] == f"{saving.CODE}.DistilBert{cls}"


def test_save_model_that_gets_dendrites_later_writes_their_code_then(load, tmp_path):
    mine = load('"""Two\nlines."""\n\nfrom __future__ import annotations\nUSED = 1')
    model = mine.Mine(mine.MineConfig())
    code = remote_code.ModelCode(model)
    for name, expected in (("without", False), ("with", True)):
        if expected:
            dendritic(model, "layer")
        model.save_pretrained(tmp_path / name)
        assert code.save(tmp_path / name, model)
        text = (tmp_path / name / "modeling_mine.py").read_text()
        assert compile(text, "saved", "exec")  # the import from __future__ comes first
        assert (f"from .{saving.CODE} import" in text) == expected
        assert (tmp_path / name / f"{saving.CODE}.py").exists() == expected


def test_save_links_in_the_folder_are_replaced_and_not_followed(load, tmp_path):
    model = dendritic(load().Mine(sys.modules["mine"].MineConfig()), "layer")
    folder, victim = tmp_path / "saved", tmp_path / "victim"
    model.save_pretrained(folder)
    victim.write_text((folder / "config.json").read_text())
    names = ["modeling_mine.py", "config.json", *saving.code_of_dendrites()]
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    before, files = victim.read_text(), {path.name for path in folder.iterdir()}
    assert remote_code.save_code(model, folder)
    assert victim.read_text() == before and not [name for name in names if (folder / name).is_symlink()]
    assert {path.name for path in folder.iterdir()} == files


def test_script_run_as_main_saves_its_model_without_its_secrets(tmp_path, monkeypatch):
    text = 'import os\nos.environ["OPENAI_API_KEY"] = "sk-SECRET"\nUSED, PASSWORD = 4, "hunter2"\n'
    end = "if __name__ == '__main__':\n    from perforated_trainer.remote_code import ModelCode\n"
    end += "    MODEL = Mine(MineConfig())\n    CODE = ModelCode(MODEL)\n"
    (tmp_path / "train.py").write_text(
        text + HEAD + CONFIG + MODEL.replace("if USED", "if os.cpu_count() + USED") + end
    )
    monkeypatch.setenv("OPENAI_API_KEY", "")
    code = runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")["CODE"]
    assert code.is_usable and "class Mine(" in code.text
    assert not [word for word in ("SECRET", "hunter2", "environ", "ModelCode") if word in code.text]


LOAD = """
import sys
from pathlib import Path
sys.modules["perforatedai"] = sys.modules["perforated_trainer"] = None
import torch, transformers

def load(folder, kind="AutoModel"):
    return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True).eval()

for folder in map(Path, sys.argv[1:]):
    batch, expected = torch.load(folder / "expected.pt")
    model = load(folder)
    assert torch.equal(model(batch).last_hidden_state, expected), folder
    model.save_pretrained(folder / "again")
    assert torch.equal(load(folder / "again")(batch).last_hidden_state, expected), folder
    if folder.name == "bert":
        classifier = load(folder, "AutoModelForSequenceClassification")
        assert torch.equal(classifier.bert(batch).last_hidden_state, expected)
        classifier.save_pretrained(folder / "classifier")
        same = load(folder / "classifier", "AutoModelForSequenceClassification")
        assert torch.equal(same(batch).logits, classifier(batch).logits)
    else:
        assert transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "mine"
print("equal")
"""


@pytest.mark.slow
def test_new_process_loads_models_from_their_folders_alone(load, tmp_path, monkeypatch):
    """transformers prints "Unknown quantization type" if no code of the folder was run; the BERT comes first."""
    bert = dendritic(
        build("BertForMaskedLM"), "bert.encoder.layer.0.intermediate.dense", "cls.predictions.transform.dense"
    )
    mine = load()
    models = {"bert": bert.eval(), "plain": mine.Mine(mine.MineConfig())}
    models["with"] = dendritic(mine.Mine(mine.MineConfig()), "layer")
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        assert remote_code.save_code(model, tmp_path / name)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    models["grown"] = dendritic(loaded, "layer")
    loaded.save_pretrained(tmp_path / "grown")
    assert remote_code.save_code(loaded, tmp_path / "grown")
    for name, model in models.items():
        batch = torch.arange(8).view(2, 4) if name == "bert" else torch.randn(2, 4)
        body = getattr(model, "bert", model)
        torch.save((batch, body(batch).last_hidden_state.detach()), tmp_path / name / "expected.pt")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in models)],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("equal\n") and "quantization" not in done.stderr, done.stderr[-3000:]


def test_auto_classes_are_those_of_the_class_that_it_is_made_from():
    class Mine(transformers.BertForMaskedLM):
        pass

    assert remote_code.auto_classes(Mine, transformers.BertConfig) == ["AutoModelForMaskedLM"]
    assert remote_code.auto_classes(torch.nn.Module, transformers.BertConfig) == ["AutoModel"]


def test_model_code_of_a_module_that_is_not_loaded_is_not_usable():
    config = type("GoneConfig", (transformers.PreTrainedConfig,), {"model_type": "gone", "__module__": "gone"})
    gone = type("Gone", (transformers.PreTrainedModel,), {"config_class": config, "__module__": "gone"})
    assert remote_code.ModelCode(gone(config())).is_usable is False
