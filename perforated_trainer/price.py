"""What dendrites cost, in parameters, before they are there: prices, how many fit, and the table of it."""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from .arguments import DendriteArguments, PerforatedError


def neurons_of(module: nn.Module) -> int:
    """Number of neurons in the output of a module; of one that is not known, in that of the last layer in it."""
    last = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None][-1]
    if isinstance(last, Conv1D):
        return last.nf
    for name in ("out_features", "out_channels", "embedding_dim"):
        if hasattr(last, name):
            return getattr(last, name)
    return next(last.parameters(recurse=False)).shape[0]


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


def check_fits(sizes: list[int], args: DendriteArguments) -> None:
    """Raise PerforatedError where not even one dendrite fits `max_parameters`."""
    if args.doing_pai and args.max_parameters and len(sizes) > 1 and sizes[1] > args.max_parameters:
        raise PerforatedError(
            f"--max_parameters {args.max_parameters:,}: the model has {sizes[0]:,} parameters, and {sizes[1]:,} with "
            "one dendrite more, which does not fit; allow more, or give dendrites to fewer layers "
            "(--perforate_last_blocks, --module_ids_to_track)"
        )


def _lines(rows: list[tuple]) -> list[str]:
    """Rows as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def table(
    layers: dict[str, tuple[str, int, int]],
    left: dict[str, list[str]],
    sizes: list[int],
    before: int,
    limit: int | None = None,
) -> str:
    """What gets dendrites, what does not, and the size of the network with each dendrite more.

    Args:
        layers: type, parameters and neurons of each layer that gets dendrites, by name.
        left: names of modules with weights that get none, by type.
        sizes: as the function `sizes` gives them.
        before: dendrites that each layer has now.
        limit: the largest number of parameters, where there is one.
    """
    groups = {}
    for name, (kind, parameters, neurons) in layers.items():
        group = groups.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", name) or "the model itself", kind), [0, 0, 0])
        for i, value in enumerate((1, parameters, of_dendrite(parameters, neurons, before + 1))):
            group[i] += value
    rows = [("Dendrites for", "type", "layers", "parameters", "one dendrite adds")]
    rows += [(name, kind, *(f"{value:,}" for value in group)) for (name, kind), group in groups.items()]
    lines = _lines(rows)
    if left:
        kinds = (f"{kind} ({', '.join(dict.fromkeys(names))})" for kind, names in left.items())
        lines.append(f"No dendrites: {'; '.join(kinds)}")
    rows = [("Dendrites", "parameters", "more", "")]
    for number, size in enumerate(sizes):
        more, share = (f"+{size - sizes[0]:,}", f"+{size / sizes[0] - 1:.1%}") if number else ("", "")
        too_large = limit and size > limit
        rows.append((f"{before + number}{' (too large)' if too_large else ''}", f"{size:,}", more, share))
        if too_large:
            break
    return "\n".join(lines + _lines(rows))
