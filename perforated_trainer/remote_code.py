"""Code that is saved with a model, so that `from_pretrained(folder, trust_remote_code=True)` needs only the folder."""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import importlib.util
import inspect
import json
import linecache
import re
import symtable
import sys
import sysconfig
import tokenize
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .checkpoint import write_whole
from .layers import layers_with_dendrites
from .loading import CODE, code_of_dendrites

logger = logging.get_logger(__name__)

# What a file does when it is imported runs again at whoever loads the model, so only calls that compute are taken:
# of functions of these packages, and none that is named like one that reads, writes or changes something.
_PACKAGES = set(
    "abc collections copy dataclasses enum fractions functools itertools logging math numbers numpy operator re string "
    "torch transformers types typing typing_extensions".split()
)
_EFFECTS = re.compile(
    r"(load|save|open|read|write|set|use|enable|disable|init|seed|manual|register|push|download|login)(_\w+)?"
    r"|from_\w*(pretrained|file)|fromfile|\w+txt|memmap|hub|pipeline|cached_file|get_class_from_dynamic_module"
)
_SECRETS = {"environ", "environb", "getenv", "getpass"}
_BUILTINS = set(
    "__import__ breakpoint compile delattr eval exec exit globals input locals open print quit setattr vars".split()
)
_FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
_DEFINITIONS = *_FUNCTIONS, ast.ClassDef
_IMPORTS = ast.Import, ast.ImportFrom
_ASSIGNMENTS = ast.Assign, ast.AnnAssign, ast.AugAssign
_CONTAINERS = ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]


class ModelCode:
    """The code of a model as it is now. Make it before the training: later changes of the files are not saved.

    One warning says why the code of a class cannot be saved, or which texts and calls are saved with it.

    Args:
        model (`PreTrainedModel`): A model of transformers, or a custom one.
    """

    def __init__(self, model):
        self.cls = getattr(type(model), "dendrite_base", type(model))
        self.config_class = type(model.config)
        self.files, self.is_usable = {}, True
        origin = self.cls.__module__
        self.dendrite_files = code_of_dendrites()
        self.is_loaded = origin.startswith("transformers_modules.")  # transformers saves this code again by itself
        is_copy = self.is_loaded and f"{origin.rpartition('.')[2]}.py" in self.dendrite_files
        self.is_stock = origin.startswith("transformers.") or is_copy
        if self.is_stock:
            return
        try:
            if self.is_loaded:
                self.files[origin.rpartition(".")[2]] = _read_source(origin)[1][0]
                return
            self.files, doubtful = extract(self.cls, self.config_class)
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            self.is_usable, name = False, self.cls.__name__
            logger.warning(
                f"The code of {name} cannot be saved with the model: {' '.join(str(error).split())}. The folder loads "
                f"only with {name}.from_pretrained, in a program that defines {name}. To save the code too, move "
                f"{name} into a .py file of classes, functions and constants, and import it"
            )
            return
        if doubtful:
            logger.warning(
                f"The code that is saved with {self.cls.__name__} contains these texts and calls: "
                f"{', '.join(doubtful)}. Make sure that none is a secret"
            )

    def save(self, folder: str | Path, model) -> bool:
        """Write the code into the folder of the saved model, and its names into the folder's config.json.

        Args:
            folder (`str` or `Path`): What `model.save_pretrained(folder)` wrote.
            model (`PreTrainedModel`): The model. Without dendrites, the code for dendrites is not written, and a model
                of transformers needs no code.

        Returns:
            `bool`: Whether the folder has all code that it needs.
        """
        folder, has_dendrites = Path(folder), bool(layers_with_dendrites(model))
        if not self.is_usable:
            return False
        if not has_dendrites and (self.is_stock or self.is_loaded):
            return True
        main = next(iter(self.files), CODE)
        for name, text in self.files.items():
            write_whole(folder / f"{name}.py", _with_dendrites(text) if has_dendrites and name == main else text)
        if has_dendrites:
            for name, text in self.dendrite_files.items():
                write_whole(folder / name, text)
        if self.is_stock or not self.is_loaded:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            code = dict.fromkeys(auto_classes(self.cls, self.config_class), f"{main}.{self.cls.__name__}")
            if not self.config_class.__module__.startswith("transformers."):
                file = _file_names(self.cls, self.config_class)[self.config_class.__module__]
                code["AutoConfig"] = f"{file}.{self.config_class.__name__}"
            values["auto_map"] = values.get("auto_map", {}) | code
            write_whole(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
        return True


def save_code(model, folder: str | Path) -> bool:
    """Write the code of a model into its folder, as `ModelCode(model).save(folder, model)`."""
    return ModelCode(model).save(folder, model)


def auto_classes(model_class: type, config_class: type) -> list[str]:
    """Names of the Auto classes that make this model, or one that it is made from; `AutoModel` if none does."""
    found = []
    for name in dir(modeling_auto):  # that of transformers itself takes half a second
        if not name.startswith("AutoModel"):
            continue
        # `_model_mapping` is private. There is no public way from a class to its Auto classes in 5.5 to 5.23.
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None and config_class in mapping:
            models = mapping[config_class]
            models = models if isinstance(models, (tuple, list)) else [models]
            if any(base in models for base in model_class.__mro__):
                found.append(name)
    return found or ["AutoModel"]


def extract(model_class: type, config_class: type) -> tuple[dict[str, str], list[str]]:
    """The definitions that a model and its config need, from their files and those next to them.

    A definition is an import, a function, a class or an assignment. A definition that a needed one reads is needed too.

    Args:
        model_class (`type`): Class of the model.
        config_class (`type`): Class of its config.

    Returns:
        `dict[str, str]`: The text of each file by its name without ".py", that of the model first.
        `list[str]`: Names of assigned constants with a text, which may be a secret, or with a call of the own code.

    Raises:
        `OSError`, `SyntaxError`, `ValueError`: If there is no source, if it is not the source of the classes in memory,
        or if something needed is not a definition.
    """
    names = _file_names(model_class, config_class)
    wanted = {model_class.__module__: {model_class.__name__: model_class}}
    if config_class.__module__ in names:
        wanted.setdefault(config_class.__module__, {})[config_class.__name__] = config_class
    for cls in (model_class, config_class):
        if "." in cls.__qualname__:
            raise ValueError(f"{cls.__qualname__} is not defined at the top level of a file")
    sources, files, doubtful = {}, {}, []
    todo = list(wanted)
    while todo:
        module = todo.pop()
        if module not in sources:
            sources[module] = _Source(module, model_class, names)
        for other, name in sources[module].choose(set(wanted[module])):
            if name not in wanted.setdefault(other, {}):
                wanted[other][name] = getattr(sys.modules[other], name, None)
                todo.append(other)
    for module in wanted:
        source = sources[module]
        text = source.text(f'"""{model_class.__name__}, taken from {source.label}."""')
        source.compare(text, wanted[module])
        files[_name_of(module, names)] = text
        doubtful += source.doubtful()
    return files, doubtful


def _file_names(model_class, config_class):
    """Names of the files for the modules of the two classes, if they are not transformers' own."""
    kind = re.sub(r"\W", "_", config_class.model_type or model_class.__name__.lower())
    names = {} if config_class.__module__.startswith("transformers.") else {config_class.__module__: "configuration_"}
    return {module: name + kind for module, name in (names | {model_class.__module__: "modeling_"}).items()}


def _name_of(module, names):
    modeling = next(name for name in names.values() if name.startswith("modeling_"))
    return names.get(module) or f"{modeling}_{module.replace('.', '_')}"


def _with_dendrites(text):
    """The text with the import that makes transformers load dendrites, after what must come first in a file."""
    if f"from .{CODE} import" in text:
        return text
    lines, end = text.split("\n"), 0
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Expr) and getattr(statement, "module", None) != "__future__":
            break
        end = statement.end_lineno
    lines.insert(end, f"from .{CODE} import DendriteConfig  # noqa: F401 - makes transformers load dendrites")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the source of a class


def _read_source(name, cls=None):
    """Name and text of the file of a module, or the texts of all cells of the notebook in which `cls` is defined."""
    module = sys.modules.get(name)
    if module is None:
        raise OSError(f"its module {name} is not loaded")
    if getattr(module, "__file__", None):
        file = inspect.getsourcefile(module)
        if file is None:
            raise OSError(f"{module.__file__} is not a .py file")
        with tokenize.open(file) as source:  # knows its encoding, and counts lines as Python does
            return Path(file).name, [source.read()]
    texts = list(vars(module).get("In", ()))  # IPython keeps all cells there
    if not any(texts):  # the cell of the class may be known to tracebacks
        codes = [function.__code__ for value in vars(cls).values() for function in _functions(value)]
        texts = ["".join(linecache.getlines(code.co_filename)) for code in codes[:1]]
    if not any(texts):
        raise OSError("it was not read from a file, and its source is not available")
    return "a notebook", [text for text in texts if _is_python(text)]


def _is_python(text):
    try:
        return bool(compile(text, "<cell>", "exec", dont_inherit=True))
    except (SyntaxError, ValueError):
        return False  # a cell that failed


class _Source:
    """The statements of one module's source, and which of them are needed."""

    def __init__(self, module, model_class, names):
        self.memory, self.names, self.base = vars(sys.modules[module]), names, sys.modules[model_class.__module__]
        self.label, texts = _read_source(module, model_class)
        self.own = {}  # names that are imported from files next to the model's: module and name
        self.imports = {}  # other imported names: what they stand for
        self.statements, places = [], {}
        for text in texts:
            codes, new = _codes(compile(text, "<source>", "exec", dont_inherit=True)), {}
            for node in [part for whole in ast.parse(text).body for part in self._parts(whole)]:
                if not hasattr(node, "text"):
                    node.text = _text(node, text)
                lines = range(_first_line(node), node.end_lineno + 1)
                node.codes = {_plain(code) for code in codes if code.co_firstlineno in lines}
                name = next(iter(_bound(node)), None) if isinstance(node, (*_IMPORTS, *_DEFINITIONS)) else None
                if name in places:  # a cell that was run again
                    self.statements[places[name]] = node
                elif not _is_main_guard(node):
                    self.statements.append(node)
                    if name:
                        new[name] = len(self.statements) - 1
            places |= new
        self.is_notebook = len(texts) > 1
        self.functions = {node.name for node in self.statements if isinstance(node, _DEFINITIONS)}
        assignments = [node for node in self.statements if isinstance(node, _ASSIGNMENTS)]
        self.containers = {name for node in assignments if _is_container(node.value) for name in _bound(node)}
        self.chosen = []

    def _parts(self, node):
        """A statement as several that define one name each, if it can be divided without a change of its meaning."""
        if isinstance(node, ast.Import):
            return [self._imported(node, ast.Import(names=[alias])) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            new = [ast.ImportFrom(module=node.module, names=[alias], level=node.level) for alias in node.names]
            return [self._imported(node, part) for part in new]
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs = _pairs(node.targets[0], node.value)
            if len(pairs) > 1 and not {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} & _bound(node):
                new = [ast.Assign(targets=[target], value=value) for target, value in pairs]
                return [_at(node, part) for part in new]
        if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            new = copy.copy(node)
            for field in ("body", "handlers", "orelse", "finalbody"):
                if hasattr(node, field):
                    setattr(new, field, [part for child in getattr(node, field) for part in self._parts(child)])
            new.text = None
            return [new]
        return [node]

    def _imported(self, old, new):
        """The import `new` of one name. From a file next to the model's, it becomes one from its copy in the folder."""
        _at(old, new)
        alias, module = new.names[0], getattr(new, "module", None) or ""
        bound = next(iter(_bound(new)))
        if isinstance(new, ast.Import):
            self.imports[bound] = alias.name if alias.asname else bound
            if self._is_own(alias.name):
                new.problem = f"it imports {alias.name} as a whole; write `from {alias.name} import` and the names"
            return new
        if new.level and (package := self.memory.get("__package__")):
            module = importlib.util.resolve_name("." * new.level + module, package)
        if not new.level and not self._is_own(module):
            self.imports[bound] = f"{module}.{alias.name}"
            return new
        value = getattr(sys.modules.get(module), alias.name, None)
        if value is None or isinstance(value, ModuleType):
            new.problem = f"it imports {alias.name} from {module or 'its folder'} as a whole"
            return new
        self.own[bound] = module, alias.name
        return _at(old, ast.ImportFrom(module=_name_of(module, self.names), names=[alias], level=1))

    def _is_own(self, name):
        """Whether a module lies in the package of the model's module, or next to its file; not what is installed."""
        file, base = getattr(sys.modules.get(name), "__file__", None), getattr(self.base, "__file__", None)
        if not file:
            return False
        if base and self.base.__package__ and name.split(".")[0] == self.base.__package__.split(".")[0]:
            return True
        folder, file = Path(base).resolve().parent if base else Path.cwd(), Path(file)
        return file.resolve().is_relative_to(folder) and not any(file.is_relative_to(path) for path in _INSTALLED)

    # ------------------------------------------------------------------------------------------ which are needed

    def choose(self, needed):
        """Choose the definitions of these names and of all that they read; the names needed from files next to it."""
        asked, before = set(needed), None
        while before != needed:
            before = set(needed)
            pairs = [(node, self._needed_part(node, needed)) for node in self.statements]
            self.chosen = [part for _, part in pairs if part is not None]
            needed |= {name for part in self.chosen for name in _read(part)}
        defined = {name for part in self.chosen for name in self._defined(part)}
        for name in sorted(asked - defined):
            raise ValueError(f"{name} is not defined at the top level of {self.label}")
        for node, part in pairs:
            if part is None:
                self._check_left_out(node, needed)
        if "*" not in defined:
            for name in sorted(needed - defined):
                if name in self.memory and not hasattr(builtins, name) and not name.startswith("__"):
                    raise ValueError(f"{name} is not defined by a statement of {self.label} that can be taken")
        early = set()  # in a notebook, cells may have been run in another order
        for part in self.chosen:
            self._check(part)
            early |= self._defined(part)
            names = {n.id for n in _at_import(part) if isinstance(n, ast.Name)} if self.is_notebook else set()
            for name in sorted(names & defined - early):
                raise ValueError(f"{name} is used before the cell that defines it")
        return [self.own[name] for name in needed & defined & set(self.own)]

    def _needed_part(self, node, needed):
        """What of a statement defines a needed name. None if nothing does, or if it does more than define."""
        defined = self._defined(node)
        if defined is None or not (defined & needed or defined & {"*"} or _is_future(node)):
            return None
        return self._pruned(node, needed) if isinstance(node, (ast.If, ast.Try)) else node

    def _pruned(self, node, needed):
        """A block without the definitions that are not needed."""
        new = copy.copy(node)
        for field in ("body", "handlers", "orelse", "finalbody"):
            parts = []
            for child in getattr(node, field, []):
                if isinstance(child, (ast.If, ast.Try, ast.ExceptHandler)):
                    parts.append(self._pruned(child, needed))
                # An import in a `try` decides which way it goes.
                elif isinstance(child, _IMPORTS) or self._defined(child) & needed:
                    parts.append(child)
            if hasattr(node, field):
                setattr(new, field, parts or ([ast.Pass()] if field == "body" else []))
        return new

    def _defined(self, node):
        """Names that a statement of the top level gives a meaning. None if it does more than define."""
        if isinstance(node, (*_IMPORTS, *_DEFINITIONS)):
            return _bound(node)
        if type(node).__name__ == "TypeAlias":  # Python 3.12
            return {node.name.id}
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return set()
        if isinstance(node, _ASSIGNMENTS):
            changed = {_root(target) for target in _targets(node) if isinstance(target, (ast.Attribute, ast.Subscript))}
            return _bound(node) | changed if changed <= self.containers | self.functions else None
        if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            fields = ("body", "handlers", "orelse", "finalbody")
            names = [self._defined(child) for field in fields for child in getattr(node, field, [])]
            return None if None in names else set().union(*names)
        return None

    def _check_left_out(self, node, needed):
        """Refuse if a statement that is not taken changes what is."""
        parts = list(_at_import(node))
        stored = [n for n in parts if isinstance(n, (ast.Attribute, ast.Subscript)) and isinstance(n.ctx, ast.Store)]
        methods = {_root(n.func) for n in parts if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
        changed = {_root(n) for n in stored} - set(self.imports) - set(self.own)
        for name in sorted(needed & (_bound(node) | changed | methods & self.containers), key=str):
            raise ValueError(f"{self._place(node)} does more than define {name}, which the model needs")

    def _check(self, part):
        """Refuse a definition that does something, or reads a secret, when the file is imported."""
        for node in _at_import(part):
            if hasattr(node, "problem"):
                raise ValueError(f"{self._place(node)}: {node.problem}")
            name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
            if name in _SECRETS or (isinstance(node, ast.Name) and name in _BUILTINS):
                raise ValueError(f"{self._place(node)} uses `{name}` when the file is imported")
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                targets = _targets(child) if isinstance(child, _ASSIGNMENTS) else []
                changed = {_root(target) for target in targets if not isinstance(target, ast.Name)}
                if (isinstance(child, ast.Expr) and not is_text) or changed & {*self.imports, *self.own}:
                    raise ValueError(f"{self._place(child)} does more than define a part of {node.name}")
        for definition in (node for node in ast.walk(part) if isinstance(node, _DEFINITIONS)):
            for node in (node for node in ast.walk(definition) if isinstance(node, _IMPORTS)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                if getattr(node, "level", 0) or any(self._is_own(name) for name in names):
                    raise ValueError(f"{self._place(node)} imports a file next to it inside of {definition.name}")
        for call in (call for node in _leaves(part) for call in _calls(node)):
            path, root = [], call.func
            while isinstance(root, ast.Attribute):
                path.append(root.attr)
                root = root.value
            if isinstance(root, ast.Name) and root.id in self.imports:
                path += reversed(self.imports[root.id].split("."))
                path += [] if path[-1] in _PACKAGES else ["open"]
            if any(_EFFECTS.fullmatch(name) for name in path):
                raise ValueError(f"{self._place(call)} calls `{ast.unparse(call.func)}` when the file is imported")

    def doubtful(self):
        """Names of what has a text, which may be a secret, or calls what may be more than a computation."""
        found = {}
        for node in (leaf for part in self.chosen for leaf in _leaves(part, everything=True)):
            names = {_root(target) for target in _targets(node)} if isinstance(node, _ASSIGNMENTS) else _bound(node)
            run = [node] if isinstance(node, _ASSIGNMENTS) else getattr(node, "decorator_list", [])
            inner = [child for part in run for child in ast.walk(part)]
            values = [n.value for n in inner if isinstance(n, ast.Constant) and isinstance(n.value, (str, bytes))]
            calls = {_root(call.func) for call in _calls(node)} if isinstance(node, _ASSIGNMENTS) else set()
            calls = {name for name in calls if name and name not in self.imports and not hasattr(builtins, name)}
            if calls or any(value and value not in names for value in values):
                found |= dict.fromkeys(f"{name} ({self._place(node)})" for name in sorted(filter(None, names)))
        return list(found)

    def _place(self, node):
        return f"line {getattr(node, 'lineno', '?')} of {self.label}"

    # ------------------------------------------------------------------------------------- the text that is saved

    def text(self, head):
        """The chosen definitions as a file."""
        parts = sorted(self.chosen, key=lambda node: not _is_future(node))
        return "\n\n".join([head, *[getattr(part, "text", None) or ast.unparse(part) for part in parts]]) + "\n"

    def compare(self, text, wanted):
        """Refuse if the definitions in memory are not those of the text: the file may have changed since its import."""
        compile(text, "<saved>", "exec", dont_inherit=True)
        codes = set().union(*[part.codes for part in self.chosen])
        memory = self.memory | {name: value for name, value in wanted.items() if value is not None}
        leaves = [leaf for part in self.chosen for leaf in _leaves(part, everything=True)]
        counts = [name for leaf in leaves for name in self._defined(leaf) or ()]
        for node in leaves:
            names = [name for name in _bound(node) if counts.count(name) == 1]
            for name in names if not isinstance(node, _IMPORTS) else []:
                is_missing = name not in memory  # as is what stands in a branch that was not taken
                if (node in self.chosen) if is_missing else not self._agrees(node, memory[name], codes):
                    raise ValueError(
                        f"{name} in {self.label} is not the one in memory; the source was changed after it was run"
                    )

    def _agrees(self, node, value, codes):
        if isinstance(node, _ASSIGNMENTS):
            is_lambda = isinstance(node.value, ast.Lambda)
            return self._agrees(node.value, value, codes) if is_lambda else _is_equal(node.value, value)
        functions = _functions(value)
        if isinstance(node, ast.ClassDef) and isinstance(value, type):
            functions = [function for member in vars(value).values() for function in _functions(member)]
            for child in node.body:
                for name in _bound(child):
                    if isinstance(child, _FUNCTIONS) and name not in vars(value):
                        return False
                    is_checked = name in vars(value) and isinstance(child, (*_FUNCTIONS, *_ASSIGNMENTS))
                    if is_checked and not self._agrees(child, vars(value)[name], codes):
                        return False
        own = [f for f in functions if f.__globals__ is self.memory and f.__code__.co_filename != "<string>"]
        if isinstance(node, _FUNCTIONS) and not own and not node.decorator_list:
            return False
        for function in own:
            if _plain(function.__code__) not in codes:
                return False
            if isinstance(node, _FUNCTIONS) and function.__name__ == node.name:
                pairs = zip(reversed(node.args.defaults), reversed(function.__defaults__ or ()))  # noqa: B905
                named = zip((arg.arg for arg in node.args.kwonlyargs), node.args.kw_defaults, strict=True)
                pairs = [*pairs, *[(default, (function.__kwdefaults__ or {}).get(arg)) for arg, default in named]]
                if not all(_is_equal(default, given) for default, given in pairs):
                    return False
        return True


# ----------------------------------------------------------------------------------------------------------- statements


def _at(old, new):
    """A new statement with the place of an old one, and without its text."""
    new = ast.fix_missing_locations(ast.copy_location(new, old))
    new.text = None
    return new


def _text(node, source):
    """The text of a statement, with its comments if possible."""
    first = _first_line(node)
    if first == node.lineno:
        text = ast.get_source_segment(source, node)
    else:  # splitlines() would know more ends of lines than Python
        text = "\n".join(source.split("\n")[first - 1 : node.end_lineno])
    try:
        is_whole = ast.dump(ast.parse(text)) == ast.dump(ast.Module([node], []))
    except SyntaxError:
        is_whole = False
    return text if is_whole else ast.unparse(node)


def _first_line(node):
    return min([node.lineno, *[decorator.lineno for decorator in getattr(node, "decorator_list", [])]])


def _is_future(node):
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_main_guard(node):
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)  # what a script does when it is run


def _is_container(value):
    names = "dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque"
    return isinstance(value, _CONTAINERS) or (isinstance(value, ast.Call) and _root(value.func) in names)


def _pairs(target, value):
    """What is assigned to what: `(a, b), c = (1, 2), 3` as three pairs, if it can be told."""
    kinds = ast.Tuple, ast.List
    if not (isinstance(target, kinds) and isinstance(value, kinds) and len(target.elts) == len(value.elts)):
        return [(target, value)]
    if any(isinstance(element, ast.Starred) for element in [*target.elts, *value.elts]):
        return [(target, value)]
    return [pair for parts in zip(target.elts, value.elts, strict=True) for pair in _pairs(*parts)]


def _targets(node):
    """What an assignment stores to: names, attributes and items."""
    todo, found = list(getattr(node, "targets", None) or [node.target]), []
    while todo:
        target = todo.pop()
        if isinstance(target, (ast.Tuple, ast.List, ast.Starred)):
            todo += target.elts if hasattr(target, "elts") else [target.value]
        else:
            found.append(target)
    return found


def _root(node):
    """The name that `name.attribute[item]` or `name.method()` starts with, or None."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _bound(node):
    """Names that a statement gives a value in the scope in which it stands."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, _IMPORTS):
        return {"__future__"} if _is_future(node) else {a.asname or a.name.split(".")[0] for a in node.names}
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return set()
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    return set().union(*[_bound(child) for child in ast.iter_child_nodes(node)])


def _at_import(node):
    """The nodes that run when a file is imported, or may run: not the bodies of functions, nor annotations."""
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, _FUNCTIONS):
        children = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.AnnAssign):
        children = [child for child in (node.target, node.value) if child is not None]
    for child in children:
        yield from _at_import(child)


def _leaves(part, everything=False):
    """The assignments of a definition and the tests of its blocks, or all that is no block."""
    if not isinstance(part, (ast.If, ast.Try, ast.ExceptHandler)):
        return [part] if everything or isinstance(part, _ASSIGNMENTS) else []
    fields = ("body", "handlers", "orelse", "finalbody")
    leaves = [leaf for field in fields for child in getattr(part, field, []) for leaf in _leaves(child, everything)]
    return (
        leaves if everything else [*filter(None, [getattr(part, "test", None), getattr(part, "type", None)]), *leaves]
    )


def _calls(node):
    return [n for n in _at_import(node) if isinstance(n, ast.Call)]


def _read(statement):
    """Names of the module's top level that a statement may read. Local variables of the same name are not read."""
    names = set()
    if _is_future(statement):
        return names

    def visit(table):
        names.update(s.get_name() for s in table.get_symbols() if s.is_global() or table.get_type() == "module")
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(getattr(statement, "text", None) or ast.unparse(statement), "<model>", "exec"))
    for node in ast.walk(statement):  # Python reads annotations late or never, depending on its version
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            names |= {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation else set()
    return names


# -------------------------------------------------------------------------------------------------- objects in memory


def _functions(value):
    """The functions that a class or a module has for a name, without their decorators."""
    if isinstance(value, property):
        return [part for accessor in (value.fget, value.fset, value.fdel) for part in _functions(accessor)]
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, (functools.cached_property, functools.partial)):
        value = value.func
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    return [value] if isinstance(value, FunctionType) else []


def _codes(code):
    """The code of all functions and classes within some code."""
    inner = [value for value in code.co_consts if isinstance(value, CodeType)]
    return inner + [deeper for value in inner for deeper in _codes(value)]


def _plain(code):
    """Code without the place in its file, so that equal code is equal."""
    values = tuple(_plain(value) if isinstance(value, CodeType) else value for value in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=values)


def _is_equal(node, value):
    """Whether a constant of the source has this value in memory; True for what is no constant."""
    try:
        expected = ast.literal_eval(node)
    except (TypeError, ValueError, AttributeError):
        return True
    if isinstance(expected, (dict, list, set)):
        return True  # it may have been filled since
    return type(expected) is type(value) and expected == value
