"""The code that is saved with a model: what is taken from its source, and that the folder loads with it alone."""

import importlib
import json
import linecache
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from models import CONFIGS, build

from perforated_trainer import layers, loading, remote_code

ROOT = Path(remote_code.__file__).parents[1]
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
    """Import `mine.py` with this text in place of the model's definitions of `USED`; as a function."""
    loaded = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(text="USED = True", uses="USED", head=HEAD, tail="", name="mine"):
        source = head + text + "\n" + CONFIG + MODEL.replace("USED", uses) + tail
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - loaded:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def extract(module):
    """The text of the only file, and what it must be checked for."""
    files, doubtful = remote_code.extract(module.Mine, module.MineConfig)
    assert list(files) == ["modeling_mine"]
    namespace = {"__name__": "saved"}
    exec(compile(files["modeling_mine"], "saved", "exec"), namespace)
    assert namespace["Mine"](namespace["MineConfig"]())(torch.zeros(1, 4)).last_hidden_state.shape == (1, 4)
    return files["modeling_mine"], [name.split(" ")[0] for name in doubtful]


def refused(module):
    with pytest.raises((OSError, ValueError)) as caught:
        remote_code.extract(module.Mine, module.MineConfig)
    return str(caught.value)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == remote_code.__name__]


@pytest.fixture
def caplog(caplog, monkeypatch):
    monkeypatch.setattr(remote_code.logger, "propagate", True)
    return caplog


# --------------------------------------------------------------------------------------------------- no secret is saved


def test_extract_script_with_secrets_leaves_them_out(load):
    code, doubtful = extract(
        load(
            'import os\nos.environ["OPENAI_API_KEY"] = "sk-SECRET"\nWIDTH, PASSWORD = 4, "hunter2"\n'
            'os.environ.setdefault("TOKEN", "sk-SECRET")\n',
            uses="os.cpu_count() + WIDTH",
        )
    )
    assert "import os" in code and "WIDTH = 4" in code and doubtful == []
    assert not [word for word in ("SECRET", "hunter2", "environ", "PASSWORD") if word in code]


@pytest.mark.parametrize(
    "text, kept",
    [
        ('(USED, KEY), OTHER = (1, "hunter2"), "hunter2"', "USED = 1"),
        ('USED, (KEY, OTHER) = [1, ("hunter2", "hunter2")]', "USED = 1"),
        (
            'try:\n    import json as USED\n    KEY = "hunter2"\nexcept ImportError:\n    USED = None',
            "import json as USED",
        ),
        ('if 1 + 1 == 2:\n    USED = 1\n    KEY = "hunter2"\nelse:\n    USED = None', "USED = 1"),
        ('KEY = "hunter2"\nUSED = 1  # hunter2', "USED = 1"),
        ('import json as USED\nUSED.key = "hunter2"', "import json as USED"),
        ('import json as USED\nUSED.keys = {}\nUSED.keys["key"] = "hunter2"', "import json as USED"),
        ('import json as USED\nfor _ in range(2):\n    USED.key = "hunter2"', "import json as USED"),
        ('USED = 1\nif __name__ != "x":\n    USED = 1\n    KEY = "hunter2"', "USED = 1"),
    ],
)
def test_extract_statement_with_more_than_needed_takes_the_needed_part(load, text, kept):
    code, doubtful = extract(load(text))
    assert kept in code and "hunter2" not in code and doubtful == []


@pytest.mark.parametrize(
    "text",
    [
        'import os\nUSED = os.environ.get("USED", "x")',
        'import os\nUSED = os.environ["USED"]',
        "import os\nUSED = os.environ",
        'from os import environ\nUSED = environ.get("USED", "x")',
        'from os import getenv\nUSED = getenv("USED", "x")',
        "import getpass\nUSED = getpass.getuser()",
        "USED = open(__file__).read()",
        "USED = (lambda: open(__file__).read())()",
        "USED = list(map(lambda name: open(name), [__file__]))",
        'USED = eval("1")',
        'import json\nUSED = json.loads("1")',
        "import types\nclient = types.SimpleNamespace()\nimport argparse\nUSED = argparse.Namespace(key='hunter2')",
        "import torch\nUSED = torch.manual_seed(0)",
        "with open(__file__) as file:\n    USED = file.read()",
        "for USED in range(3):\n    pass",
        "USED = 0\nwhile USED < 3:\n    USED += 1",
        "print(USED := 1)",
        "try:\n    print('hunter2')\n    USED = 1\nfinally:\n    pass",
        "import os\nif os.getpid():\n    USED = 1",
        "import os\nos.environ['X'] = USED = 'hunter2'",
        "import types\nUSED = types.SimpleNamespace()\nUSED.key = 'hunter2'",
        "USED = {}\nfor name in 'abc':\n    USED[name] = 1",
        "USED = []\nfor name in 'abc':\n    USED.append(name)",
        "USED = []\nUSED.append('hunter2')",
        "import json\nclass USED:\n    json.key = 'hunter2'",
        "class USED:\n    print('hunter2')",
        "import os\ndef USED(key=os.environ.get('KEY')):\n    return key",
        "globals()['USED'] = 'hunter2'",
    ],
)
def test_extract_statement_that_does_something_is_refused(load, text, monkeypatch):
    monkeypatch.setenv("USED", "hunter2")
    line = refused(load(text))
    assert "\n" not in line and "hunter2" not in line and "mine.py" in line


@pytest.mark.parametrize(
    "text",
    [
        "from transformers.utils import logging\nUSED = logging.get_logger(__name__)",
        'from typing import TypeVar\nUSED = TypeVar("USED")',
        "USED = nn.ReLU()",
        "import torch\nUSED = torch.arange(3).float().sum() + 1",
        "USED = [len(str(i)) for i in range(3)]",
        "USED = {}\nUSED[1] = 3",
        "USED = 1\nUSED += 3",
        "import numpy as np\nUSED = np.sqrt(4)",
        "from functools import partial\nUSED = partial(nn.Linear, 3)",
        "from transformers.utils import is_scipy_available\nUSED = 1\nif is_scipy_available():\n    USED = 2",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nowhere\nUSED = 1",
        "try:\n    import nowhere as USED\nexcept ImportError:\n    USED = True",
        "def USED():\n    return 1\nUSED.number = 3",
        "from math import *\nUSED = pi",
        "USED: int = 3",
        "USED = lambda x: x + 1",
    ],
)
def test_extract_definition_that_computes_is_taken_silently(load, text):
    code, doubtful = extract(load(text))
    assert all(line.strip() in code for line in text.split("\n")[-1:]) and doubtful == []


@pytest.mark.parametrize(
    "text, names",
    [
        ('USED = "abc"', ["USED"]),
        ('USED = b"abc"', ["USED"]),
        ('A = "abc"\nB = ["abc", 3]\nUSED = A + B[0]', ["A", "B"]),
        ('A = "abc"\nUSED = f"{A} {A}"', ["A", "USED"]),
        ('USED = {}\nUSED["abc"] = 3', ["USED"]),
        ("def make():\n    return 3\nUSED = make()", ["USED"]),
        ("import os\nE = os\nUSED = E.getpid()", ["USED"]),
        ("import os\nrun = os.getpid\nUSED = run()", ["USED"]),
        ("from os import *\nUSED = getpid()", ["USED"]),
        ("def named(key):\n    return lambda f: f\n@named('abc')\ndef USED():\n    return 1", ["USED"]),
    ],
)
def test_extract_text_or_own_call_is_named(load, text, names):
    assert extract(load(text))[1] == names


def test_model_code_texts_and_calls_give_one_warning(load, caplog):
    mine = load('NAME = "abc"\ndef make():\n    return 3\nUSED = make() and NAME')
    code = remote_code.ModelCode(mine.Mine(mine.MineConfig()))
    assert code.is_usable
    (warning,) = warnings(caplog)
    assert "NAME (line 5 of mine.py)" in warning and "USED (line 8" in warning and "abc" not in warning


def test_extract_takes_what_is_needed_and_nothing_else(load):
    code, _ = extract(
        load(
            """
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
""",
            uses="width('a')",
            tail="""
transformers = __import__("transformers")
transformers.AutoConfig.register("mine-one", type("X", (MineConfig,), {"model_type": "mine-one"}), exist_ok=True)
model = Mine(MineConfig())
""",
        )
    )
    for needed in ('WIDTHS["a"]', "@twice", "def twice", "import nn as layers_of_torch"):
        assert needed in code
    for other in ("sys", "import os", "UNUSED", "unused", "optim", "register", "model = Mine"):
        assert other not in code, other


# ------------------------------------------------------------------------------------ what is saved is what was trained


def save(module, folder, code=None):
    """Save a model and its code; whether it was, and the text of its file."""
    model = module.Mine(module.MineConfig())
    model.save_pretrained(folder)
    done = (code or remote_code.ModelCode(model)).save(folder, model)
    file = folder / "modeling_mine.py"
    return done, file.read_text(encoding="utf-8") if file.exists() else None


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
        ("BaseModelOutput(", "str("),
        ("def forward(self, x)", "def forward(self, x, y=None)"),
        ("def forward(self, x)", "def call(self, x)"),
        ("        self.post_init()\n", "        self.post_init()\n\n    def added(self):\n        return 1\n"),
        ('model_type = "mine"', 'model_type = "mine"\n    number = 8'),
        ("def helper(x=3)", "def helper(x=4)"),
        ("return x + 1", "return x + 2"),
        ("WIDTH = 3", "WIDTH = 4"),
        ("lambda: 1", "lambda: 2"),
        ("class Mine(", "class Other("),
    ],
)
def test_model_code_source_edited_before_construction_saves_nothing(load, tmp_path, caplog, old, new):
    mine = load("WIDTH = 3\ndef helper(x=3):\n    return x + 1\nONE = lambda: 1\n", uses="helper() + WIDTH + ONE()")
    file = tmp_path / "mine.py"
    text = file.read_text()
    if "number" in new:
        mine.MineConfig.number = 4
    file.write_text(text.replace(old, new))
    assert file.read_text() != text
    done, text = save(mine, tmp_path / "saved")
    assert not done and text is None and len(warnings(caplog)) == 1
    assert "auto_map" not in (tmp_path / "saved/config.json").read_text()


def test_extract_branch_that_was_not_taken_is_no_difference(load):
    text = "import torch\nif torch.cuda.device_count() > 99:\n    def USED():\n        return 1\nelse:\n    USED = 2\n"
    text += "if torch.cuda.device_count() > 99:\n    OTHER = 1\n    def other():\n        return 1"
    assert "def other" in extract(load(text, uses="USED or OTHER or other()"))[0]


def test_model_code_lines_moved_is_still_usable(load, tmp_path):
    mine = load()
    file = tmp_path / "mine.py"
    file.write_text("# a comment\n\n" + file.read_text())
    assert save(mine, tmp_path / "saved")[0]


def test_model_code_decorated_members_are_compared(load, tmp_path):
    mine = load(
        tail="\n    @property\n    def a(self):\n        return 1\n    @staticmethod\n    def b():\n        return 2\n"
    )
    file = tmp_path / "mine.py"
    assert "@property" in extract(mine)[0]
    for old in ("return 1", "return 2"):
        text = file.read_text()
        file.write_text(text.replace(old, "return 5"))
        assert "not the one in memory" in refused(mine)
        file.write_text(text)


def test_model_code_method_replaced_at_run_time_saves_nothing(load):
    mine = load()
    mine.Mine.forward = lambda self, x: x
    assert "not the one in memory" in refused(mine)


# ----------------------------------------------------------------------------------------------------------- the source


@pytest.mark.parametrize(
    "encoding, cookie", [("latin-1", "latin-1"), ("cp1252", "cp1252"), ("utf-8-sig", "utf-8"), ("utf-8", "")]
)
def test_extract_encoding_of_the_source_is_read(load, tmp_path, encoding, cookie):
    text = f"# -*- coding: {cookie} -*-\n" if cookie else ""
    text += HEAD + 'USED = "é"\n' + CONFIG + MODEL
    (tmp_path / "mine.py").write_bytes(text.encode(encoding))
    assert 'USED = "é"' in extract(importlib.import_module("mine"))[0]


@pytest.mark.parametrize("separator", ["\f", "\u2028", "\u2029", "\x85", "\v", "\x1c"])
def test_extract_characters_that_splitlines_knows_cut_nothing(load, separator):
    text = f'import functools\nA = "{separator}" # {separator}\n{separator if separator == chr(12) else ""}\n'
    text += "@functools.cache\ndef used():\n    return len(A)\n"
    code, _ = extract(load(text, uses="used()", tail=f"    # {separator}\n\n    def last(self):\n        return 1\n"))
    assert "def forward" in code and "def last" in code and "@functools.cache" in code


def test_extract_decorator_on_the_line_after_its_sign_is_kept(load):
    text = "import functools\n@\\\nfunctools.cache\ndef used():\n    return 1\n"
    assert "@functools.cache" in extract(load(text, uses="used()"))[0]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_extract_other_ends_of_lines_are_read(load, tmp_path, end):
    (tmp_path / "mine.py").write_bytes((HEAD + "USED = 1\n" + CONFIG + MODEL).replace("\n", end).encode())
    assert "def forward" in extract(importlib.import_module("mine"))[0]


def test_model_code_damaged_source_gives_one_warning(load, tmp_path, caplog):
    mine = load()
    for damaged in (b"# coding: nothing\n", "USED = 'é'".encode("latin-1"), b"\0", b"class Mine("):
        caplog.clear()
        (tmp_path / "mine.py").write_bytes(damaged)
        assert not remote_code.ModelCode(mine.Mine(mine.MineConfig())).is_usable
        assert len(warnings(caplog)) == 1
    (tmp_path / "mine.py").unlink()
    assert not remote_code.ModelCode(mine.Mine(mine.MineConfig())).is_usable


def test_model_code_class_in_a_function_gives_one_warning(tmp_path, caplog):
    class Local(transformers.BertForMaskedLM):
        pass

    model = Local(transformers.BertConfig(**CONFIGS["BertForMaskedLM"]))
    model.save_pretrained(tmp_path)
    assert not remote_code.save_code(model, tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    (warning,) = warnings(caplog)
    assert "loads only with Local.from_pretrained" in warning and "move Local into a .py file" in warning


# ------------------------------------------------------------------------------------------------------------ notebooks


@pytest.fixture
def notebook(monkeypatch):
    """A `__main__` without a file, to which cells are added; IPython keeps their texts in `In`."""

    def notebook(*cells, keeps=True):
        module = types.ModuleType("cells")
        monkeypatch.setitem(sys.modules, "cells", module)
        module.In = [""] if keeps else []
        for i, cell in enumerate(cells):
            if keeps:
                module.In.append(cell)
            try:
                exec(compile(cell, f"<cell {i}>", "exec"), vars(module))
            except (NameError, SyntaxError):
                continue
        return module

    return notebook


def test_extract_notebook_takes_the_last_definition_of_each_cell(notebook):
    cells = [HEAD, "USED = 'x'", "nothing(", "get_ipython().run_line_magic('x', '')", "USED = 2", CONFIG]
    wrong = MODEL.replace("self.layer(x)", "self.layer(x + nowhere)")
    code, _ = extract(notebook(*cells, wrong, MODEL, "model = Mine(MineConfig())"))
    assert code.count("class Mine(") == 1 and "nowhere" not in code and "get_ipython" not in code
    assert "USED = 2" in code and "model = " not in code


def test_extract_notebook_class_of_an_older_cell_is_refused(notebook):
    module = notebook(HEAD, "USED = 2", CONFIG, MODEL)
    old = module.Mine
    assert "def forward" in extract(module)[0]
    cell = MODEL.replace("self.layer(x)", "self.layer(x + 1)")
    module.In.append(cell)
    exec(compile(cell, "<cell 9>", "exec"), vars(module))
    assert "x + 1" in extract(module)[0]
    module.Mine = old
    assert "not the one in memory" in refused(module)


def test_extract_notebook_with_a_cell_run_again_keeps_the_order(notebook):
    module = notebook(HEAD, "USED = 2", CONFIG, MODEL, HEAD, CONFIG)
    module.Mine.config_class = module.MineConfig
    code, _ = extract(module)
    assert code.count("import nn") == 1 and code.index("import nn") < code.index("class MineConfig")
    class_first = CONFIG.replace("PreTrainedConfig", "Base")
    module = notebook(HEAD, "USED = 2", CONFIG, MODEL, "class Base(PreTrainedConfig):\n    pass", class_first)
    assert "Base is used before the cell" in refused(module)


def test_extract_text_known_to_tracebacks_is_used(notebook):
    source = HEAD + "USED = 1\n" + CONFIG + MODEL
    linecache.cache["<cell 0>"] = (len(source), None, source.splitlines(True), "<cell 0>")
    try:
        assert "def forward" in extract(notebook(source, keeps=False))[0]
    finally:
        del linecache.cache["<cell 0>"]


def test_model_code_typed_into_standard_input_gives_one_warning_with_what_to_do():
    end = "from perforated_trainer.remote_code import ModelCode\nprint(ModelCode(Mine(MineConfig())).is_usable)\n"
    done = subprocess.run(
        [sys.executable, "-"],
        input=HEAD + "USED = 1\n" + CONFIG + MODEL + end,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = [line for line in done.stderr.splitlines() if "cannot be saved" in line]
    assert done.stdout == "False\n" and len(lines) == 1, done.stderr[-2000:]
    assert "move Mine into a .py file" in lines[0]


# -------------------------------------------------------------------------------------------------------- several files


def package(tmp_path, config_import="from .configuration import MineConfig", **files):
    folder = tmp_path / "minepackage"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "configuration.py").write_text(HEAD + 'KEY = "hunter2"\n' + CONFIG)
    (folder / "model.py").write_text(HEAD + config_import + "\nUSED = 1\n" + MODEL)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return importlib.import_module("minepackage.model")


def test_extract_package_with_relative_imports_takes_each_file(load, tmp_path):
    blocks = "from .functions import NUMBER, double as twice\n"
    blocks += "class Block:\n    def run(self, x):\n        return twice(x) + NUMBER\n"
    functions = 'KEY = "hunter2"\nNUMBER = 4\ndef double(x):\n    return 2 * x\n'
    imports = "from .configuration import MineConfig\nfrom minepackage.blocks import Block"
    module = package(tmp_path, imports, blocks=blocks, functions=functions)
    text = (tmp_path / "minepackage/model.py").read_text()
    (tmp_path / "minepackage/model.py").write_text(text.replace("if USED", "if Block().run(1)"))
    module = importlib.reload(module)
    files, doubtful = remote_code.extract(module.Mine, module.MineConfig)
    assert sorted(files) == [
        "configuration_mine",
        "modeling_mine",
        "modeling_mine_minepackage_blocks",
        "modeling_mine_minepackage_functions",
    ]
    assert "from .configuration_mine import MineConfig" in files["modeling_mine"]
    assert (
        "from .modeling_mine_minepackage_functions import double as twice" in files["modeling_mine_minepackage_blocks"]
    )
    assert "hunter2" not in "".join(files.values()) and doubtful == []
    (tmp_path / "minepackage/functions.py").write_text(functions.replace("2 * x", "3 * x"))
    assert "not the one in memory" in refused(module)


@pytest.mark.parametrize(
    "imports",
    [
        "from . import configuration\nMineConfig = configuration.MineConfig",
        "import minepackage.configuration\nMineConfig = minepackage.configuration.MineConfig",
        "from .configuration import *",
    ],
)
def test_extract_module_imported_as_a_whole_is_refused(load, tmp_path, imports):
    assert "as a whole" in refused(package(tmp_path, imports))


def test_extract_import_inside_of_a_function_is_refused(load, tmp_path):
    module = package(tmp_path)
    text = (tmp_path / "minepackage/model.py").read_text()
    text = text.replace("        return BaseModel", "        from .configuration import KEY\n        return BaseModel")
    (tmp_path / "minepackage/model.py").write_text(text)
    assert "imports a file next to it inside of Mine" in refused(importlib.reload(module))


# ---------------------------------------------------------------------------------------------- what lies in the folder


def dendritic(model, *names):
    """Give layers of a model two dendrites each, with random numbers."""
    for name in names:
        layers.add_dendrites(model.get_submodule(name), 2)
    for name, parameter in model.named_parameters():
        if "dendrite" in name:
            torch.nn.init.normal_(parameter)
    return loading.make_dendritic(model)


def test_save_stock_model_without_dendrites_writes_nothing(tmp_path):
    model = build("DistilBertForSequenceClassification")
    for saved in (model, loading.make_dendritic(model)):
        saved.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert remote_code.save_code(saved, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_stock_model_with_dendrites_writes_their_code(tmp_path):
    model = dendritic(build("DistilBertForSequenceClassification"), "classifier")
    model.save_pretrained(tmp_path)
    assert remote_code.save_code(model, tmp_path)
    assert set(loading.code_of_dendrites()) == {path.name for path in tmp_path.glob("*.py")}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoModelForSequenceClassification": f"{loading.CODE}.DistilBertForSequenceClassification"
    }


def test_save_custom_model_without_dendrites_needs_no_code_of_dendrites(load, tmp_path):
    done, text = save(load(), tmp_path / "saved")
    assert done and loading.CODE not in text
    assert [path.name for path in (tmp_path / "saved").glob("*.py")] == ["modeling_mine.py"]


def test_save_model_that_gets_dendrites_later_writes_their_code_then(load, tmp_path):
    mine = load(head='"""Two\nlines."""\n\nfrom __future__ import annotations\n' + HEAD)
    model = mine.Mine(mine.MineConfig())
    code = remote_code.ModelCode(model)
    for folder, expected in (("without", False), ("with", True)):
        if expected:
            dendritic(model, "layer")
        model.save_pretrained(tmp_path / folder)
        assert code.save(tmp_path / folder, model)
        text = (tmp_path / folder / "modeling_mine.py").read_text()
        assert (
            (f"from .{loading.CODE} import" in text) == (tmp_path / folder / f"{loading.CODE}.py").exists() == expected
        )
        assert compile(text, "saved", "exec")  # the import from __future__ comes first


def test_save_links_in_the_folder_are_replaced_and_not_followed(load, tmp_path):
    model = dendritic(load().Mine(sys.modules["mine"].MineConfig()), "layer")
    folder, victim = tmp_path / "saved", tmp_path / "victim"
    model.save_pretrained(folder)
    victim.write_text((folder / "config.json").read_text())
    names = ["modeling_mine.py", "config.json", *loading.code_of_dendrites()]
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    before, files = victim.read_text(), {path.name for path in folder.iterdir()}
    assert remote_code.save_code(model, folder)
    assert victim.read_text() == before and not [name for name in names if (folder / name).is_symlink()]
    assert {path.name for path in folder.iterdir()} == files


LOAD = """
import sys
from pathlib import Path
sys.modules["perforatedai"] = sys.modules["perforated_trainer"] = None
import torch, transformers
for folder in map(Path, sys.argv[1:]):
    batch, expected = torch.load(folder / "expected.pt")
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(batch).last_hidden_state, expected), folder
    assert transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "mine"
    model.save_pretrained(folder / "again")
    again = transformers.AutoModel.from_pretrained(folder / "again", trust_remote_code=True)
    assert torch.equal(again(batch).last_hidden_state, expected), folder
print("equal")
"""


def test_new_process_loads_custom_models_from_the_folder_alone(load, tmp_path):
    folders = []
    for module in (load(), package(tmp_path)):
        for has_dendrites in (False, True):
            folder = tmp_path / f"{module.__name__}-{has_dendrites}"
            model = module.Mine(module.MineConfig())
            model = dendritic(model, "layer") if has_dendrites else model
            model.save_pretrained(folder)
            assert remote_code.save_code(model, folder)
            batch = torch.randn(2, 4)
            torch.save((batch, model(batch).last_hidden_state.detach()), folder / "expected.pt")
            folders.append(str(folder))
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


def test_model_loaded_with_its_code_gets_the_code_of_dendrites(load, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    save(load(), tmp_path / "saved")
    model = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    dendritic(model, "layer").save_pretrained(tmp_path / "grown")
    assert remote_code.save_code(model, tmp_path / "grown")
    batch = torch.randn(2, 4)
    torch.save((batch, model(batch).last_hidden_state.detach()), tmp_path / "grown/expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "grown")],
        cwd=tmp_path / "grown",
        env=os.environ | {"HF_HOME": str(tmp_path / "other"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


SCRIPT = f"""
{HEAD}
import os
os.environ["OPENAI_API_KEY"] = "sk-SECRET"
WIDTH, PASSWORD = 4, "hunter2"
{CONFIG}
{MODEL.replace("USED", "os.cpu_count() + WIDTH")}
if __name__ == "__main__":
    import sys
    from perforated_trainer.remote_code import save_code
    model = Mine(MineConfig())
    model.save_pretrained(sys.argv[1])
    assert save_code(model, sys.argv[1])
"""


def test_script_run_as_main_saves_its_model_without_its_secrets(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "saved")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "saved/modeling_mine.py").read_text()
    assert "class Mine(" in text and not [word for word in ("SECRET", "hunter2", "save_code") if word in text]


def test_auto_classes_are_those_of_the_class_that_it_is_made_from():
    class Mine(transformers.BertForMaskedLM):
        pass

    assert remote_code.auto_classes(Mine, transformers.BertConfig) == [
        "AutoModelForMaskedLM"
    ] and remote_code.auto_classes(torch.nn.Module, transformers.BertConfig) == ["AutoModel"]
