"""The rooms of the package and the arrows between them, read from the source: nothing is imported here."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "perforated_trainer"
# Which room may import which. The order is that of the arrows: a room imports rooms above it only.
ARROWS = {
    "layers": [],
    "remote_code": ["layers"],
    "arguments": [],
    "_compat": [],
    "shortcuts": [],
    "checkpoint": ["arguments"],
    "run_folder": ["arguments", "checkpoint"],
    "patterns": ["arguments"],
    "price": ["arguments"],
    "schedule": ["arguments"],
    "report": ["arguments"],
    "plot": ["report"],
    "model_card": ["report"],
    "verdict": ["_compat", "report"],
    "scaffold": ["_compat", "arguments", "layers"],
    "tracker": ["arguments", "layers", "price", "run_folder", "scaffold", "shortcuts"],
    "control": ["arguments", "layers", "run_folder", "tracker"],
    "convert": ["_compat", "arguments", "control", "layers", "patterns", "price", "scaffold", "tracker"],
    "callbacks": ["arguments", "plot", "report", "shortcuts", "tracker"],
    "publishing": [
        "arguments",
        "callbacks",
        "checkpoint",
        "layers",
        "model_card",
        "plot",
        "remote_code",
        "report",
        "run_folder",
        "verdict",
    ],
    "trainer": [
        "_compat",
        "arguments",
        "callbacks",
        "checkpoint",
        "convert",
        "publishing",
        "report",
        "run_folder",
        "scaffold",
        "schedule",
        "shortcuts",
        "tracker",
    ],
    "cli": ["arguments", "report", "run_folder"],
    "__init__": ["layers"],  # the others are imported when one of their names is asked for
}
# Other people's packages that one room alone may import.
ALONE = {"perforatedai": "scaffold", "matplotlib": "plot"}
# Private methods of other libraries' classes that are overridden, which is how those libraries are extended.
HOOKS = {
    "trainer": {  # transformers.Trainer
        "_evaluate",
        "_load_from_checkpoint",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
        "_save_scaler",
    },
    "publishing": {"_push_from_checkpoint", "_save"},  # transformers.Trainer
    "layers": {  # transformers.quantizers.HfQuantizer
        "_process_model_after_weight_loading",
        "_process_model_before_weight_loading",
    },
}
# Private names of other libraries elsewhere than in `_compat` and `tracker`. Each has its reason beside it in the code.
PRIVATE = {"remote_code": {"_model_mapping"}}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py"))


@cache
def tree(room):
    return ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))


def imports(room, at_import_only=False):
    """The modules that a room imports, ours with a leading dot."""
    todo, found = [tree(room)], set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f".{name.split('.')[0]}" for name in names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif not (at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            todo += ast.iter_child_nodes(node)
    return found


def test_each_room_is_in_the_plan():
    assert sorted(ARROWS) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way(room):
    ours = {name[1:] for name in imports(room) if name.startswith(".")}
    assert ours <= set(ARROWS[room]), f"{room} may not import {sorted(ours - set(ARROWS[room]))}"
    assert "perforated_trainer" not in imports(room), "inside the package, imports are relative"


def test_there_is_no_cycle():
    before = set()
    for room, rooms in ARROWS.items():
        assert set(rooms) <= before, room
        before.add(room)


@pytest.mark.parametrize(("package", "room"), ALONE.items())
def test_one_room_alone_speaks_with(package, room):
    assert [name for name in ROOMS if package in imports(name)] == [room]


def test_a_checkpoint_needs_the_standard_library_only():
    assert {name for name in imports("checkpoint") if not name.startswith(".")} <= sys.stdlib_module_names


def test_layers_stand_alone():
    """A copy of the file lies in the folders of models."""
    allowed = {"torch", "transformers", "safetensors"} | sys.stdlib_module_names
    assert imports("layers") <= allowed


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_for_one_system_only(room):
    """These modules are missing on Windows: they may be imported where they are used, and guarded."""
    assert not imports(room, at_import_only=True) & {"resource", "fcntl", "pwd", "grp", "termios"}


# ------------------------------------------------------------------------------------- private names of other libraries


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(room):
    """Names that a room defines itself: functions, classes, variables, attributes of `self`."""
    names = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Dict):  # of type(name, bases, names)
            names |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "setdefault":
            names |= {part.value for part in node.args[:1] if isinstance(part, ast.Constant)}
    return names


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign(room):
    """Private names in a room that it does not define itself, or uses of something else than `self`."""
    own = defined(room)
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            super_call = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super"
            if super_call or not (is_self(node.value) and node.attr in own):
                yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((alias.name, node.lineno) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr"):
            names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
            yield from ((name, node.lineno) for name in names if is_private(name))


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("_compat", "scaffold", "tracker")])
def test_private_names_of_other_libraries_stay_in_their_rooms(room):
    allowed = HOOKS.get(room, set()) | PRIVATE.get(room, set())
    found = [f"{name}, line {line}" for name, line in foreign(room) if name not in allowed]
    assert not found, f"{room}: use `_compat` for {found}"


def test_hooks_are_overridden():
    """A name that is listed and no longer there would hide a new use."""
    for room, hooks in HOOKS.items():
        methods = {node.name for node in ast.walk(tree(room)) if isinstance(node, ast.FunctionDef)}
        assert hooks <= methods, room
