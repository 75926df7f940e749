"""Who else computes an op: eager and compiled PyTorch, SDPA's backends, flash-attn, Liger.

Every peer is called like the op's definition in fastgpt/reference.py. One that is not installed, or
cannot run here, raises with the reason when it is called, which becomes its row.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import backend, ops, reference, use_backend
from fastgpt.implementations import flash_attn, sdpa


class Peer(NamedTuple):
    call: Callable[..., Any]
    # its forward computes the gradients too, perhaps over its inputs: the two are timed as one
    whole: bool = False


def peers(op: str) -> dict[str, Peer]:
    """name -> Peer, eager first."""
    eager, fused = getattr(reference, op), getattr(ops, op)
    everywhere = {
        "eager": Peer(eager),
        "compile": Peer(_compiled(eager)),
        "fastgpt": Peer(functools.partial(_fused, fused, {})),
    }
    return everywhere | OF_ONE_OP.get(op, {})


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call: torch.compile imports for seconds before it compiles."""
    function: Callable[..., Any] | None = None

    def call(*inputs: Any, **options: Any) -> Any:
        nonlocal function
        function = function or torch.compile(eager, dynamic=False)
        return function(*inputs, **options)

    return call


def _fused(function: Callable, choice: dict[str, str], *inputs: Any, **options: Any) -> Any:
    """With fastgpt's kernels, or on a CPU with another implementation of fastgpt's where the op has
    one. RuntimeError says why where neither runs.
    """
    on_cpu = inputs[0].device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    mode = "auto" if on_cpu and backend.OPS[function.__name__].on_cpu != "torch" else "triton"
    with use_backend(mode, **choice):
        return function(*inputs, **options)


def _attention(module: Any, op: str, *inputs: Tensor, **options: Any) -> Tensor:
    head_dim = inputs[0].shape[-1] // (3 * options["n_head"] if "n_head" in options else 1)
    problem = module.unsupported(inputs, head_dim=head_dim, dropout_p=0.0)
    if problem is not None:
        raise RuntimeError(problem)
    return getattr(module, op)(*inputs, **options)


def _liger(name: str) -> Callable[..., Any]:
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        raise RuntimeError(f"no Liger: pip install liger-kernel ({error})") from None
    return getattr(functional, name)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _liger("liger_layer_norm")(x, weight, bias, 1e-5)


def _liger_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return _liger("liger_cross_entropy")(logits, targets, ignore_index=-1)


def _liger_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    fused = _liger("liger_fused_linear_cross_entropy")
    return fused(x, weight, targets, ignore_index=-1)


def _torch_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunked: bool = False
) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has none; it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(x, weight, targets, ignore_index=-1, options=options)


def _own_gemm(op: str) -> dict[str, Peer]:
    """Beside "fastgpt", which is cuBLAS with fastgpt's kernels around it."""
    return {"fastgpt, own GEMM": _ours(op, "triton")}


def _ours(op: str, implementation: str) -> Peer:
    return Peer(functools.partial(_fused, getattr(ops, op), {op: implementation}))


def _attentions(op: str) -> dict[str, Peer]:
    modules = {"SDPA cuDNN": sdpa.cudnn, "SDPA flash": sdpa.flash, "flash-attn": flash_attn}
    peers = {name: Peer(functools.partial(_attention, m, op)) for name, m in modules.items()}
    if "hybrid" in backend.OPS[op].implementations:
        peers["cuDNN, fastgpt's backward"] = _ours(op, "hybrid")
    return peers


OF_ONE_OP: dict[str, dict[str, Peer]] = {
    "linear_gelu": _own_gemm("linear_gelu"),
    "mlp": _own_gemm("mlp"),
    "causal_attention": _attentions("causal_attention"),
    "packed_causal_attention": _attentions("packed_causal_attention"),
    "layer_norm": {"Liger": Peer(_liger_layer_norm)},
    "cross_entropy": {"Liger": Peer(_liger_cross_entropy, whole=True)},
    "linear_cross_entropy": {
        "F.linear_cross_entropy": Peer(_torch_linear_cross_entropy),
        "F.linear_cross_entropy, chunked": Peer(
            functools.partial(_torch_linear_cross_entropy, chunked=True), whole=True
        ),
        "Liger": Peer(_liger_linear_cross_entropy, whole=True),
    },
}
