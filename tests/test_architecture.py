"""The modules of the package and their imports, read from the source: nothing is imported here."""

import ast
import graphlib
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "perforated_trainer"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# Packages that only one module may import.
ALONE = {"perforatedai": "pai", "matplotlib": "plot"}
# Copies of these are saved with models: they import no other module of the package.
SAVED_WITH_MODELS = ["blocks", "formula", "layers", "loading", "saving", "sharing"]
STANDARD_LIBRARY_ONLY = ["policy", "checkpoint"]  # and other modules of the package
# Private methods of other libraries that are overridden or called on self, which is how those are extended.
# `test_compat.py` checks each of them.
HOOKS = {
    "trainer": set(  # of transformers.Trainer
        "_determine_best_metric _evaluate _finalize_training _init_training_state _load_best_model "
        "_load_from_checkpoint _prepare_for_training _train_batch_size _wrap_model".split()
    ),
    "resuming": {"_load_from_checkpoint", "_save_checkpoint"},
    "export": {"_push_from_checkpoint", "_save"},  # of transformers.Trainer
    "loading": set(  # of transformers.quantizers.HfQuantizer
        "_process_model_after_weight_loading _process_model_before_weight_loading".split()
    ),
}
# Private names of other libraries outside of `_compat` and `pai`; each has its reason next to it in the code.
PRIVATE = {
    "layers": {"_old_forward"},
    "loading": {"_keys_to_ignore_on_load_missing"},
    "modules": {"_keys_to_ignore_on_save"},
    "remote_code": {"_model_mapping"},
    "sharing": {"_commit_hash", "_name_or_path", "_version"},
}
# Attributes of every torch.nn.Module, which exist in every version of PyTorch.
PARTS = {"_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"}
PARTS |= {"_backward_hooks", "_backward_pre_hooks"}


@cache
def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(module, at_import_only=False):
    """The modules that a module imports, those of the package with a leading dot."""
    todo, found = [tree(module)], set()
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


def test_imports_are_acyclic():
    own = {module: {name[1:] for name in imports(module) if name.startswith(".")} for module in MODULES}
    assert set().union(*own.values()) <= set(MODULES)
    list(graphlib.TopologicalSorter(own).static_order())  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_the_package_are_relative(module):
    assert "perforated_trainer" not in imports(module)


@pytest.mark.parametrize(("package", "module"), ALONE.items())
def test_package_is_imported_by_one_module(package, module):
    assert [name for name in MODULES if package in imports(name)] == [module]


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_module_needs_the_standard_library_only(module):
    assert {name for name in imports(module) if not name.startswith(".")} <= sys.stdlib_module_names


@pytest.mark.parametrize("module", SAVED_WITH_MODELS)
def test_module_that_is_saved_with_models_imports_no_other_module(module):
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | sys.stdlib_module_names
    assert imports(module) <= allowed | {f".{name}" for name in SAVED_WITH_MODELS}


@pytest.mark.parametrize("module", MODULES)
def test_module_can_be_imported_on_any_system(module):
    """These do not exist on Windows: they may be imported in functions, with a guard."""
    assert not imports(module, at_import_only=True) & {"resource", "fcntl", "pwd", "grp", "termios"}


# ------------------------------------------------------------------------------------- private names of other libraries


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "type(self)")


@cache
def defined():
    """Private names that the package defines: functions, classes, variables, attributes of `self`."""
    names = set()
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(
                node.slice, ast.Constant
            ):  # of type(name, bases, names)
                names.add(node.slice.value)
    return names - set().union(*HOOKS.values(), *PRIVATE.values())


def foreign(module):
    """Private names that a module uses and the package does not define, with their lines."""
    known = defined() | PARTS
    for node in ast.walk(tree(module)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr"):
            names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        yield from ((name, node.lineno) for name in names if is_private(name) and name not in known)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("_compat", "pai")])
def test_private_names_of_other_libraries_are_used_in_compat(module):
    allowed = HOOKS.get(module, set()) | PRIVATE.get(module, set())
    found = [f"{name}, line {line}" for name, line in foreign(module) if name not in allowed]
    assert not found, f"{module}: use `_compat` for {found}"


@pytest.mark.parametrize("module", sorted({*HOOKS, *PRIVATE}))
def test_allowed_private_names_are_used(module):
    """An unused entry of the list would hide a new use."""
    names = {node.name for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)}
    used = {name for name, _ in foreign(module)} | names
    assert HOOKS.get(module, set()) | PRIVATE.get(module, set()) <= used
