"""Every op's implementations, and which of them runs: the one table and the one dispatch point.

    "auto"     what was measured to win on this device, else the conservative choice, where it can
               run; else PyTorch
    "triton"   implementations with kernels of ours, GEMMs may be cuBLAS's; RuntimeError with the
               reason where they cannot run
    "torch"    PyTorch; no fastgpt kernel is ever launched

The mode is process-wide. It starts as $FASTGPT_BACKEND, or "auto".
"""

import os
import pkgutil
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.implementations.interception import interception, sdpa_is_restricted
from fastgpt.kernels import _tuned
from fastgpt.kernels._autograd import constant_in_a_graph

MODES = ("auto", "triton", "torch")


class Op(NamedTuple):
    # name -> the module, or module:object, that has a function called like the op, and
    # `unsupported(tensors, **facts)`, which says why it cannot run. "torch" is reference.py.
    implementations: Mapping[str, str]
    unmeasured: str  # the choice on a GPU that nobody measured: GEMMs and attention from PyTorch
    on_cpu: str = "torch"
    public: bool = True  # whether ops.py has a function of its name
    calls_sdpa: bool = False  # PyTorch's, where it is not our kernel: it heeds SDPA's switches


_KERNELS, _OTHERS = "fastgpt.kernels.", "fastgpt.implementations."
_MLP = {"triton": _KERNELS + "mlp:own", "cublas": _KERNELS + "mlp:cublas"}
_ATTENTION = {
    "triton": _KERNELS + "attention",
    "cudnn": _OTHERS + "sdpa:cudnn",
    "flash": _OTHERS + "sdpa:flash",
    "flash-attn": _OTHERS + "flash_attn",
}
_LOSS = {"triton": _KERNELS + "cross_entropy", "aten": _OTHERS + "aten"}

# "triton" is always our own kernel; "cublas" is PyTorch's GEMM followed by our elementwise kernels;
# "cudnn" and "flash" are SDPA held to one of its own backends, "hybrid" is cuDNN's forward with our
# backward; "aten" is PyTorch's ops under a backward of our own, which is where a CPU can be faster;
# "native" is C.
OPS: dict[str, Op] = {
    "layer_norm": Op({"triton": _KERNELS + "layer_norm"}, "triton"),
    "add_layer_norm": Op({"triton": _KERNELS + "layer_norm"}, "triton"),
    "linear_gelu": Op(_MLP, "cublas"),
    "mlp": Op(_MLP, "cublas"),
    "causal_attention": Op(_ATTENTION, "torch", calls_sdpa=True),
    "packed_causal_attention": Op(
        {**_ATTENTION, "hybrid": _OTHERS + "hybrid"}, "torch", calls_sdpa=True
    ),
    "cross_entropy": Op(_LOSS, "triton", on_cpu="aten"),
    "linear_cross_entropy": Op(_LOSS, "triton", on_cpu="aten"),
    # no public functions: a GPT's fused path, and TrainStep's optimizer
    "block": Op(
        {"triton": "fastgpt.fused.launchers:of_kernels", "aten": "fastgpt.fused.launchers:of_aten"},
        "triton",
        on_cpu="aten",
        public=False,
        calls_sdpa=True,
    ),
    # the fused path inside torch.compile; "torch" leaves the modules to it
    "compiled": Op(
        {"triton": "fastgpt.fused.launchers:of_operators"}, "triton", public=False, calls_sdpa=True
    ),
    "adamw": Op({"triton": _KERNELS + "adamw"}, "triton", public=False),
    # a token of sampling, after the first
    "decode": Op(
        {"triton": _KERNELS + "decode", "native": "fastgpt.decoding.step_in_c"},
        "triton",
        on_cpu="native",
        public=False,
    ),
}


_WITHOUT_CUDA = ("aten", "native")


class Choice(NamedTuple):
    implementation: str
    reason: str


def _checked_mode(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"unknown backend {mode!r} in {source}; use one of {', '.join(MODES)}")
    return mode


def _mode_at_start() -> str:
    try:
        return _checked_mode(os.environ.get("FASTGPT_BACKEND", "auto"), "FASTGPT_BACKEND")
    except ValueError as error:
        # raised while fastgpt is imported, before cli.py can turn an error into one line
        if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "fastgpt":
            print(f"fastgpt: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


_mode = _mode_at_start()
_overrides: dict[str, str] = {}
_warned: set[str] = set()
_loaded: dict[str, Any] = {}  # path in OPS -> module or object, or the exception of its import


class use_backend:
    """Set the mode, for good as a plain call or for a block as `with use_backend(mode): ...`.

    Keywords choose an op's implementation over the table's, as in `use_backend("auto",
    packed_causal_attention="flash-attn", mlp="triton")`. ValueError names what exists. Activation
    checkpointing runs forwards again in the backward: keep the block around both.
    """

    def __init__(self, mode: str = "auto", **implementations: str):
        global _mode, _overrides
        for op, name in implementations.items():
            if op not in OPS:
                raise ValueError(f"unknown op {op!r}; use one of {', '.join(OPS)}")
            if name not in (*OPS[op].implementations, "torch"):
                known = ", ".join((*OPS[op].implementations, "torch"))
                raise ValueError(f"unknown implementation {name!r} of {op}; use one of {known}")
            if (mode == "triton" and name == "torch") or (mode == "torch" and name != "torch"):
                raise ValueError(f'{op}="{name}" contradicts "{mode}"; use "auto" to mix them')
        self._before = _mode, _overrides
        self._chosen = _checked_mode(mode, "use_backend"), implementations
        if mode == "triton" or implementations:
            load_all()
        _mode, _overrides = self._chosen

    def __enter__(self) -> "use_backend":
        global _mode, _overrides
        if (_mode, _overrides) != self._chosen:  # another was chosen since
            self._before = _mode, _overrides
            _mode, _overrides = self._chosen
        return self

    def __exit__(self, *exc: object) -> None:
        global _mode, _overrides
        _mode, _overrides = self._before


def choose(op: str, *tensors: Tensor | None, **facts: Any) -> Any:
    """What will run `op` on these tensors: a module or object of OPS, or reference.py.

    `facts` are what else its implementations ask about, such as `width` and `head_dim`.
    """
    operands = tuple(t for t in tensors if t is not None)
    alone = op != "compiled" and op not in _overrides
    if alone and _mode == "auto" and torch.compiler.is_compiling():
        return reference  # one by one our ops are slower than what torch.compile makes of PyTorch's
    choice = explain(op, operands, facts)
    if choice.implementation != "torch":
        return implementation(op, choice.implementation)
    if operands[0].is_cuda and _mode == "auto" and OPS[op].unmeasured != "torch":
        _warn_once(op, choice.reason)
    return reference


def implementation(op: str, name: str) -> Any:
    """The module or object of OPS; what importing it raised is raised again."""
    path = OPS[op].implementations[name]
    if torch.compiler.is_compiling():
        load_all()  # before _loaded is read: a trace sees only its first state
    elif path not in _loaded:
        _loaded[path] = _imported(path)
    if isinstance(_loaded[path], Exception):
        raise _loaded[path]
    return _loaded[path]


def load_for_start() -> None:
    """For the end of fastgpt/__init__.py: what FASTGPT_BACKEND=triton needs."""
    if _mode == "triton":
        load_all()


@constant_in_a_graph
def load_all() -> None:
    """Import every implementation now: torch.compile cannot trace an import by name."""
    for path in {path for op in OPS.values() for path in op.implementations.values()}:
        if path not in _loaded:
            _loaded[path] = _imported(path)


def _imported(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # a broken install raises anything, not only ImportError
        return error


def why_not(
    op: str, name: str, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]
) -> str | None:
    """Why this implementation cannot run on these tensors, or None if it can."""
    try:
        chosen = implementation(op, name)
    except Exception as error:
        return f"importing it failed: {type(error).__name__}: {error}"
    return chosen.unsupported(tensors, **facts)


def asked_for(op: str) -> str | None:
    """The implementation that use_backend names for `op`."""
    return _overrides.get(op)


def is_open(op: str) -> bool:
    """Whether nobody asked for anything: mode "auto", and no implementation of `op`."""
    return _mode == "auto" and op not in _overrides


def kernels_possible(tensor: Tensor) -> bool:
    """Whether any op on such a tensor might run outside PyTorch: cheap; it may
    say yes where none does, never no where one does.
    """
    return _mode == "triton" or (_mode == "auto" and tensor.is_cuda)


def casts_once(tensor: Tensor) -> bool:
    """Whether PyTorch's autocast is to cast an op's weights: without gradients, as in sampling, it
    keeps a cast for the next token. We would repeat it.
    """
    if _mode != "auto" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return autocasts(tensor) and torch.is_autocast_cache_enabled()


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor lives. False on devices other than
    these two, where every op is PyTorch's own: torch.compile traces no question for all devices.
    """
    device = tensor.device.type
    return device in ("cuda", "cpu") and torch.is_autocast_enabled(device)


def explain(op: str, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]) -> Choice:
    """What `choose` will do and why. RuntimeError in mode "triton" where no kernel can run."""
    if _mode == "torch":
        return Choice("torch", "the backend is set to torch")
    wanted, why = _wanted(op, tensors[0])
    if wanted == "torch":
        return Choice("torch", why)
    if _mode == "auto" and not tensors[0].is_cuda and wanted not in _WITHOUT_CUDA:
        return Choice("torch", _needs_cuda(tensors[0]))
    if any(t.numel() == 0 for t in tensors):  # nothing to gain, and kernels divide by sizes
        return Choice("torch", "an operand is empty")
    problem = _tensor_problem(tensors) or _interception(op) or why_not(op, wanted, tensors, facts)
    if problem is None:
        return Choice(wanted, why)
    if _mode == "triton":
        raise RuntimeError(f"backend 'triton' cannot run {op}: {problem}")
    return Choice("torch", f"{wanted} cannot run: {problem}")


def _wanted(op: str, tensor: Tensor) -> tuple[str, str]:
    if op in _overrides:
        return _overrides[op], "asked for by use_backend"
    if _mode == "auto" and not tensor.is_cuda:
        name = OPS[op].on_cpu if tensor.device.type == "cpu" else "torch"
        reasons = {
            "torch": _needs_cuda(tensor),
            "aten": "PyTorch's ops, and C, under fastgpt's backward",
            "native": "loops in C at the rate of memory",
        }
        return name, reasons[name]
    choice, source = OPS[op].unmeasured, "the conservative choice"
    if tensor.is_cuda:
        choice, source = _measured_on(tensor.device, op) or (choice, source)
    if _mode == "triton" and OPS[op].implementations.get(choice, _OTHERS).startswith(_OTHERS):
        return "triton", "the backend is set to triton"
    return choice, source


@constant_in_a_graph  # which cannot trace the reading of a file
def _measured_on(device: torch.device, op: str) -> tuple[str, str] | None:
    return measured(op, torch.cuda.get_device_properties(device).name)


def measured(op: str, device_name: str) -> tuple[str, str] | None:
    """What won on such a device, and when (kernels/_tuned.py)."""
    entry = _tuned.entry(device_name)
    choice = entry.get("implementations", {}).get(op)
    known = choice in (
        *OPS[op].implementations,
        "torch",
    )  # a file of another release may name others
    return (choice, f"measured on {device_name}, {entry['date']}") if known else None


def _needs_cuda(tensor: Tensor) -> str:
    return f"tensors are on {tensor.device.type}, the kernels need CUDA"


def _interception(op: str) -> str | None:
    """Why PyTorch's own ops must run, or None: a script has patched them or is tracing them."""
    if OPS[op].calls_sdpa and sdpa_is_restricted():
        return "SDPA is held to some of its backends"
    return interception()


def _tensor_problem(tensors: tuple[Tensor, ...]) -> str | None:
    """What no kernel can take, whatever the op."""
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            return f"{type(t).__name__} is not a plain tensor"
        if t.layout != torch.strided:
            return f"layout {t.layout} is not strided"
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
            return f"dtype {t.dtype} is not float32, float16 or bfloat16"
        if t.device != tensors[0].device:
            return f"tensors are on {tensors[0].device} and {t.device}"
    return None


@constant_in_a_graph  # a warning would break the graph
def _warn_once(op: str, reason: str) -> None:
    _, refused, problem = reason.partition("cannot run: ")
    if refused and problem not in _warned:  # once, whichever ops and implementations it stops
        _warned.add(problem)
        warnings.warn(f"fastgpt: {op} runs in PyTorch: {reason}", stacklevel=4)
