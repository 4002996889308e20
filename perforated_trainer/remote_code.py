"""Code that is saved with a model, so that `from_pretrained(folder, trust_remote_code=True)` needs only the folder."""

import ast
import builtins
import contextlib
import dis
import inspect
import json
import linecache
import re
import sys
import tokenize
from pathlib import Path
from types import CodeType, FunctionType

from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .checkpoint import write_whole
from .layers import base_class, layers_with_dendrites
from .saving import CODE, code_of_dendrites

logger = logging.get_logger(__name__)

_DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
_IMPORTS = ast.Import, ast.ImportFrom
_ASSIGNMENTS = ast.Assign, ast.AnnAssign, ast.AugAssign
_ITEMS = ast.Attribute, ast.Subscript
_CONTAINERS = ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp


class ModelCode:
    """The code of a model as it is now. Make it before the training: later changes of the file are not saved.

    One warning says why the code of a class cannot be saved, or which constants with a text are saved with it.

    Args:
        model (`PreTrainedModel`): A model of transformers, or a custom one.
    """

    def __init__(self, model):
        self.cls, self.config_class = base_class(model), type(model.config)
        self.dendrite_files, self.is_usable = code_of_dendrites(), True
        package, _, self.file = self.cls.__module__.rpartition(".")
        self.is_loaded = package.startswith("transformers_modules")  # transformers saves this code again by itself
        self.is_stock = package.startswith("transformers.") or (self.is_loaded and self.file == CODE)
        self.text, constants, name = None, [], self.cls.__name__
        try:
            if self.is_stock:
                self.file = CODE
            elif self.is_loaded:
                self.text = _read_source(self.cls)[1][0]
            else:
                self.file = "modeling_" + re.sub(r"\W", "_", self.config_class.model_type or name.lower())
                self.text, constants = extract(self.cls, self.config_class)
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            self.is_usable = False
            logger.warning(
                f"The code of {name} cannot be saved with the model: {' '.join(str(error).split())}. The folder loads "
                f"only with {name}.from_pretrained, in a program that defines {name}. To save the code too, move "
                f"{name} into a .py file of classes, functions and constants, and import it"
            )
        if constants:
            logger.warning(
                f"The code that is saved with {name} contains the texts of these constants: {', '.join(constants)}. "
                "Make sure that none is a secret"
            )

    def save(self, folder: str | Path, model) -> bool:
        """Write the code into the folder of the saved model, and its names into the folder's config.json.

        Args:
            folder (`str` or `Path`): What `model.save_pretrained(folder)` wrote.
            model (`PreTrainedModel`): The model. Without dendrites, a model of transformers needs no code.

        Returns:
            `bool`: Whether the folder has all code that it needs.
        """
        folder, has_dendrites = Path(folder), bool(layers_with_dendrites(model))
        if not self.is_usable or (not has_dendrites and (self.is_stock or self.is_loaded)):
            return self.is_usable
        files = dict(self.dendrite_files) if has_dendrites else {}
        if text := self.text:
            if has_dendrites and f"from .{CODE} import" not in text:
                text += "\n\n# Lets transformers load dendrites. Old versions copy only files that are named here.\n"
                names = [name.removesuffix(".py") for name in self.dendrite_files]
                text += "".join(f"from .{name} import __name__ as _{name}  # noqa: E402, F401\n" for name in names)
            files[f"{self.file}.py"] = text
        if self.is_stock or not self.is_loaded:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            values["auto_map"] = values.get("auto_map", {}) | self._auto_map(has_dendrites)
            files["config.json"] = json.dumps(values, indent=2, sort_keys=True) + "\n"
        for name, text in files.items():
            write_whole(folder / name, text)
        return True

    def _auto_map(self, has_dendrites):
        """The class in the folder's code for each Auto class.

        With dendrites, this includes the stock heads and body for the same config: transformers runs the code, which
        makes dendrites known, only for Auto classes that have an entry.
        """
        stock = {name: models[0] for name, models in _auto_models(self.config_class).items() if has_dendrites}
        code = {n: f"{CODE}.{m.__name__}" for n, m in stock.items() if m.__module__.startswith("transformers.")}
        code |= dict.fromkeys(auto_classes(self.cls, self.config_class), f"{self.file}.{self.cls.__name__}")
        if not self.config_class.__module__.startswith("transformers."):
            code["AutoConfig"] = f"{self.file}.{self.config_class.__name__}"
        return code


def save_code(model, folder: str | Path) -> bool:
    """Write the code of a model into its folder, as `ModelCode(model).save(folder, model)`."""
    return ModelCode(model).save(folder, model)


def _auto_models(config_class):
    """The classes that each Auto class makes for a config, by the name of the Auto class."""
    found = {}
    for name in dir(modeling_auto):  # that of transformers itself takes half a second
        # `_model_mapping` is private. There is no public way from a class to its Auto classes in 5.5 to 5.24.
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            models = mapping[config_class]
            found[name] = models if isinstance(models, (tuple, list)) else [models]
    return found


def auto_classes(model_class: type, config_class: type) -> list[str]:
    """Names of the Auto classes that make this model, or one that it is made from; `AutoModel` if none does."""
    models = _auto_models(config_class)
    return [name for name in models if any(base in models[name] for base in model_class.__mro__)] or ["AutoModel"]


def extract(model_class: type, config_class: type) -> tuple[str, list[str]]:
    """The text of a file with what a model and its config need of that file, and its constants that hold a text.

    Definitions are taken: imports, functions, classes, assignments, and an `if` or `try` of nothing else; and those
    that they read. Other statements never are: they may hold a secret, or do something. ValueError, OSError or
    SyntaxError if that is not enough, or if the source is not that of the classes in memory.
    """
    classes = [cls for cls in (model_class, config_class) if not cls.__module__.startswith("transformers.")]
    source = _Source(model_class)
    chosen, needed = source.choose({cls.__name__ for cls in classes})
    parts = sorted(chosen, key=lambda node: not _is_future(node))
    text = "\n\n".join([f'"""{model_class.__name__}, taken from {source.label}."""', *(n.text for n in parts)]) + "\n"
    source.check_memory(chosen, {cls.__name__: cls for cls in classes})
    return text, source.constants(chosen, needed)


def _module_of(cls):
    if cls.__module__ not in sys.modules:
        raise OSError(f"its module {cls.__module__} is not loaded")
    return sys.modules[cls.__module__]


def _read_source(cls):
    """Name and text of the file of a class, or the texts of all cells of its notebook."""
    module = _module_of(cls)
    if getattr(module, "__file__", None):
        with tokenize.open(inspect.getsourcefile(module) or module.__file__) as file:  # knows the encoding of a source
            return Path(file.name).name, [file.read()]
    texts = list(vars(module).get("In", ()))  # IPython keeps all cells there
    if not any(texts):  # the cell of the class may be known to tracebacks
        names = [value.__code__.co_filename for value in vars(cls).values() if isinstance(value, FunctionType)]
        texts = ["".join(linecache.getlines(name)) for name in names[:1]]
    if not any(texts):
        raise OSError("it was not read from a file, and its source is not available")
    return "a notebook", texts


class _Source:
    """The statements of the source of a class."""

    def __init__(self, cls):
        self.module, statements = _module_of(cls), {}
        self.label, texts = _read_source(cls)
        for text in texts:
            try:
                codes = _codes(compile(text, "<source>", "exec"))
            except (SyntaxError, ValueError):
                if len(texts) == 1:
                    raise
                continue  # a cell that failed
            lines = text.split("\n")
            for node in [part for whole in ast.parse(text).body for part in _split(whole)]:
                first = min([node.lineno, *[decorator.lineno for decorator in getattr(node, "decorator_list", [])]])
                node.text, key = _text(node, lines[first - 1 : node.end_lineno]), id(node)
                node.codes = {_plain(code) for code in codes if first <= code.co_firstlineno <= node.end_lineno}
                if isinstance(node, _DEFINITIONS) and len(texts) > 1:
                    key = node.name  # of a cell that was run again, the last text counts, at the first place
                if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test)):  # done when a script is run
                    statements[node.text if isinstance(node, _IMPORTS) else key] = node
        self.statements = list(statements.values())
        leaves = [leaf for node in self.statements for leaf in _leaves(node)]
        filled = [node for node in leaves if isinstance(node, _ASSIGNMENTS) and isinstance(node.value, _CONTAINERS)]
        self.containers = {name for node in filled for name in _stored(node)}
        self.imported = {name for node in leaves if isinstance(node, _IMPORTS) for name in _stored(node)}

    def choose(self, classes):
        """The statements that define these classes and all that they read, and the names of all that."""
        needed, before = set(classes), None
        while before != needed:
            before = set(needed)
            chosen = [n for n in self.statements if _is_future(n) or self.defined(n) & {*needed, "*"}]
            needed |= {name for node in chosen for name in _read(node)}
        for node in (node for node in self.statements if not self.defined(node)):
            calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
            filled = self.containers & {getattr(function.value, "id", None) for function in calls}
            if changed := needed & (_stored(node) | filled) - self.imported:
                raise ValueError(f"{self.place(node)} does more than define {min(changed)}, which the model needs")
        defined = {name for node in chosen for name in self.defined(node)}
        known = set() if "*" in defined else {n for n in vars(self.module) if not hasattr(builtins, n)}
        if missing := {name for name in needed & (classes | known) - defined if not name.startswith("__")}:
            raise ValueError(f"{min(missing)} is not defined at the top level of {self.label}")
        for node in (part for whole in chosen for part in ast.walk(whole) if isinstance(part, _IMPORTS)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            if getattr(node, "level", 0) or any(map(self.is_next_to_it, names)):
                raise ValueError(f"{self.place(node)} imports from another file of the same project")
        return chosen, needed

    def defined(self, node):
        """Names that a statement of the top level gives a meaning; none if it does more than define."""
        leaves, kinds = _leaves(node), (*_DEFINITIONS, *_IMPORTS, *_ASSIGNMENTS, ast.Pass)
        # An item or an attribute may be set too, but not of an imported object: `os.environ["TOKEN"] = ...`
        does_more = [n for n in leaves if not isinstance(n, kinds) or _stored(n, _ITEMS) & self.imported]
        return set() if does_more else set().union(*map(_stored, leaves))

    def is_next_to_it(self, module):
        """Whether a module is in the package of this one, or in its folder, and not installed."""
        top = self.module.__name__.split(".")[0]
        file, own = (getattr(sys.modules.get(name), "__file__", None) for name in (module, top))
        if not file or {"site-packages", "dist-packages"} & {*Path(file).parts} or module in sys.stdlib_module_names:
            return False
        return Path(file).resolve().is_relative_to(Path(own or "cell").resolve().parent)

    def place(self, node):
        return f"line {node.lineno} of {self.label}"

    def constants(self, chosen, needed):
        """Names and lines of the constants with a text in them."""
        found = []
        for node in (leaf for whole in chosen for leaf in _leaves(whole) if isinstance(leaf, _ASSIGNMENTS)):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(text and isinstance(text, (str, bytes)) and text not in _stored(node) for text in texts):
                if not _stored(node) & needed:
                    raise ValueError(f"{self.place(node)} is in one block with what the model needs, and may be secret")
                found += [f"{name} ({self.place(node)})" for name in sorted(_stored(node))]
        return found

    def check_memory(self, chosen, classes):
        """Refuse if functions and methods in memory are not those of the source, which was edited since its import."""
        codes = set().union(*[node.codes for node in chosen])
        for node in (node for node in chosen if isinstance(node, _DEFINITIONS)):
            value = classes.get(node.name, vars(self.module).get(node.name))
            members = vars(value) if isinstance(value, type) else {node.name: value}
            written = {n.name for n in (node.body if isinstance(node, ast.ClassDef) else [node]) if hasattr(n, "args")}
            for name, member in members.items():
                function = inspect.unwrap(getattr(member, "fget", getattr(member, "__func__", member)))
                is_own = name in written or getattr(function, "__module__", None) == self.module.__name__
                if isinstance(function, FunctionType) and is_own and function.__code__.co_filename != "<string>":
                    written |= set() if _plain(function.__code__) in codes else {""}
            if not {name for name in written if not name.startswith("__")} <= members.keys():
                raise ValueError(f"{node.name} in {self.label} is not the one in memory; it was edited afterwards")


def _split(node):
    """A statement as several that define one name each, if it can be divided without a change of its meaning."""
    new = [node]
    if isinstance(node, ast.Import):
        new = [ast.Import(names=[alias]) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        new = [ast.ImportFrom(module=node.module, names=[alias], level=node.level) for alias in node.names]
    elif isinstance(node, ast.Assign):
        sides = [getattr(side, "elts", []) for side in (*node.targets, node.value)]
        starred = any(isinstance(part, ast.Starred) for side in sides for part in side)
        reads = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
        if len(sides) == 2 and len(sides[0]) == len(sides[1]) > 0 and not starred and not reads & _stored(node):
            new = [part for pair in zip(*sides) for part in _split(ast.Assign([pair[0]], pair[1]))]  # noqa: B905
    return [ast.fix_missing_locations(ast.copy_location(part, node)) for part in new]


def _text(node, lines):
    """The text of a statement, with its decorators and its comments if possible."""
    text = "\n".join([*lines[:-1], lines[-1].encode()[: node.end_col_offset].decode()])
    with contextlib.suppress(SyntaxError):  # one of several statements of a line
        if ast.dump(ast.parse(text)) == ast.dump(ast.Module([node], [])):
            return text
    return ast.unparse(node)


def _is_future(node):
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _leaves(node):
    """The statements in `if` and `try` blocks, or the statement itself."""
    if not isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
        return [node]
    children = [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.ExceptHandler))]
    return [leaf for child in children for leaf in _leaves(child)]


def _stored(node, kinds=(ast.Name, *_ITEMS)):
    """Names that a statement gives a value, or of whose object it sets an attribute or an item."""
    if isinstance(node, kinds) and not isinstance(node.ctx, ast.Load):
        while isinstance(node, _ITEMS):
            node = node.value
        return {node.id} if isinstance(node, ast.Name) else set()
    if isinstance(node, (*_DEFINITIONS, *_IMPORTS)):
        names = [getattr(n, "asname", None) or n.name.split(".")[0] for n in getattr(node, "names", [node])]
        return set(names) if ast.Name in kinds else set()
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return set()  # they have their own variables
    return set().union(*[_stored(child, kinds) for child in ast.iter_child_nodes(node)])


def _read(node):
    """Names of the module's top level that a statement reads. Local variables of the same name are not read."""
    codes = _codes(compile(node.text, "<source>", "exec"))
    instructions = [instruction for code in codes for instruction in dis.get_instructions(code)]
    return {i.argval for i in instructions if "GLOBAL" in i.opname or i.opname == "LOAD_NAME"}


def _codes(code):
    """Some code and that of all functions and classes within it."""
    return [code, *[inner for value in code.co_consts if isinstance(value, CodeType) for inner in _codes(value)]]


def _plain(code):
    """Code without its place in a file, so that equal code is equal."""
    values = tuple(_plain(value) if isinstance(value, CodeType) else value for value in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=values)
