"""Any call of any op: what shapes, strides, dtypes and options there are to choose from.

hypothesis chooses in test_properties.py, a random generator with a seed in equivalence.py.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops, reference
from fastgpt.kernels import mlp
from tests.close import DEVICE, LAYOUTS, randn

SIZES = {  # a letter each, as in the docstrings of ops.py
    "B": range(4),
    "T": range(1, 41),
    "H": range(1, 4),
    "D": range(16, 41),
    "C": range(1, 301),
    "K": range(1, 101),
    "N": range(1, 151),
    "V": range(1, 301),
    # fewer could all be guessed right: a loss near 0 keeps the roundings of the logits it is from
    "R": range(8, 151),
}
LARGE = {  # to cross the edges of several blocks; never empty
    **SIZES,
    "B": range(1, 4),
    "T": range(1, 131),
    "D": range(16, 129),
    "C": range(1, 1025),
    "K": range(1, 513),
    "N": range(1, 513),
    "V": range(1, 5001),
}


class Op(NamedTuple):
    ours: Callable
    ref: Callable
    inputs: str  # their shapes: "3HD" is a product, "C?" may be None, "R<V" are R ids below V
    outputs: str
    options: dict[str, Any]  # keyword -> what there is to choose from, or the letter of a size


def op(name: str, inputs: str, outputs: str, module: Any = ops, **options: Any) -> Op:
    return Op(getattr(module, name), getattr(reference, name), inputs, outputs, options)


ATTENTION = {
    "causal_attention": op("causal_attention", "B H T D, B H T D, B H T D", "B H T D"),
    "packed_causal_attention": op("packed_causal_attention", "B T 3HD", "B T HD", n_head="H"),
}
OPS = {
    "layer_norm": op("layer_norm", "B T C, C, C?", "B T C"),
    "add_layer_norm": op("add_layer_norm", "B T C, B T C, C, C?", "B T C, B T C"),
    **{
        f"{name}, {gemm} GEMM": op(name, inputs, outputs, module, approximate=["none", "tanh"])
        for gemm, module in (("cuBLAS", mlp.cublas), ("Triton", mlp.own))
        for name, inputs, outputs in (
            ("linear_gelu", "B T K, N K, N?", "B T N"),
            ("mlp", "B T K, N K, N?, K N, K?", "B T K"),
        )
    },
    **ATTENTION,
    "cross_entropy": op("cross_entropy", "R V, R<V", ""),
    "linear_cross_entropy": op("linear_cross_entropy", "R K, V K, R<V", ""),
}


def batch_of(op: Op) -> str:
    """The letter of the dimension that counts samples; a weight's shape begins with another."""
    return op.inputs[0]


class Call(NamedTuple):
    ours: Callable
    ref: Callable
    inputs: list[Tensor | None]
    grads: list[Tensor]
    words: str  # shapes, layouts and options, for a reader


def some_call(
    op: Op,
    choose: Callable[[Sequence], Any],
    dtypes: Sequence[torch.dtype],
    sizes: Mapping[str, Sequence[int]] = SIZES,
) -> Call:
    """A call in which `choose` picked one of what there is, over and over, always in one order."""
    torch.manual_seed(choose(range(2**32)))
    dtype = choose(dtypes)
    size = functools.cache(lambda letter: choose(sizes[letter]))
    words = []

    def tensor(name: str, spec: str) -> Tensor | None:
        if "<" in spec:
            R, V = map(size, spec.split("<"))
            words.append(f"{name} ({R},)")
            return some_ids(R, V)
        if "?" in spec and choose([True, False]):
            words.append(f"no {name}")
            return None
        dims = spec.strip("?").split()
        shape = [math.prod(int(c) if c.isdigit() else size(c) for c in dim) for dim in dims]
        # a weight's products are then about N(0, 1): where GELU and softmax bend
        scale = shape[-1] ** -0.5 if dims[-1] in "KN" and spec[0] != batch_of(op) else 1.0
        layout = choose(list(LAYOUTS))
        words.append(f"{name} {tuple(shape)} {layout}")
        return LAYOUTS[layout](randn(*shape, dtype=dtype, scale=scale))

    specs = zip(inspect.signature(op.ref).parameters, op.inputs.split(", "), strict=False)
    inputs = [tensor(name, spec) for name, spec in specs]
    if op.outputs:
        grads = [tensor("incoming gradient", spec) for spec in op.outputs.split(", ")]
    else:  # a loss
        grads = [torch.randn((), device=DEVICE)]
    options = {
        name: size(option) if isinstance(option, str) else choose(option)
        for name, option in op.options.items()
    }
    words += [f"{name} {value}" for name, value in options.items()]
    ours, ref = (functools.partial(f, **options) for f in (op.ours, op.ref))
    return Call(ours, ref, inputs, grads, ", ".join(words))


def some_ids(R: int, V: int) -> Tensor:
    """Targets, some ignored but never all: the mean loss of none is NaN."""
    ids = torch.randint(V, (R,), device=DEVICE)
    ids[1:][torch.rand(R - 1, device=DEVICE) < 0.3] = -1
    return ids
