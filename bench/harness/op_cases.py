"""The ops of a GPT at one size: their inputs, and the work that no implementation avoids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.roofline import Work, attention, gemm


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    inputs: Callable[[], list[Tensor]]  # floating ones need a gradient
    options: dict[str, Any]
    work: dict[str, Work]  # direction -> what nothing avoids


def cases(device: torch.device, dtype: torch.dtype, M: int, C: int, V: int) -> Iterator[Case]:
    """GPT-2's ops on M tokens of width C, heads of 64, T = min(M, 1024)."""
    K, T, D = 4 * C, min(M, 1024), 64
    B, H = M // T, C // D

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def targets() -> Tensor:
        return torch.randint(V, (M,), device=device)

    def norm() -> list[Tensor]:
        return [rand(M, C), rand(C), rand(C)]

    def fc() -> list[Tensor]:
        return [rand(M, C), rand(K, C, scale=C**-0.5), rand(K)]

    def proj() -> list[Tensor]:
        return [rand(C, K, scale=K**-0.5), rand(C)]

    work = _work(M, C, V, B, T, H, dtype.itemsize)

    def case(op: str, shape: str, inputs: Callable[[], list[Tensor]], **options: Any) -> Case:
        return Case(op, shape, inputs, options, work[op])

    yield case("layer_norm", f"{M}x{C}", norm)
    yield case("add_layer_norm", f"{M}x{C}", lambda: [rand(M, C), *norm()])
    yield case("linear_gelu", f"{M}x{C}x{K}", fc)
    yield case("mlp", f"{M}x{C}x{K}", lambda: fc() + proj())
    heads = f"{B}x{H}x{T}x{D}"
    yield case("causal_attention", heads, lambda: [rand(B, H, T, D) for _ in range(3)])
    packed = f"{B}x{T}x3x{H}x{D}"
    yield case("packed_causal_attention", packed, lambda: [rand(B, T, 3 * C)], n_head=H)
    yield case("cross_entropy", f"{M}x{V}", lambda: [rand(M, V), targets()])
    head = f"{M}x{C}x{V}"
    yield case(
        "linear_cross_entropy", head, lambda: [rand(M, C), rand(V, C, scale=C**-0.5), targets()]
    )


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
