"""The ops of a GPT at one size: their inputs, and the work that no implementation avoids."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.roofline import Work, attention, gemm
from fastgpt import backend, examples, ops


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    inputs: Callable[[], list[Tensor]]  # floating ones need a gradient
    options: dict[str, Any]
    work: dict[str, Work]  # direction -> what no implementation avoids; 0 where nobody counted


def cases(device: torch.device, dtype: torch.dtype, M: int, C: int, V: int) -> Iterator[Case]:
    """GPT-2's ops (fastgpt/examples.py) on M tokens of width C, heads of 64, T = min(M, 1024)."""
    K, T, D = 4 * C, min(M, 1024), 64
    B, H = M // T, C // D
    sizes = examples.Sizes(B, T, C, H, V)
    work = _work(M, C, V, B, T, H, dtype.itemsize)
    shapes = {
        "layer_norm": f"{M}x{C}",
        "add_layer_norm": f"{M}x{C}",
        "linear_gelu": f"{M}x{C}x{K}",
        "mlp": f"{M}x{C}x{K}",
        "causal_attention": f"{B}x{H}x{T}x{D}",
        "packed_causal_attention": f"{B}x{T}x3x{H}x{D}",
        "cross_entropy": f"{M}x{V}",
        "linear_cross_entropy": f"{M}x{C}x{V}",
    }

    def inputs(op: str) -> list[Tensor]:
        return [t for t in examples.example(op, sizes, device, dtype).inputs if t is not None]

    for op in (op for op in backend.OPS if hasattr(ops, op)):
        outline = examples.outline(op, sizes, device, dtype)
        shape = shapes.get(op, f"{M}x{C}")
        counted = work.get(op, {"forward": Work(), "backward": Work()})
        yield Case(op, shape, functools.partial(inputs, op), outline.options, counted)


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
