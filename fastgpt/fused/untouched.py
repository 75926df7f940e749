"""Whether a GPT is as it was built: then its weights may be read and its modules' forwards skipped.

The only file that answers this, for training, TrainStep and sampling. A fork may change a module
(its class, hooks, attributes, weights), a class, or PyTorch's functions (interception.py). All are
checked again in every forward, because a script may change them between two forwards.
"""

from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import GELU, Dropout, Embedding, Linear, ModuleList, Sequential  # as of import
from torch.nn.modules import module as nn_module

from fastgpt.fused.block import Settings, Weights
from fastgpt.implementations.interception import from_pytorch, interception

# The methods behind a call of a module, and behind reading its attributes.
_METHODS = ("forward", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
# of all modules; PyTorch 2.6 lacks _has_any_global_hook, which would answer for all four
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_KINDS: dict[str, type[nn.Module]] = {}  # model.py's classes by name
_ORIGINALS: list[tuple[type[nn.Module], str, Any]] = []  # class, name of a method, that method
_FORWARDS: dict[type[nn.Module], Any] = {}


def _remember(kind: type[nn.Module], methods: dict[str, Any]) -> None:
    _ORIGINALS.extend((kind, name, method) for name, method in methods.items())
    _FORWARDS[kind] = methods["forward"]


def remember(*kinds: type[nn.Module]) -> None:
    """Called by model.py with its classes, which this file cannot import."""
    for kind in kinds:
        inherited = {name: from_pytorch(kind, name) for name in _METHODS}
        _remember(kind, inherited | {"forward": kind.forward})
        _KINDS[kind.__name__] = kind


for _kind in (Linear, GELU, Dropout, Embedding):
    _remember(_kind, {name: from_pytorch(_kind, name) for name in _METHODS})


def calls_untouched() -> bool:
    """Whether the classes' methods are those of import time, and no hook is set for all modules."""
    return all(getattr(kind, name) is method for kind, name, method in _ORIGINALS) and not any(
        getattr(nn_module, hooks) for hooks in _GLOBAL_HOOKS
    )


def untouched(module: Any, kind: type[nn.Module] | str) -> bool:
    """Whether calling `module` does what class `kind` does and nothing else: it is not replaced,
    patched, hooked, compiled, parametrised or sharded. `calls_untouched`, which does not depend on
    the module, has to hold too.
    """
    kind = _KINDS[kind] if isinstance(kind, str) else kind
    return type(module) is kind and kind.forward is _FORWARDS[kind] and _own_call(module)


def _own_call(module: Any) -> bool:
    """Whether nothing in the module itself changes what calling it does."""
    own = module.__dict__
    return (
        _own_forward(module)
        and "_call_impl" not in own
        and "_wrapped_call_impl" not in own
        and own.get("_compiled_call_impl") is None
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def _own_forward(module: Any) -> bool:
    if torch.compiler.is_compiling():
        from fastgpt.fused.guards import guard_forward

        guard_forward(module)
        if not callable(module.forward):
            return False  # read it, so that torch.compile guards it: it guards no absence
    return "forward" not in module.__dict__


def plain_lookup(module: Any) -> bool:
    """Whether `module` is an embedding without any of nn.Embedding's options."""
    return (
        untouched(module, Embedding)
        and (module.padding_idx, module.max_norm) == (None, None)
        and not (module.scale_grad_by_freq or module.sparse)
    )


def plain_matmul(module: Any) -> bool:
    """Whether `module` is a linear layer without a bias, as GPT's head is."""
    return untouched(module, Linear) and calls_untouched() and module.bias is None


def plain(t: Tensor) -> bool:
    """Whether t is no subclass of Tensor, not sparse and not wrapped by torch.func. torch.compile
    cannot ask the latter of a tensor; interception.py asks whether a transform runs.
    """
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return torch.compiler.is_compiling() or not wrapped(t)


def alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these are plain tensors of one dtype on one device."""
    dtype, device = x.dtype, x.device
    return plain(x) and all(
        plain(t) and t.dtype == dtype and t.device == device for t in others if t is not None
    )


def embeddings_as_built(model: Any, like: Tensor, T: int) -> bool:
    """Whether a GPT's embeddings are plain lookups: wte's weight is `like`, the head's, and wpe's
    has the same width, dtype and device, and at least T rows.
    """
    wte, wpe, head = model.transformer.wte, model.transformer.wpe, model.lm_head
    if not (plain_lookup(wte) and plain_lookup(wpe) and plain_matmul(head)):
        return False
    positions = wpe.weight
    return (
        head.weight is wte.weight is like
        and alike(like, positions)
        and (positions.dim(), positions.shape[-1]) == (2, like.shape[1])
        and positions.shape[0] >= T
    )


class BlockParts(NamedTuple):
    """Modules of a Block, looked up once: a look-up takes longer than what is asked of it."""

    attn: Any
    layers: tuple[Any, ...]  # those with weights, in the order of Weights
    gelu: Any
    dropouts: tuple[Any, ...]


def block_weights(block: Any, settings: Settings, C: int) -> Weights | None:
    """The parameters of a Block of width C; None if running the Block could give another result
    than block.py does with them and `settings`.
    """
    parts = block_as_built(block)
    if parts is None:
        return None
    attn, layers, gelu, dropouts = parts
    rates = {m.p if m.training else 0.0 for m in dropouts}
    rates.add(attn.dropout if attn.training else 0.0)
    tanh = gelu.approximate == "tanh"
    if rates != {settings.dropout_p} or (attn.n_head, tanh) != (settings.n_head, settings.tanh):
        return None
    tensors: list[Any] = [t for layer in layers for t in (layer.weight, layer.bias)]
    weights = Weights(*tensors)
    return weights if attn.n_embd == C and _fit(weights, C) else None


def block_as_built(block: Any) -> BlockParts | None:
    """The modules of a Block, if they are those of model.py, and only they run in it."""
    if not untouched(block, "Block"):
        return None
    attn, mlp = block.attn, block.mlp
    if not (untouched(attn, "CausalSelfAttention") and attn.flash and untouched(mlp, "MLP")):
        return None
    ln_1, c_attn, attn_proj = block.ln_1, attn.c_attn, attn.c_proj
    ln_2, c_fc, mlp_proj = block.ln_2, mlp.c_fc, mlp.c_proj
    gelu, dropouts = mlp.gelu, (attn.resid_dropout, mlp.dropout)
    as_built = (
        all(untouched(m, "LayerNorm") for m in (ln_1, ln_2))
        and all(untouched(m, Linear) for m in (c_attn, attn_proj, c_fc, mlp_proj))
        and untouched(gelu, GELU)
        and all(untouched(m, Dropout) and not m.inplace for m in dropouts)
    )
    layers = ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj
    return BlockParts(attn, layers, gelu, dropouts) if as_built else None


def flat(vector: Tensor | None) -> bool:
    """Whether a norm's weight or a bias lies in memory as kernels and C take it for granted."""
    return vector is None or vector.is_contiguous()


def _fit(weights: Weights, C: int) -> bool:
    """Whether the shapes are a block's of width C, with any width inside the MLP, and the vectors
    are flat.
    """
    hidden = weights.fc.shape[0] if weights.fc is not None else 0
    outputs = (C, 3 * C, C, C, hidden, C)  # of ln_1, qkv, attn_proj, ln_2, fc, mlp_proj
    inputs = (None, C, C, None, C, hidden)
    tensors = list(weights)  # PyTorch 2.6's Dynamo takes no slices of a NamedTuple
    pairs = zip(tensors[::2], tensors[1::2], outputs, inputs, strict=True)
    return all(
        weight is not None
        and weight.shape == ((n,) if k is None else (n, k))
        and (k is not None or flat(weight))
        and (bias is None or bias.shape == (n,))
        and flat(bias)
        for weight, bias, n, k in pairs
    )


def decodable(model: Any) -> bool:
    """Whether decoding with a key-value cache gives what a GPT's forward would: the model is as it
    was built, without dropout, and no hook or patch has to see the modules' calls.
    """
    if not (calls_untouched() and interception() is None and untouched(model, "GPT")):
        return False
    parts = model.transformer
    return (
        type(parts.h) in (ModuleList, Sequential)  # a fork's own may give other blocks each time
        and all(plain_lookup(m) for m in (parts.wte, parts.wpe))
        and untouched(parts.drop, Dropout)
        and untouched(parts.ln_f, "LayerNorm")
        and untouched(model.lm_head, Linear)
        and all(block_as_built(block) is not None for block in parts.h)
        and not any(rate > 0 for rate in _dropout_rates(parts))  # a mask for every position anew
    )


class Snapshot:
    """The objects that a model is made of. While they are the same, so is what `decodable` and
    `block_weights` said of it, and asking takes a fraction of their time.
    """

    def __init__(self, model: Any):
        modules = list(model.modules())
        owners = [vars(m) for m in modules]
        inner = [d for owner in owners for d in owner.values() if isinstance(d, dict)]
        parameters = [p for m in modules for p in m._parameters.values()]
        self.objects = [*modules, *parameters]
        self.kinds = [type(o) for o in self.objects]
        self.empty = [d for d in inner if not d]  # of hooks, mostly
        filled = [*owners, getattr(model.config, "__dict__", {}), *(d for d in inner if d)]
        self.values = [(d, list(d.values())) for d in filled]

    def holds(self) -> bool:
        """Whether nothing was replaced, added or removed; writes into tensors are not seen."""
        return calls_untouched() and interception() is None and self.unchanged()

    def unchanged(self) -> bool:
        """The same of the model alone."""
        return (
            not any(self.empty)
            and list(map(type, self.objects)) == self.kinds
            and all(len(d) == len(v) and all(map(is_, d.values(), v)) for d, v in self.values)
        )


def _dropout_rates(parts: Any) -> Iterator[float]:
    """The dropout rates in use."""
    for block in parts.h:
        yield block.attn.dropout if block.attn.training else 0.0
    for m in (parts.drop, *(d for b in parts.h for d in (b.attn.resid_dropout, b.mlp.dropout))):
        yield m.p if m.training else 0.0
