"""Weights in and out: names that wrappers prefix, and Hugging Face's layout of the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}

_WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DDP put into names
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (
    ".attn.bias",
    ".attn.masked_bias",
)  # causal masks, buffers in some versions, never weights


def accept_wrapped_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """A load_state_dict pre-hook: names match whatever torch.compile or DDP wrapped, then or now.

    A name that is the module's own as it is, or behind wrappers of the whole, stays: a fork's own
    wrapper may call what it wraps `module`, and have a weight of its own beside. The dict is
    load_state_dict's own shallow copy; the caller's stays as it is.
    """
    pairs = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    own = {name for name, _ in pairs}
    given = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    found = {name: _inside(name[len(prefix) :], own) for name in given}
    free = {_bare(name): name for name in own.difference(found.values())}
    for name, value in given.items():
        bare = _bare(name[len(prefix) :])
        target = found[name] or free.get(bare)
        if target or not name.endswith(_MASKS):
            state_dict[prefix + (target or bare)] = value


def _inside(name: str, own: set[str]) -> str | None:
    """The name without the wrappers that it begins with, where it is one of `own`."""
    while name not in own:
        wrapper, _, name = name.partition(".")
        if wrapper not in _WRAPPERS:
            return None
    return name


def bare_name(name: str) -> str | None:
    """A weight's name without wrappers'; None for a causal mask, which is no weight."""
    return None if name.endswith(_MASKS) else _bare(name)


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def from_hugging_face(
    model_class: Any, config_class: Any, model_type: str, override_args: dict[str, Any]
) -> Any:
    """A `model_class` with the weights that transformers has under `model_type`."""
    if model_type not in SIZES:
        raise ValueError(f"unknown model_type={model_type!r}; use one of {', '.join(SIZES)}")
    allowed = {"dropout", "gelu", "return_logits", "checkpoint_blocks"}
    if not set(override_args) <= allowed:
        wrong = ", ".join(sorted(set(override_args) - allowed))
        raise ValueError(f"cannot override {wrong}: {model_type} fixes it; only {sorted(allowed)}")
    from transformers import GPT2LMHeadModel  # large, and only needed here

    print(f"loading weights from pretrained gpt: {model_type}")
    sizes = dict(SIZES[model_type], vocab_size=50257, block_size=1024, bias=True)
    model = model_class(config_class(**sizes, **override_args))
    load_hugging_face(model, GPT2LMHeadModel.from_pretrained(model_type).state_dict())
    return model


@torch.no_grad()
def load_hugging_face(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a GPT2LMHeadModel's state dict into a GPT; its Conv1D weights are stored transposed."""
    weights = {name: w for name, w in weights.items() if not name.endswith(_MASKS)}
    parameters = model.state_dict()
    if weights.keys() != parameters.keys():
        raise ValueError(
            f"parameter names differ: {sorted(weights.keys() ^ parameters.keys())[:4]}, ..."
        )
    for name, weight in weights.items():
        weight = weight.t() if name.endswith(_CONV1D) else weight
        if weight.shape != parameters[name].shape:
            shape = tuple(parameters[name].shape)
            raise ValueError(
                f"{name} is {tuple(weight.shape)} in the source and {shape} in this model"
            )
        parameters[name].copy_(weight)


def to_hugging_face(model: nn.Module) -> dict[str, Tensor]:
    """A GPT's weights under the names and in the layout of transformers' GPT2LMHeadModel."""
    return {
        name: w.t().contiguous() if name.endswith(_CONV1D) else w
        for name, w in model.state_dict().items()
    }
