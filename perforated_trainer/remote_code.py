"""Code for the folder of a model, so that `from_pretrained(folder, trust_remote_code=True)` needs the folder alone."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import symtable
from pathlib import Path

import transformers
from transformers.utils import logging

from . import layers
from .layers import CODE

logger = logging.get_logger(__name__)


def save_code(model, folder) -> bool:
    """Write the code of a saved model into its folder, and name it in the folder's config.json.

    Args:
        model (`PreTrainedModel`): A model of transformers, or of your own.
        folder (`str` or `Path`): What `model.save_pretrained(folder)` wrote.

    Returns True, or False with one warning where the source of the model cannot be read, as in a notebook.
    """
    folder, cls, config = Path(folder), getattr(type(model), "dendrite_base", type(model)), type(model.config)
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if cls.__module__.startswith("transformers.") or cls.__module__.endswith(f".{CODE}"):
        code = dict.fromkeys(auto_classes(cls, config), f"{CODE}.{cls.__name__}")
    elif cls.__module__.startswith("transformers_modules."):
        return True  # loaded with its code, which transformers saves again
    else:
        module = f"modeling_{''.join(c if c.isalnum() else '_' for c in config.model_type or cls.__name__.lower())}"
        try:
            source = extract(cls, config)
        except (OSError, TypeError, SyntaxError) as error:
            logger.warning(f"{folder} has no code of {cls.__name__}, its source cannot be read: {error}")
            return False
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        code = dict.fromkeys(auto_classes(cls, config), f"{module}.{cls.__name__}")
        if not config.__module__.startswith("transformers."):
            code["AutoConfig"] = f"{module}.{config.__name__}"
    shutil.copyfile(layers.__file__, folder / f"{CODE}.py")
    values["auto_map"] = values.get("auto_map", {}) | code
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return True


def auto_classes(model_class, config_class) -> list[str]:
    """Names of the Auto classes that make this model, or one that it is made from; `AutoModel` where none does."""
    found = []
    for name in dir(transformers):
        if not name.startswith("AutoModel"):
            continue
        # `_model_mapping` is private. There is no public way from a class to its Auto classes in 5.5 to 5.23.
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and config_class in mapping:
            models = mapping[config_class]
            models = models if isinstance(models, (tuple, list)) else [models]
            if any(base in models for base in model_class.__mro__):
                found.append(name)
    return found or ["AutoModel"]


def extract(model_class, config_class) -> str:
    """Source of a module with a model, its config and the statements of their file that they need.

    A name that a needed statement reads makes the statements that define it needed. So calls at the top level, such
    as `AutoConfig.register(...)` or a training run, stay out. OSError or TypeError where there is no such source.
    """
    if "<locals>" in model_class.__qualname__:
        raise OSError(f"{model_class.__qualname__} is defined in a function")
    file = inspect.getsourcefile(model_class)
    source = Path(file).read_text(encoding="utf-8")
    statements = [part for statement in ast.parse(source).body for part in _single_names(statement)]
    defined = [_defined(statement) for statement in statements]
    todo, seen, needed = {model_class.__name__, config_class.__name__}, set(), set()
    if not any(model_class.__name__ in names for names in defined):
        raise OSError(f"{model_class.__name__} is not at the top level of {file}")
    while todo:
        seen.add(name := todo.pop())
        for i, names in enumerate(defined):
            if i not in needed and (name in names or names & {"*", "__future__"}):
                needed.add(i)
                todo |= _read(statements[i], source) - seen
    chosen = [statements[i] for i in sorted(needed)]
    if any(isinstance(statement, ast.ImportFrom) and statement.level for statement in chosen):
        raise OSError(f"{file} imports from files beside it")
    texts = [_text(statement, source) for statement in chosen]
    first = sum(text.startswith("from __future__ ") for text in texts)
    texts.insert(first, f"from .{CODE} import DendriteConfig  # noqa: F401 - its import teaches to load dendrites")
    return f'"""{model_class.__name__}, taken from {Path(file).name}."""\n\n' + "\n\n".join(texts) + "\n"


def _single_names(statement):
    """An import of several names as several imports, so that only those needed are taken."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [statement]
    if isinstance(statement, ast.Import):
        return [ast.Import(names=[alias]) for alias in statement.names]
    return [ast.ImportFrom(module=statement.module, names=[a], level=statement.level) for a in statement.names]


def _defined(statement):
    """Names that a statement of a module's top level gives a meaning."""
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return {"__future__"}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
        return set()  # what a script does when it is run
    names = set()
    for node in ast.iter_child_nodes(statement):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            names |= _defined(node)
        else:  # X = ..., X.y = ... and X["y"] = ... all give X its meaning
            stored = (n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store))
            for target in stored:
                while isinstance(target, (ast.Attribute, ast.Subscript)):
                    target = target.value
                names |= {target.id} if isinstance(target, ast.Name) else set()
    return names


def _read(statement, source):
    """Names of the module's top level that a statement may read. Local variables of the same name are none."""
    names = set()

    def visit(table):
        names.update(s.get_name() for s in table.get_symbols() if s.is_global() or table.get_type() == "module")
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(_text(statement, source), "<model>", "exec"))
    for node in ast.walk(statement):  # Python reads annotations late or never, depending on its version
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            names |= {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation else set()
    return names


def _text(statement, source):
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return ast.unparse(statement)
    decorators = getattr(statement, "decorator_list", [])
    if not decorators:
        return ast.get_source_segment(source, statement)
    return "\n".join(source.splitlines()[decorators[0].lineno - 1 : statement.end_lineno])
