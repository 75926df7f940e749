"""What torch.compile has to see change in a model whose modules it does not call, as it reads them
(untouched.py), and PyTorch 2.6 does not see by itself. Importing this file imports the compiler, so
it is imported where something is traced.
"""

from typing import Any

from torch import nn
from torch._dynamo.comptime import comptime
from torch._dynamo.variables import nn_module


def guard_forward(module: Any) -> None:
    """That a `forward` is assigned on this module, as where it is called."""
    comptime(_guard_forward)


def _guard_forward(trace: Any) -> None:
    found = trace.get_local("module")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    guard = getattr(nn_module, "guard_to_detect_forward_monkeypatching", None)
    if guard is not None and isinstance(getattr(found, "value", None), nn.Module):
        guard(found.source, found.value)


def guard_tied_weights(*modules: Any) -> None:
    """That one of these modules gets a weight of its own. PyTorch 2.6 looks again only into the one
    that has changed, and finds nothing there to compare the new weight with, unless it has to check
    the order of names in each.
    """
    for module in modules:
        if isinstance(module, nn.Module):
            tuple(module._parameters)
