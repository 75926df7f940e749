"""Whether a script has replaced PyTorch's functions, or watches or transforms calls of them.

It may assign `F.gelu`, enter a TorchFunctionMode, trace, or apply torch.func. That works on
PyTorch's functions, called one by one as nanoGPT calls them, and not on a kernel that does the work
of several of them. So PyTorch's functions have to run then.
"""

import os
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from fastgpt.kernels._autograd import constant_in_a_graph

_C = torch._C


def from_pytorch(owner: Any, name: str) -> Any:
    """owner.name if it is PyTorch's own, else an object that equals nothing: then a comparison also
    detects what was assigned before fastgpt was imported.
    """
    function = getattr(owner, name)
    own_names = (name, "_wrapped_call_impl")  # the other is nn.Module.__call__
    code, home = getattr(function, "__code__", None), os.path.dirname(torch.__file__)
    of_torch = isinstance(function, BuiltinFunctionType) or (
        code is not None and code.co_filename.startswith(home + os.sep)
    )
    return function if of_torch and function.__name__ in own_names else object()


# What nanoGPT's forward calls, directly or through torch.nn.
_FUNCTIONS = {
    F: ("cross_entropy", "dropout", "embedding", "gelu", "layer_norm", "linear", "softmax",
        "scaled_dot_product_attention"),
    torch: ("dropout", "embedding", "layer_norm"),
    torch._C._nn: ("cross_entropy_loss",),
}  # fmt: skip
_ORIGINALS = tuple(
    (owner, name, from_pytorch(owner, name))
    for owner, names in _FUNCTIONS.items()
    for name in names
)


def interception() -> str | None:
    """What a script has replaced or entered, as a reason why PyTorch's own ops must run; or None.

    torch.compile traces these comparisons, and so makes them again in every call.
    """
    for owner, name, original in _ORIGINALS:
        if getattr(owner, name) is not original:
            return f"{owner.__name__}.{name} is not PyTorch's own"
    for i in range(_C._len_torch_function_stack()):
        mode = type(_C._get_function_stack_at(i))
        if mode is not DeviceContext:  # torch.set_default_device
            return f"{mode.__name__}, a TorchFunctionMode, is to see PyTorch's own ops"
    # under a dispatch mode torch.compile does not compile
    if not torch.compiler.is_compiling() and _C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is to see PyTorch's own ops"
    return _transformation()


@constant_in_a_graph
def _transformation() -> str | None:
    """The tracing or transform that runs, or None. A function that torch.compile traces is inside
    one as a whole or not at all, so the answer is a constant.
    """
    if _C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch's own ops"
    if _C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms need PyTorch's own ops"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation needs PyTorch's own ops"
    return None


@constant_in_a_graph
def sdpa_is_restricted() -> bool:
    """Whether sdpa_kernel or a flag of torch.backends has turned off one of SDPA's backends."""
    return not (
        _C._get_flash_sdp_enabled()
        and _C._get_math_sdp_enabled()
        and _C._get_mem_efficient_sdp_enabled()
        and _C._get_cudnn_sdp_enabled()
    )
