"""The public ops at one size: fastgpt/examples.py's inputs, and the work nothing avoids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.roofline import Work, attention, gemm
from fastgpt import backend, reference
from fastgpt.examples import Sizes, example, outline


@dataclass(frozen=True)
class Case:
    op: str
    shape: str  # of the first input
    inputs: Callable[[], list[Tensor]]  # floating ones need a gradient
    options: dict[str, Any]
    work: dict[str, Work]  # direction -> what no implementation avoids


def cases(device: torch.device, dtype: torch.dtype, M: int, C: int, V: int) -> Iterator[Case]:
    """Every op on M tokens of width C, heads of 64, T = min(M, 1024)."""
    T, D = min(M, 1024), 64
    sizes = Sizes(M // T, T, C, C // D, V)
    work = _work(M, C, V, M // T, T, C // D, dtype.itemsize)
    for op in (op for op, entry in backend.OPS.items() if entry.public):
        meta = outline(op, sizes, "meta", dtype)
        tensors = [t for t in meta.inputs if t is not None]

        def inputs(op: str = op) -> list[Tensor]:
            return [t for t in example(op, sizes, device, dtype).inputs if t is not None]

        shape = "x".join(map(str, tensors[0].shape))
        least = work.get(op) or _moves_once(op, tensors, meta.options)
        yield Case(op, shape, inputs, meta.options, least)


def _moves_once(op: str, tensors: list[Tensor], options: dict[str, Any]) -> dict[str, Work]:
    """Of an op without arithmetic to speak of: each input read and each output written once;
    backward the inputs, their gradients and those of the outputs.
    """
    out = getattr(reference, op)(*tensors, **options)
    read = sum(t.nbytes for t in tensors)
    written = sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)))
    return {"forward": Work(bytes=read + written), "backward": Work(bytes=2 * read + written)}


def _work(
    M: int, C: int, V: int, B: int, T: int, H: int, itemsize: int
) -> dict[str, dict[str, Work]]:
    """op -> direction -> what no implementation avoids."""
    K, rows, logits = 4 * C, itemsize * M * C, itemsize * M * V

    def moves(forward: int, backward: int) -> dict[str, Work]:
        return {"forward": Work(bytes=forward), "backward": Work(bytes=backward)}

    def linear(n_in: int, n_out: int) -> dict[str, Work]:
        dgrad, wgrad = gemm(M, n_out, n_in, itemsize), gemm(n_out, M, n_in, itemsize)
        return {"forward": gemm(M, n_in, n_out, itemsize), "backward": dgrad + wgrad}

    fc, proj = linear(C, K), linear(K, C)
    forward, backward = attention(B, H, T, C // H, itemsize)
    attended = {"forward": forward, "backward": backward}
    head = {way: Work(flops=work.flops) for way, work in linear(C, V).items()}  # no logits moved
    return {
        "layer_norm": moves(2 * rows, 3 * rows),
        "add_layer_norm": moves(4 * rows, 4 * rows),
        "linear_gelu": fc,
        "mlp": {way: fc[way] + proj[way] for way in fc},
        "causal_attention": attended,
        "packed_causal_attention": attended,
        "cross_entropy": moves(logits, 2 * logits) | {"both": Work(bytes=2 * logits)},  # in place
        "linear_cross_entropy": head | {"both": head["forward"] + head["backward"]},
    }
