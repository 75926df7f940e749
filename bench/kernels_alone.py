"""What the fused path calls and no public op shows alone, beside what it replaces.

    fc + GELU               h = x @ w.T + b, gelu(h)
    proj dgrad + dGELU      dh = (dy @ w) * gelu'(h), gelu(h), and the bias gradient
    fc weight gradient      dw = dy.T @ x in fp32, of operands in the matmuls' dtype
    AdamW, clip and copy    of a whole model: the norm of its gradients, the update, its bf16 copies

    python -m bench.kernels_alone --op fc dgrad wgrad adamw

A variant that computes something else than eager is refused a time. A line of JSON each.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import optim, use_backend
from fastgpt.commands.launch_search import distance
from fastgpt.commands.timing import Variants, in_turns
from fastgpt.implementations import aten

Row = dict[str, Any]
ALL = ("fc", "dgrad", "wgrad", "adamw")
RISKY = ("specialized",)  # fc with specialised warps, which may hang: tests/gpu/test_specialized.py
BETAS, LR = (0.9, 0.95), 0.1  # large: a wrong step shows


def measure(
    device: torch.device, dtype: torch.dtype, M: int, C: int, n_params: int, seconds: float,
    ops: Sequence[str] = ALL,
) -> list[Row]:  # fmt: skip
    """A row per variant, for M tokens of width C and an optimizer of n_params; seconds each.

    `part_of` in a row is the op of backend.OPS that the call is part of.
    """
    makers = {
        "fc": ("fc + GELU", "linear_gelu", lambda: _fc(device, dtype, M, C)),
        "dgrad": ("proj dgrad + dGELU", "mlp", lambda: _dgrad(device, dtype, M, C)),
        "wgrad": ("fc weight gradient", "mlp", lambda: _wgrad(device, dtype, M, C)),
        "specialized": ("fc + GELU", "linear_gelu", lambda: _specialized(device, dtype, M, C)),
        "adamw": ("AdamW, clip and copy", "adamw", lambda: _adamw(device, dtype, C, n_params)),
    }
    rows = []
    for name, part_of, variants in [makers[op] for op in ops]:
        rows += [row | {"part_of": part_of} for row in _compare(name, variants(), device, seconds)]
    return rows


def _compare(name: str, variants: Variants, device: torch.device, seconds: float) -> list[Row]:
    rows: list[Row] = []
    expected, correct = _copied(variants["eager"]()), {"eager": variants["eager"]}
    for variant in variants.keys() - {"eager"}:
        try:
            if not (error := distance(variants[variant](), expected)) < 0.02:
                raise ArithmeticError(f"{error:.2g} away from eager's result")
            correct[variant] = variants[variant]
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            rows.append({"op": name, "variant": variant, "problem": text[:200]})
    times = in_turns(correct, device, seconds)
    for variant, samples in times.items():
        pairs = zip(times["eager"], samples, strict=True)
        rows.append({
            "op": name, "variant": variant, "microseconds": 1e6 * statistics.median(samples),
            "over_eager": statistics.median(e / s for e, s in pairs),
        })  # fmt: skip
    return rows


def _copied(result: Any) -> Any:
    return result.clone() if isinstance(result, Tensor) else tuple(t.clone() for t in result)


def _fc(device: torch.device, dtype: torch.dtype, M: int, C: int) -> Variants:
    from fastgpt.kernels import gemm_gelu, mlp

    x, w, b = (torch.randn(s, device=device).to(dtype) for s in ((M, C), (4 * C, C), (4 * C,)))
    w *= C**-0.5

    def eager() -> tuple[Tensor, Tensor]:
        h = F.linear(x, w, b)
        return h, F.gelu(h)

    return {
        "eager": eager,
        "cuBLAS and a pass": functools.partial(mlp.cublas.forward, x, w, b, False),
        "own GEMM": functools.partial(gemm_gelu.forward, x, w, b, False),
    }


def _specialized(device: torch.device, dtype: torch.dtype, M: int, C: int) -> Variants:
    from fastgpt.kernels import _tuned, gemm_tma

    variants = _fc(device, dtype, M, C)
    own = variants["own GEMM"]

    def specialized() -> object:
        with _tuned.trying("gemm_tma_fc", gemm_tma.SPECIALIZED):
            return own()

    return {"eager": variants["eager"], "own GEMM": own, "specialized": specialized}


def _dgrad(device: torch.device, dtype: torch.dtype, M: int, C: int) -> Variants:
    from fastgpt.kernels import gemm_gelu, mlp

    shapes = (M, C), (C, 4 * C), (M, 4 * C)
    dy, w, h = (torch.randn(shape, device=device).to(dtype) for shape in shapes)

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        dh = torch.ops.aten.gelu_backward(dy @ w, h)
        return dh, F.gelu(h), dh.sum(0)

    return {
        "eager": eager,
        "cuBLAS and a pass": functools.partial(mlp.cublas.dgrad, dy, w, h, False, True, True),
        "own GEMM": functools.partial(gemm_gelu.dgrad, dy, w, h, False, True, True),
    }


def _wgrad(device: torch.device, dtype: torch.dtype, M: int, C: int) -> Variants:
    """eager is what autocast makes of it: a product in `dtype`, then a cast."""
    dy, x = (torch.randn(M, N, device=device).to(dtype) for N in (4 * C, C))
    return {
        "eager": lambda: (dy.t() @ x).float(),
        "fp32 out": functools.partial(aten.wgrad, dy, x, torch.float32),
    }


def _adamw(device: torch.device, dtype: torch.dtype, C: int, n_params: int) -> Variants:
    """Each variant has a model of its own, of matrices (4C, C); all get the same gradients."""
    count = max(1, n_params // (4 * C * C))
    grads = [torch.randn(4 * C, C, device=device) for _ in range(count)]

    def model() -> tuple[list[Any], dict[Any, Tensor]]:
        params = [torch.ones_like(g, requires_grad=True) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return params, {p: torch.empty_like(p, dtype=dtype) for p in params}

    def eager_step() -> Callable[[], Tensor]:
        params, copies = model()
        plain = torch.optim.AdamW(params, lr=LR, betas=BETAS, fused=True)

        def step() -> Tensor:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            plain.step()
            with torch.no_grad():
                torch._foreach_copy_(list(copies.values()), params)
            return next(iter(copies.values()))

        return step

    def own_step() -> Callable[[], Tensor]:
        params, copies = model()
        own = optim.AdamW([{"params": params, "weight_decay": 0.01}], LR, BETAS, 1.0, copies)

        def step() -> Tensor:
            with use_backend("triton"):
                own.step()
            return next(iter(copies.values()))

        return step

    return {"eager": eager_step(), "fastgpt": own_step()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels_alone", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=ALL + RISKY, default=ALL)
    parser.add_argument("--tokens", type=int, default=16384, help="M (%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="C (%(default)s)")
    parser.add_argument("--parameters", type=int, default=124_000_000, help="of AdamW")
    parser.add_argument("--seconds", type=float, default=6, help="of measuring (%(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = args.tokens, args.width, args.parameters
    for op in args.op:
        for row in measure(device, dtype, *sizes, args.seconds / len(args.op), [op]):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
