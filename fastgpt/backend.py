"""Which implementation of an op runs: the only dispatch point.

    "auto"     the table's choice for this device (tables.py) if it can run, else PyTorch
    "triton"   our kernels; RuntimeError with the reason where they cannot run
    "torch"    PyTorch; no kernel of ours is ever launched

The mode is process-wide. It starts as $FASTGPT_BACKEND, or "auto".
"""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgpt import tables

MODES = ("auto", "triton", "torch")

# Every op's implementations besides "torch" (reference.py). "triton" is always our own kernel;
# "cublas" is PyTorch's GEMM followed by our elementwise kernels; "cudnn" and "flash" are SDPA held
# to one of its own backends, "flash-attn" is the package of that name. "aten" is PyTorch's ops
# under a backward of our own, which is what there is to win on a CPU; "block" is the fused path.
KERNELS: Mapping[str, tuple[str, ...]] = {
    "layer_norm": ("triton",),
    "add_layer_norm": ("triton",),
    "linear_gelu": ("triton", "cublas"),
    "mlp": ("triton", "cublas"),
    "causal_attention": ("triton", "cudnn", "flash", "flash-attn"),
    "packed_causal_attention": ("triton", "cudnn", "flash", "flash-attn"),
    "cross_entropy": ("triton", "aten"),
    "linear_cross_entropy": ("triton", "aten"),
    "block": ("triton", "aten"),
    "adamw": ("triton",),
}

WhyNot = Callable[[str, str, tuple[Tensor, ...], Mapping[str, Any]], str | None]


class Choice(NamedTuple):
    implementation: str
    reason: str


def _checked_mode(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"unknown backend {mode!r} in {source}; use one of {', '.join(MODES)}")
    return mode


_mode = _checked_mode(os.environ.get("FASTGPT_BACKEND", "auto"), "FASTGPT_BACKEND")
_overrides: dict[str, str] = {}
_warned: set[str] = set()


class use_backend:
    """Set the mode, for good as a plain call or for a block as `with use_backend(mode): ...`.

    Keywords choose an op's implementation over the table's, as in `use_backend("auto",
    causal_attention="flash-attn", mlp="triton")`. ValueError names what exists. Activation
    checkpointing runs forwards again in the backward: keep the block around both.
    """

    def __init__(self, mode: str = "auto", **implementations: str):
        global _mode, _overrides
        for op, name in implementations.items():
            if op not in KERNELS:
                raise ValueError(f"unknown op {op!r}; use one of {', '.join(KERNELS)}")
            if name not in (*KERNELS[op], "torch"):
                known = ", ".join((*KERNELS[op], "torch"))
                raise ValueError(f"unknown implementation {name!r} of {op}; use one of {known}")
            if (mode == "triton" and name == "torch") or (mode == "torch" and name != "torch"):
                raise ValueError(f'{op}="{name}" contradicts "{mode}"; use "auto" to mix them')
        self._before = _mode, _overrides
        self._chosen = _checked_mode(mode, "use_backend"), implementations
        _mode, _overrides = self._chosen

    def __enter__(self) -> "use_backend":
        global _mode, _overrides
        _mode, _overrides = self._chosen  # once more, for an object used twice
        return self

    def __exit__(self, *exc: object) -> None:
        global _mode, _overrides
        _mode, _overrides = self._before


def choose(op: str, why_not: WhyNot, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]) -> str:
    """The implementation of `op` that will run on `tensors`.

    `why_not(op, implementation, tensors, facts)` says why that one cannot run, or None if it can.
    """
    choice = explain(op, why_not, tensors, facts)
    if choice.implementation == "torch" and tensors[0].is_cuda and _mode == "auto":
        _warn_once(op, choice)
    return choice.implementation


def kernels_possible(tensor: Tensor) -> bool:
    """Whether any op on such a tensor might run outside PyTorch: cheap, and wrong only upwards."""
    return _mode == "triton" or (_mode == "auto" and tensor.is_cuda)


def casts_once(tensor: Tensor) -> bool:
    """Whether an op with weights should be left to PyTorch for autocast's sake: without gradients,
    as in sampling, it casts a weight once and remembers it. We would cast it for every token.
    """
    if _mode != "auto" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return autocasts(tensor) and torch.is_autocast_cache_enabled()


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor lives. Only these devices are asked about: elsewhere
    every op is PyTorch's own, and torch.compile traces no question that all devices answer.
    """
    device = tensor.device.type
    return device in ("cuda", "cpu") and torch.is_autocast_enabled(device)


def explain(
    op: str, why_not: WhyNot, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]
) -> Choice:
    """What `choose` will do and why. RuntimeError in mode "triton" where no kernel can run."""
    if _mode == "torch":
        return Choice("torch", "the backend is set to torch")
    if _mode == "auto" and torch.compiler.is_compiling() and op not in _overrides:
        return Choice("torch", "torch.compile fuses PyTorch's own ops")
    wanted, why = _wanted(op, tensors[0])
    if wanted == "torch":
        return Choice("torch", why)
    if _mode == "auto" and not tensors[0].is_cuda and wanted != "aten":
        return Choice("torch", _needs_cuda(tensors[0]))
    problem = _tensor_problem(tensors) or why_not(op, wanted, tensors, facts)
    if problem is None:
        return Choice(wanted, why)
    if _mode == "triton":
        raise RuntimeError(f"backend 'triton' cannot run {op}: {problem}")
    return Choice("torch", f"{wanted} cannot run: {problem}")


def _wanted(op: str, tensor: Tensor) -> tuple[str, str]:
    if op in _overrides:
        return _overrides[op], "asked for by use_backend"
    if _mode == "auto" and not tensor.is_cuda:
        aten = tensor.device.type == "cpu" and op in tables.ATEN_ON_CPU
        return ("aten", "PyTorch's ops, our backward") if aten else ("torch", _needs_cuda(tensor))
    name = "cpu"
    if tensor.is_cuda:  # not get_device_name: torch.compile cannot trace that
        name = torch.cuda.get_device_properties(tensor.device).name
    choice, source = tables.implementation(op, name)
    if _mode == "triton" and choice == "torch":
        return "triton", "the backend is set to triton"
    return choice, source


def _needs_cuda(tensor: Tensor) -> str:
    return f"tensors are on {tensor.device.type}, the kernels need CUDA"


def _tensor_problem(tensors: tuple[Tensor, ...]) -> str | None:
    """What no kernel can take, whatever the op. No rows are fine, rows of nothing are not."""
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            return f"{type(t).__name__} is not a plain tensor"
        if t.layout != torch.strided:
            return f"layout {t.layout} is not strided"
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
            return f"dtype {t.dtype} is not float32, float16 or bfloat16"
        if t.device != tensors[0].device:
            return f"tensors are on {tensors[0].device} and {t.device}"
        if t.numel() == 0 and tensors[0].shape[:-1].numel() > 0:
            return f"an operand is empty: {tuple(t.shape)}"
        if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(t):
            return "torch.func transforms need PyTorch's own ops"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation needs PyTorch's own ops"
    return None


def _warn_once(op: str, choice: Choice) -> None:
    _, refused, problem = choice.reason.partition("cannot run: ")
    if refused and problem not in _warned:  # once, whichever ops and implementations it stops
        _warned.add(problem)
        warnings.warn(f"fastgpt: {op} runs in PyTorch: {choice.reason}", stacklevel=4)
