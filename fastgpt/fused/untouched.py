"""Whether a module is as its class made it: then its weights may be read and its forward skipped.

The one place that answers this, for training, TrainStep and sampling alike.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastgpt.fused.block import Settings, Weights

# class -> its forward as imported; model.py adds its own. Forks put others under these names.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.GELU, nn.Dropout, nn.Embedding)
}
_KINDS: dict[str, type[nn.Module]] = {}  # model.py's classes by name


def remember(*kinds: type[nn.Module]) -> None:
    """For model.py, whose classes this file cannot import."""
    _FORWARDS.update({kind: kind.forward for kind in kinds})
    _KINDS.update({kind.__name__: kind for kind in kinds})


def untouched(module: Any, kind: type[nn.Module] | str) -> bool:
    """Whether calling `module` would do what class `kind` does on its weights, and nothing else:
    not replaced, patched, hooked, parametrised or sharded.
    """
    kind = _KINDS[kind] if isinstance(kind, str) else kind
    return (
        type(module) is kind
        and kind.forward is _FORWARDS.get(kind)
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        and not (nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)
    )


def plain_lookup(module: Any) -> bool:
    """Whether `module` is an embedding without any of nn.Embedding's options."""
    return (
        untouched(module, nn.Embedding)
        and (module.padding_idx, module.max_norm) == (None, None)
        and not (module.scale_grad_by_freq or module.sparse)
    )


def plain_matmul(module: Any) -> bool:
    """Whether `module` is a linear layer without a bias, as GPT's head is."""
    return untouched(module, nn.Linear) and module.bias is None


def tied_and_plain(model: Any) -> bool:
    """Whether a GPT's embeddings and head are lookups and a matmul, on one weight."""
    wte, wpe, head = model.transformer.wte, model.transformer.wpe, model.lm_head
    return (
        plain_lookup(wte) and plain_lookup(wpe) and plain_matmul(head) and head.weight is wte.weight
    )


def block_weights(block: Any, settings: Settings) -> Weights | None:
    """The parameters of a Block, or None where running it might do something else than block.py
    does with them and `settings`.
    """
    if not (untouched(block, "Block") and untouched(block.attn, "CausalSelfAttention")):
        return None
    attn, mlp = block.attn, block.mlp
    if not (untouched(mlp, "MLP") and untouched(mlp.gelu, nn.GELU)):
        return None
    norms, dropouts = (block.ln_1, block.ln_2), (attn.resid_dropout, mlp.dropout)
    linears = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
    if not (
        all(untouched(m, "LayerNorm") for m in norms)
        and all(untouched(m, nn.Linear) for m in linears)
        and all(untouched(m, nn.Dropout) for m in dropouts)
    ):
        return None
    rates = {m.p if m.training else 0.0 for m in dropouts}
    rates.add(attn.dropout if attn.training else 0.0)
    tanh = mlp.gelu.approximate == "tanh"
    if rates != {settings.dropout_p} or (attn.n_head, tanh) != (settings.n_head, settings.tanh):
        return None
    layers = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
    tensors: list[Any] = [t for layer in layers for t in (layer.weight, layer.bias)]
    return Weights(*tensors)


def decodable(model: Any) -> bool:
    """Whether a loop with a key-value cache may stand in for the forwards of GPT, Block and
    CausalSelfAttention.
    """
    blocks = model.transformer.h
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    draws = any(m.training and m.p > 0 for m in dropouts)  # a mask for every position, each time
    draws = draws or any(block.attn.training and block.attn.dropout > 0 for block in blocks)
    return (
        not draws
        and untouched(model, "GPT")
        and untouched(model.transformer.drop, nn.Dropout)
        and all(untouched(block, "Block") for block in blocks)
        and all(untouched(block.attn, "CausalSelfAttention") for block in blocks)
        and all(untouched(block.attn.resid_dropout, nn.Dropout) for block in blocks)
    )


def plain(t: Tensor) -> bool:
    """Whether t is a tensor like any other: no subclass, not wrapped by torch.func."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return type(t) in (Tensor, nn.Parameter) and not wrapped(t)
