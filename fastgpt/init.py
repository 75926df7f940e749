"""Initial weights: GPT-2's scheme as nanoGPT draws it, and the variants one config field away.

    embeddings, and the head tied to them     N(0, EMBEDDING_STD)
    linear layers (c_attn, c_fc)              N(0, LINEAR_INIT[linear_init]),        biases 0
    output projections (c_proj)               N(0, RESIDUAL_INIT[residual_init]),    biases 0
    LayerNorm                                 weight 1, bias 0

Every block adds two projections to the residual stream; dividing their deviation by sqrt(2 *
n_layer) keeps the variance of the sum bounded with depth (GPT-2 paper, section 2.3).

The order of the draws is part of the contract: the same seed gives nanoGPT's bits, and leaves the
generator in nanoGPT's state.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastgpt.config import setting

EMBEDDING_STD = 0.02  # the only number of the specification that no scheme names

LINEAR_INIT: Mapping[str, Callable[[int], float]] = {  # of n_embd
    "0.02": lambda n_embd: 0.02,
    "0.02/sqrt(n_embd)": lambda n_embd: 0.02 / math.sqrt(n_embd),
}

RESIDUAL_INIT: Mapping[str, Callable[[int], float]] = {  # of n_layer
    "0.02/sqrt(2*n_layer)": lambda n_layer: 0.02 / math.sqrt(2 * n_layer),
    "0.02*0.02": lambda n_layer: 0.02 * 0.02,
    "0.02*sqrt(2/n_layer)": lambda n_layer: 0.02 * math.sqrt(2 / n_layer),
    "0.02/sqrt(n_layer)": lambda n_layer: 0.02 / math.sqrt(n_layer),
    "0.02": lambda n_layer: 0.02,
}


def scheme(field: str, name: object, schemes: Mapping[str, Callable[[int], float]]) -> Any:
    """The scheme called `name` (a number is read as its text); ValueError lists what exists."""
    if str(name) not in schemes:
        raise ValueError(f"unknown {field}={name!r}; choose one of {', '.join(map(repr, schemes))}")
    return schemes[str(name)]


def linear_std(config: Any) -> float:
    std_of = scheme("linear_init", setting(config, "linear_init"), LINEAR_INIT)
    return std_of(config.n_embd)


def residual_std(config: Any) -> float:
    """Of the output projections; without layers there are none, and any value serves."""
    std_of = scheme("residual_init", setting(config, "residual_init"), RESIDUAL_INIT)
    return std_of(max(config.n_layer, 1))


def init_module(module: nn.Module, std: float) -> None:
    """Draw one module's weights as nanoGPT's `_init_weights` does; others are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, mean=0.0, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=EMBEDDING_STD)


def init_residual_projections(model: nn.Module, std: float) -> None:
    """Draw every `c_proj.weight` again, in the order of `named_parameters`."""
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, mean=0.0, std=std)
