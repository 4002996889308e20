"""The number of parameters that dendrites add, before they are added, and the table of it."""

import math
import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from .arguments import DendriteArguments, PerforatedError
from .report import first_of


def neurons_of(module: nn.Module) -> int:
    """Number of neurons in the output of a module; of one that is not known, in that of the last layer in it."""
    last = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None][-1]
    if isinstance(last, Conv1D):
        return last.nf
    for name in ("out_features", "out_channels", "embedding_dim"):
        if hasattr(last, name):
            return getattr(last, name)
    return next(last.parameters(recurse=False)).shape[0]


def of_low_rank(module: nn.Module, rank: int, neurons: int) -> int:
    """Parameters of a dendrite of low rank: two thin matrices and a bias."""
    return rank * (_inputs(module) + neurons) + neurons


def of_full_rank(module: nn.Module, neurons: int) -> int:
    """Parameters of a layer's weight and bias, also where torch computes the weight of others, as weight norm does."""
    return _inputs(module) * neurons + (0 if module.bias is None else neurons)


def _inputs(module: nn.Module) -> int:
    """Inputs of each neuron of a layer."""
    if hasattr(module, "kernel_size"):
        return module.in_channels // module.groups * math.prod(module.kernel_size)
    return getattr(module, "in_features", getattr(module, "nx", None))


def of_dendrite(parameters: int, neurons: int, number: int) -> int:
    """Parameters that dendrite `number` of a layer adds: a copy of the layer, and for each neuron one weight to the
    output and one from each dendrite before it."""
    return parameters + neurons * number


def sizes(now: int, layers: list[tuple[int, int]], before: int, most: int) -> list[int]:
    """Parameters of the network with 0, 1, ... `most` dendrites more.

    Args:
        now: parameters of the network.
        layers: parameters and neurons of each layer that gets dendrites.
        before: dendrites that each of them has now.
        most: how many come at most.
    """
    result = [now]
    for number in range(before + 1, before + most + 1):
        result.append(result[-1] + sum(of_dendrite(*layer, number) for layer in layers))
    return result


def check_fits(sizes: list[int], args: DendriteArguments, initial: int) -> None:
    """Raise PerforatedError where not even one dendrite, or not the initial ones, fit `max_parameters`."""
    number = min(max(initial, 1), len(sizes) - 1)
    if args.doing_pai and args.max_parameters and number and sizes[number] > args.max_parameters:
        more = "one dendrite" if number == 1 else f"{number} dendrites"
        raise PerforatedError(
            f"--max_parameters {args.max_parameters:,}: the model has {sizes[0]:,} parameters, and {sizes[number]:,} "
            f"with {more} more, which does not fit; allow more, or give dendrites to fewer layers "
            "(--perforate_last_blocks, --module_ids_to_track)"
        )


def _lines(rows: list[tuple]) -> list[str]:
    """Rows as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _ranges(numbers: list[int]) -> str:
    """ "0-3,5" """
    parts = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", f".{name}")[1:]


def collapse(names: list[str], every: list[str]) -> dict[str, str]:
    """A short form of each name: `layer.*.dense` for all blocks, `layer.{0-3}.dense` for some of them.

    Args:
        names (`list[str]`): Names of modules that share a property.
        every (`list[str]`): Names of all modules of the model.
    """
    all_of, some_of = {}, {}
    for group, those in ((all_of, every), (some_of, names)):
        for name in those:
            group.setdefault(_pattern(name), []).append(name)
    short = {}
    for pattern, those in some_of.items():
        form = pattern
        if len(those) < len(all_of.get(pattern, those)):
            numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", f".{name}") for name in those]
            if len(numbers[0]) == 1:
                form = pattern.replace("*", f"{{{_ranges([int(number) for (number,) in numbers])}}}")
            else:
                form = None
        for name in those:
            short[name] = name if form is None else form
    return short


def table(
    layers: dict[str, tuple[str, int, int]],
    excluded: dict[str, list[str]],
    every: list[str],
    sizes: list[int],
    before: int,
    limit: int | None = None,
) -> str:
    """What gets dendrites, what does not and why, and the number of parameters with each further dendrite.

    Args:
        layers (`dict`): Type of each layer that gets dendrites, parameters of a dendrite and number of neurons, by
            name.
        excluded (`dict`): Names of modules with weights that get none, by reason.
        every (`list[str]`): Names of all modules.
        sizes (`list[int]`): As `sizes` returns them.
        before (`int`): Dendrites that the layers have now.
        limit (`int`, *optional*): The largest number of parameters.
    """
    groups, short = {}, collapse(list(layers), every)
    for name, (kind, parameters, neurons) in layers.items():
        group = groups.setdefault((short[name] or "the model itself", kind), [0, 0])
        for i, value in enumerate((1, of_dendrite(parameters, neurons, before + 1))):
            group[i] += value
    rows = [("Dendrites for", "type", "layers", "one dendrite adds")]
    rows += [(name, kind, *(f"{value:,}" for value in group)) for (name, kind), group in groups.items()]
    lines = _lines(rows)
    for reason, names in excluded.items():
        shown = list(dict.fromkeys(collapse(names, every).values()))
        lines.append(f"No dendrites ({reason}): {first_of(shown, 8)}")
    rows = [("Dendrites per layer", "parameters", "more", "")]
    for number, size in enumerate(sizes):
        more, share = (f"+{size - sizes[0]:,}", f"+{size / sizes[0] - 1:.1%}") if number else ("", "")
        too_large = limit and size > limit
        rows.append((f"{before + number}{' (too large)' if too_large else ''}", f"{size:,}", more, share))
        if too_large:
            break
    return "\n".join(lines + _lines(rows))
