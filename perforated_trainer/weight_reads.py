"""Layers whose weights other code reads instead of calling the layer: their dendrites would be left out there.

The source of each module's class is searched for expressions such as `self.conv.weight`. Attributes that say nothing
about the values (`self.out.weight.dtype`) do not count, nor do methods that run when a model is made.
"""

import ast
import contextlib
import inspect
import linecache
import re
import sys
from collections.abc import Iterator
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from .layers import rebind_forward

_READS = re.compile(r"(?<!self)(?<!module)\.(weight|bias)\b")
_HARMLESS = set("dtype device shape ndim size dim numel requires_grad is_cuda is_meta is_quantized grad".split())
_WHEN_MADE = set(
    "__init__ _init_weights init_weights initialize_weights "
    "reset_parameters _reset_parameters tie_weights extra_repr".split()
)
_QUESTIONS = {"isinstance", "hasattr", "getattr", "type", "id", "len"}
# Their classes read the weights of layers on a fast path, which `blocks.compute_in_full` switches off.
_COMPUTED_IN_FULL = nn.TransformerEncoderLayer, nn.TransformerEncoder


def layers_read(model: nn.Module) -> dict[str, str]:
    """Names of layers whose weights are read, and the method that does.

    Args:
        model (`nn.Module`): Its classes are searched, not its values.

    Returns:
        `dict`: Name of the layer: "Class.method".
    """
    found, names = {}, {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    for module in names:
        for cls in type(module).__mro__:
            if not issubclass(cls, nn.Module) or cls in (nn.Module, PreTrainedModel, *_COMPUTED_IN_FULL):
                continue
            for path, method in _reads(cls):
                for layer in _resolve(module, path):
                    if isinstance(layer, nn.Module) and layer in names:
                        found.setdefault(names[layer], f"{cls.__name__}.{method}")
    return found


def _resolve(module, path: tuple) -> list:
    """What a path leads to; `...` in it stands for each module of a list."""
    for i, part in enumerate(path):
        if part is ...:
            each = module.children() if isinstance(module, (nn.ModuleList, nn.Sequential)) else ()
            return [found for child in each for found in _resolve(child, path[i + 1 :])]
        try:
            module = module[part] if isinstance(part, int) else getattr(module, part)
        except (AttributeError, IndexError, KeyError, TypeError):
            return []
    return [module]


@cache
def _reads(cls: type) -> list[tuple[tuple, str]]:
    """For each weight that a class reads: the path to its layer from `self`, and the method."""
    node = _class_node(cls)
    found = []
    for method in node.body if node else ():
        if not isinstance(method, ast.FunctionDef) or method.name in _WHEN_MADE:
            continue
        if method.name.startswith(("init_", "_init_")):
            continue
        harmless, roots = set(), {"self": ()} | _loop_variables(method)
        for part in ast.walk(method):
            if isinstance(part, ast.Attribute) and part.attr in _HARMLESS:
                harmless.add(id(part.value))
            elif isinstance(part, ast.Call) and getattr(part.func, "id", None) in _QUESTIONS:
                harmless |= {id(argument) for argument in part.args}
            elif isinstance(part, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in part.ops):
                harmless.add(id(part.left))
        for part in ast.walk(method):
            reads = (
                isinstance(part, ast.Attribute) and part.attr in ("weight", "bias") and isinstance(part.ctx, ast.Load)
            )
            if reads and id(part) not in harmless and (path := _path(part.value, roots)):
                found.append((path, method.name))
    return found


def _loop_variables(method) -> dict[str, tuple]:
    """Paths of loop variables: `for block in self.blocks`, `for i, block in enumerate(self.blocks)`."""
    found = {}
    for node in ast.walk(method):
        if isinstance(node, (ast.For, ast.comprehension)):
            target, each = node.target, node.iter
            if isinstance(each, ast.Call) and getattr(each.func, "id", None) == "enumerate" and each.args:
                target, each = getattr(target, "elts", [None])[-1], each.args[0]
            if isinstance(target, ast.Name) and (path := _path(each, {"self": ()})):
                found[target.id] = (*path, ...)
    return found


def _path(node, roots: dict[str, tuple]) -> tuple:
    """The path of `self.a.b[0]` from `self`, empty for anything else; `...` is an index that is computed."""
    parts = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        elif not isinstance(node.slice, ast.Slice):  # a slice is a list again
            try:
                parts.append(ast.literal_eval(node.slice))
            except ValueError:
                parts.append(...)
        node = node.value
    return (*roots[node.id], *reversed(parts)) if isinstance(node, ast.Name) and node.id in roots else ()


def _class_node(cls: type) -> ast.ClassDef | None:
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        try:  # finds the class that is meant among several of a name
            source = inspect.cleandoc("\n" + inspect.getsource(cls))
        except (OSError, TypeError):
            return None
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return None
        return tree.body[0] if tree.body and isinstance(tree.body[0], ast.ClassDef) else None
    return _classes(cls.__module__).get(cls.__qualname__)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by name, of one in whose source a weight is read at all."""
    file = getattr(sys.modules.get(module), "__file__", None)
    source = "".join(linecache.getlines(file)) if file and file.endswith(".py") else ""
    if not _READS.search(source):
        return {}
    found = {}

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")

    try:
        visit(ast.parse(source), "")
    except (SyntaxError, RecursionError, ValueError):
        return {}
    return found


@contextlib.contextmanager
def watch_reads(model: nn.Module, names: list[str]) -> Iterator[dict[str, bool]]:
    """Watch one pass: which of the layers have their weights read although nothing calls them.

    What no source shows: a weight that is read through another name, or in a class whose source is not available. A
    layer that nothing has called, and whose weight has a gradient, was read, too.

    Args:
        model (`nn.Module`): Its layers get another class for the time of a `with` block.
        names (`list[str]`): Of the layers.

    Yields:
        `dict`: After the block, for each layer whose weights were read outside of its forward: whether it was called.
    """
    found, called, inside, before = {}, set(), [], {}
    for name in names:
        module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, _COMPUTED_IN_FULL):
            continue  # with dendrites it calls the layer
        if module not in before and "weight" in module._parameters:
            before[module] = type(module)
            module.__class__ = _watched(type(module), name, found, called, inside)
            rebind_forward(module)
    try:
        yield found
    finally:
        for module, cls in before.items():
            module.__class__ = cls
            rebind_forward(module)
        for name in names:
            module = model.get_submodule(name)
            if module in before and name not in called and module._parameters["weight"].grad is not None:
                found[name] = False
        found.update({name: name in called for name in found})


def _watched(cls, name, found, called, inside):
    def __getattr__(self, attribute):
        value = super(watched, self).__getattr__(attribute)
        if attribute in ("weight", "bias") and not inside:
            found.setdefault(name, False)
        return value

    def forward(self, *args, **kwargs):
        called.add(name)
        inside.append(name)
        try:
            return super(watched, self).forward(*args, **kwargs)
        finally:
            inside.pop()

    def __reduce_ex__(self, protocol):  # a copy that is made in the meantime is of the layer's own class
        reduced = cls.__reduce_ex__(self, protocol)
        return reduced[0], tuple(cls if part is watched else part for part in reduced[1]), *reduced[2:]

    names = {"__getattr__": __getattr__, "forward": forward, "__reduce_ex__": __reduce_ex__}
    watched = type(cls.__name__, (cls,), names | {"__module__": cls.__module__})
    return watched
