"""Names of modules by patterns, as peft's `target_modules` has them, and the last blocks of a network."""

import difflib
import re
from collections.abc import Iterable

from torch import nn

from .arguments import PerforatedError

_SPECIAL = re.compile(r"[*+?\[\](){}|\\^$]")  # no name of a module has these, so that a text with one is a pattern


def is_expression(pattern: str) -> bool:
    """Whether a pattern is a regular expression, not a name."""
    return bool(_SPECIAL.search(pattern))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern means.

    Args:
        pattern: a regular expression for the whole name, a name, or the end of names: `query` means each `*.query`.
            With a dot in front, as perforatedai writes names, it is a whole name.
        names: of the modules.

    Raises PerforatedError for a regular expression that is none.
    """
    if is_expression(pattern):
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise PerforatedError(f"{pattern!r} is no regular expression: {error}") from None
        return [name for name in names if expression.fullmatch(name)]
    if pattern.startswith("."):
        return [name for name in names if name == pattern.strip(".")]
    return [name for name in names if name == pattern.strip(".") or name.endswith(f".{pattern.strip('.')}")]


def _no_match(patterns: list[str], names: list[str]) -> PerforatedError:
    """The words for patterns that match nothing, with names that are like them."""
    ends = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    close = {}
    for pattern in patterns:
        plain = re.sub(r"[^\w.]", "", pattern.replace("\\.", ".").replace(".*", "")).strip(".")
        close |= dict.fromkeys(difflib.get_close_matches(plain, names, 3))
        close |= dict.fromkeys(ends[end] for end in difflib.get_close_matches(plain.rsplit(".", 1)[-1], ends, 3))
    words = f"; close to it: {', '.join(list(close)[:5])}" if close else "; see model.named_modules()"
    return PerforatedError(f"the model has no module {', '.join(sorted(patterns))}{words}")


def find(patterns: str | list[str], names: list[str]) -> dict[str, list[str]]:
    """For each pattern the names that it means. Raises PerforatedError where it means none."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = {pattern: matching(pattern, names) for pattern in patterns}
    if nothing := [pattern for pattern, those in found.items() if not those]:
        raise _no_match(nothing, [name for name in names if name])
    return found


def last_blocks(model: nn.Module, number: int) -> list[str]:
    """Names of the last blocks of a model: of the longest row of numbered modules that is not itself in such a row.

    A row of modules of one type comes before another. Of several that are as long, as in an encoder and a decoder, the
    one nearest to the output counts.

    Raises PerforatedError where there are not as many.
    """
    stack, blocks, best = "", [], (False, 1)
    for name, module in model.named_modules():
        children, kinds = [child for child, _ in module.named_children()], set(map(type, module.children()))
        inside = any(part.isdigit() for part in name.split("."))
        numbered = children == [str(i) for i in range(len(children))]
        rank = len(children) > 1 and len(kinds) == 1, len(children)
        if numbered and not inside and rank >= best:
            best, stack, blocks = rank, name, [f"{name}.{child}".strip(".") for child in children]
    if not 0 < number <= len(blocks):
        there = f"the model has {len(blocks)}, in {stack or 'itself'}" if blocks else "the model has no row of blocks"
        raise PerforatedError(f"--perforate_last_blocks {number}: {there}")
    return blocks[-number:]
