"""The formula of dendrites as functions of tensors: activations, sums, and products of low rank.

A layer y = W x + b gets n dendrites d_i = s(W_i x + b_i + sum over j < i of c_ij d_j), and its output becomes
y + sum over i of a_i d_i. The activation s is the sigmoid by default; a and c hold one value per neuron. With a rank r,
W_i is the product of two thin matrices, B_i A_i, which is never computed.
Source: perforatedai's open source `clean_perforatedai.py`; arXiv:2501.18018 describes the idea.

A copy of this file is saved next to models as custom code, so it imports nothing of the package.
"""

import torch
import torch.nn.functional as F


def _identity(x):
    return x


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "mish": F.mish,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "logsigmoid": F.logsigmoid,
    "identity": _identity,
}


def combine(output, sums, to_dendrite, to_output, activation, dim):
    """The formula, from the output of the layer and the sums W_i x + b_i of its dendrites."""
    ones = (1,) * (-1 - dim)

    def values(rows):  # one tensor per row, in the dtype of the output, which autocast may have chosen
        rows = rows.to(output.dtype)
        return _each(rows.view(*rows.shape, *ones) if ones else rows)

    dendrites, between = [], to_dendrite.split(tuple(range(len(sums)))) if len(sums) > 1 else ()  # i: the c_ij, j < i
    for i, (total, factor) in enumerate(zip(sums, values(to_output))):  # noqa: B905 - torch.compile; equal lengths
        if i:
            for weight, dendrite in zip(values(between[i]), dendrites):  # noqa: B905
                total = torch.addcmul(total, weight, dendrite)
        dendrites.append(activation(total))
        output = torch.addcmul(output, factor, dendrites[-1])
    return output


def _each(stacked):
    """As `unbind`, without the copy that its backward pass makes of a single one."""
    return [stacked.squeeze(0)] if stacked.shape[0] == 1 else stacked.unbind()


def split_equally(stacked, number, axis):
    """As `chunk`, whose operator in ONNX keeps weights from being constants, and so from int8."""
    size = stacked.shape[axis] // number
    return [stacked.narrow(axis, i * size, size) for i in range(number)] if number > 1 else [stacked]


def second_factors(hidden, up, bias, dtype, dim):
    """The sums of dendrites of low rank from the products with all first factors."""
    ones = (1,) * (-1 - dim)
    product = (F.linear, F.conv1d, F.conv2d, F.conv3d)[len(ones)]
    up = up.transpose(1, 2)
    up = _each(up.reshape(*up.shape, *ones) if ones else up)
    parts = hidden.chunk(len(up), dim) if len(up) > 1 else [hidden]
    return [product(part, up, bias).to(dtype) for part, up, bias in zip(parts, up, _each(bias))]  # noqa: B905


_BLOCK = 2**18  # numbers of all dendrites: what a CPU's cache holds several times
# Activations whose gradient is known from their value: how both are computed in place.
_IN_PLACE = {
    torch.sigmoid: (torch.sigmoid_, torch.ops.aten.sigmoid_backward.grad_input),
    torch.tanh: (torch.tanh_, torch.ops.aten.tanh_backward.grad_input),
    _identity: (_identity, lambda gradient, value, grad_input: None),
}


class Recomputed(torch.autograd.Function):
    """The formula for dendrites of low rank of rows of neurons, from `hidden`, transposed: (n r, rows).

    Nothing of the layer's size is kept for the backward pass, which computes it again; autograd would keep as much as
    the layer's output of each dendrite. On a CPU both passes work in blocks that its cache holds.
    """

    @staticmethod
    def forward(ctx, activation, output, hidden, *own):
        ctx.activation = activation
        ctx.save_for_backward(hidden, *own)
        rows, factors = output.reshape(-1, output.shape[-1]), own[-1].unbind()
        result = output.new_empty(output.shape)  # no view is returned: code of models may change it in place
        targets = result.view(rows.shape)
        with torch.autocast(output.device.type, enabled=False):
            for block, _, values, _ in _blocks(hidden, *own[:3], rows.shape, activation):
                before, target = rows[block], targets[block]
                for factor, value in zip(factors, values.unbind()):  # noqa: B905 - torch.compile; equal lengths
                    before = torch.addcmul(before, factor, value, out=target)
        return result

    @staticmethod
    def backward(ctx, gradient):
        hidden, up, bias, between, to_output = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():  # a gradient of gradients is asked for
            inputs = [value for value in ctx.saved_tensors if value.requires_grad]  # not the c of a single dendrite
            sums = second_factors(hidden.t(), up, bias, rows.dtype, -1)
            added = combine(torch.zeros_like(rows), sums, between, to_output, ctx.activation, -1)
            found = iter(torch.autograd.grad(added, inputs, rows, create_graph=True, allow_unused=True))
            return None, gradient, *(next(found) if value.requires_grad else None for value in ctx.saved_tensors)
        exact = torch.promote_types(rows.dtype, torch.float32)  # for sums over rows
        of_hidden, of_own, pairs, factors = [], None, between.unbind(), to_output.unsqueeze(1)
        slope = _IN_PLACE.get(ctx.activation, (None, None))[1]
        with torch.autocast(rows.device.type, enabled=False):
            for block, part, values, graphs in _blocks(hidden, up, bias, between, rows.shape, ctx.activation, slope):
                above, each = rows[block], values.unbind()
                of_output = (values * above).sum(1, dtype=exact)
                of_sums = above * factors  # first of the values, then of the sums that go into the activation
                of_between = [None] * (len(up) - 1)
                for i in reversed(range(len(up))):
                    of_sum, first = of_sums[i], i * (i - 1) // 2
                    if slope:
                        slope(of_sum, each[i], grad_input=of_sum)
                    else:
                        of_sum.copy_(torch.autograd.grad(*graphs[i], of_sum)[0])
                    if i:
                        of_between[i - 1] = (values[:i] * of_sum).sum(1, dtype=exact)
                    for j in range(i):
                        of_sums[j].addcmul_(pairs[first + j], of_sum)
                found = [torch.bmm(part, of_sums).to(exact), of_sums.sum(1, dtype=exact), *of_between, of_output]
                of_own = [total.add_(value) for total, value in zip(of_own, found)] if of_own else found  # noqa: B905
                of_hidden.append(torch.bmm(up, of_sums.transpose(1, 2)))
        of_hidden = (torch.cat(of_hidden, 2) if len(of_hidden) > 1 else of_hidden[0]).view(hidden.shape)
        of_up, of_bias, *of_between, of_output = (value.to(rows.dtype) for value in of_own)
        return None, gradient, of_hidden, of_up, of_bias, torch.cat(of_between) if of_between else None, of_output


def _blocks(hidden, up, bias, between, shape, activation, slope=True):
    """For each block of rows: which ones, their hidden values, the values of the dendrites, stacked, and, unless there
    is a `slope`, for each dendrite its value and sum as autograd has them."""
    (rows, neurons), number, pairs = shape, len(up), between.unbind()
    step = max(1, _BLOCK // (neurons * number)) if hidden.device.type == "cpu" else max(1, rows)
    hidden, bias = hidden.view(number, len(hidden) // number, rows), bias.unsqueeze(1)
    # For single precision on a CPU, tanh(z) as 2 sigmoid(2 z) - 1 takes a fifth of the time; its error is 1e-7.
    by_sigmoid = activation is torch.tanh and hidden.dtype is torch.float32 and hidden.device.type == "cpu"
    scale, minus_one = 2 if by_sigmoid else 1, hidden.new_full((), -1) if by_sigmoid else None
    for start in range(0, max(1, rows), step):  # also of no rows, as an expert has that no token is routed to
        block, graphs = slice(start, start + step), []
        part = hidden[:, :, block]
        values = torch.baddbmm(bias, part.transpose(1, 2), up, beta=scale, alpha=scale)
        each = values.unbind()
        for i, total in enumerate(each):
            first = i * (i - 1) // 2
            for j in range(i):
                total.addcmul_(pairs[first + j], each[j], value=scale)
            if not slope:
                with torch.enable_grad():
                    total = total.clone().requires_grad_()
                    graphs.append((activation(total), total))
                total = graphs[-1][0].detach()
            elif by_sigmoid:
                torch.add(minus_one, total.sigmoid_(), alpha=2, out=total)
                continue
            elif activation in _IN_PLACE:
                _IN_PLACE[activation][0](total)
                continue
            else:
                total = activation(total)
            each[i].copy_(total)
        yield block, part, values, graphs
