"""Whether a module is as its class made it: a fused path may read its weights and skip it."""

from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

# class -> its forward as imported; model.py adds its own. Forks put others under these names.
FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.GELU, nn.Dropout, nn.Embedding)
}


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` would do what class `kind` does on its weights, and nothing else:
    not replaced, patched, hooked, parametrised or sharded.
    """
    return (
        type(module) is kind
        and kind.forward is FORWARDS.get(kind)
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        and not (nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)
    )


def plain_lookup(module: nn.Module) -> bool:
    """Whether `module` is an embedding without any of nn.Embedding's options."""
    return (
        untouched(module, nn.Embedding)
        and (module.padding_idx, module.max_norm) == (None, None)
        and not (module.scale_grad_by_freq or module.sparse)
    )
