"""The ops of a GPT, both ways, against eager PyTorch, compiled PyTorch and SDPA's backends.

A case names an op and its inputs; `measure` checks each variant's results against eager in float32,
refuses a wrong one, and times the rest in turns. `python -m bench.gpu` runs all cases.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import Variants, in_turns
from fastgpt import ops, reference, use_backend

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    inputs: Callable[[], list[Tensor]]  # floating ones need a gradient
    options: dict[str, Any]
    bytes: tuple[float, float] = (0, 0)  # forward, backward: traffic that nothing avoids
    flops: tuple[float, float] = (0, 0)


def cases(device: torch.device, dtype: torch.dtype, M: int, C: int, V: int) -> Iterator[Case]:
    """GPT-2's ops on M tokens of width C, heads of 64, T = min(M, 1024)."""
    size, K = dtype.itemsize, 4 * C
    T, D = min(M, 1024), 64
    B, H = M // T, C // D

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def norm_inputs(n: int) -> list[Tensor]:
        return [rand(M, C) for _ in range(n)] + [rand(C), rand(C)]

    rows = M * C * size
    yield Case("layer_norm", f"{M}x{C}", lambda: norm_inputs(1), {}, (2 * rows, 3 * rows))
    yield Case("add_layer_norm", f"{M}x{C}", lambda: norm_inputs(2), {}, (4 * rows, 4 * rows))
    fc = [lambda: rand(K, C, scale=C**-0.5), lambda: rand(K)]
    proj = [lambda: rand(C, K, scale=K**-0.5), lambda: rand(C)]
    gemm = 2.0 * M * C * K
    yield Case("linear_gelu", f"{M}x{C}x{K}", lambda: [rand(M, C), *(f() for f in fc)], {},
               flops=(gemm, 2 * gemm))  # fmt: skip
    yield Case("mlp", f"{M}x{C}x{K}", lambda: [rand(M, C), *(f() for f in fc + proj)], {},
               flops=(2 * gemm, 4 * gemm))  # fmt: skip
    attention = 2.0 * B * H * T * T * D  # causal: half of two products
    yield Case("packed_causal_attention", f"{B}x{T}x3x{H}x{D}", lambda: [rand(B, T, 3 * C)],
               {"n_head": H}, flops=(attention, 2.5 * attention))  # fmt: skip
    logits = M * V * size
    yield Case("cross_entropy", f"{M}x{V}",
               lambda: [rand(M, V), torch.randint(V, (M,), device=device)], {},
               (logits, 2 * logits))  # fmt: skip


def variants(op: str, device: torch.device) -> dict[str, tuple[Callable, Any]]:
    """name -> (function, context to run its forward in)."""
    ref, ours = getattr(reference, op), getattr(ops, op)
    found: dict[str, tuple[Callable, Any]] = {
        "eager": (ref, nullcontext),
        "fastgpt": (ours, functools.partial(use_backend, "triton")),
    }
    if op in ("linear_gelu", "mlp"):
        found["fastgpt, own GEMM"] = (
            ours,
            functools.partial(use_backend, "triton", **{op: "triton"}),
        )
    if device.type == "cuda":
        found["compile"] = (torch.compile(ref, dynamic=False), nullcontext)
        if "attention" in op:
            found |= {name: (ref, functools.partial(sdpa_kernel, b)) for name, b in SDPA.items()}
    return found


def measure(case: Case, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row per variant and direction; one that fails or computes something else says so."""
    torch.manual_seed(0)
    leaves = [t.requires_grad_(t.is_floating_point()) for t in case.inputs()]
    wanted = [t for t in leaves if t.requires_grad]
    wide = [_wide(t) for t in leaves]
    exact = _run(getattr(reference, case.op), nullcontext, wide, case.options)
    grads = [torch.randn_like(t) for t in exact]
    truth = [*exact, *torch.autograd.grad(exact, [t for t in wide if t.requires_grad], grads)]
    rows: list[dict[str, Any]] = []
    forward: Variants = {}
    backward: Variants = {}
    for name, (function, context) in variants(case.op, device).items():
        try:
            outs = _run(function, context, leaves, case.options)
            given = [g.to(out.dtype) for g, out in zip(grads, outs, strict=True)]
            found = [*outs, *torch.autograd.grad(outs, wanted, given, retain_graph=True)]
            error = max(_distance(a, b) for a, b in zip(found, truth, strict=True))
            if not error < 0.03:
                raise ArithmeticError(f"relative error {error:.2g} against eager in float32")
        except Exception as problem:
            text = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"
            rows.append({"op": case.op, "shape": case.shape, "variant": name, "problem": text})
            continue
        forward[name] = functools.partial(_forward_only, function, context, leaves, case.options)
        backward[name] = functools.partial(
            torch.autograd.grad, outs, wanted, given, retain_graph=True
        )
    for i, (direction, calls) in enumerate((("forward", forward), ("backward", backward))):
        times = in_turns(calls, device, seconds / 2)
        eager = statistics.median(times["eager"])
        for name, samples in times.items():
            median = statistics.median(samples)
            rows.append({
                "op": case.op, "shape": case.shape, "direction": direction, "variant": name,
                "microseconds": 1e6 * median, "over_eager": eager / median,
                "gigabytes_per_second": case.bytes[i] / median / 1e9,
                "teraflops_per_second": case.flops[i] / median / 1e12,
                "samples": len(samples),
            })  # fmt: skip
    return rows


def _wide(t: Tensor) -> Tensor:
    """A float32 leaf with t's values; float64 would take minutes at these sizes."""
    return t.detach().float().requires_grad_() if t.is_floating_point() else t


def _run(function: Callable, context: Any, inputs: list[Tensor], options: dict) -> list[Tensor]:
    with context():
        out = function(*inputs, **options)
    return list(out) if isinstance(out, tuple) else [out]


def _forward_only(function: Callable, context: Any, inputs: list[Tensor], options: dict) -> None:
    with torch.no_grad():
        _run(function, context, inputs, options)


def _distance(ours: Tensor, truth: Tensor) -> float:
    """|ours - truth| / |truth|; NaN stays NaN."""
    return ((ours.float() - truth).norm() / truth.norm()).item()
