"""What a GPT refuses: configurations that no model has, ids that are none."""

import math
from dataclasses import fields
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastgpt import init


def check_config(config: Any, known: type) -> None:
    """Complete `config` with the defaults of `known`, GPTConfig; ValueError names a bad field."""
    for ours in fields(known):  # nanoGPT's own GPTConfig, or a fork's, lacks what is ours
        if not hasattr(config, ours.name):
            setattr(config, ours.name, ours.default)
    for field in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, field)
        if not isinstance(value, Integral) or value < 1:  # numpy's integers are none of int
            raise ValueError(f"{field}={value!r} must be a positive integer")
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}; "
            f"try n_embd={math.ceil(config.n_embd / config.n_head) * config.n_head}"
        )
    if config.gelu not in ("none", "tanh"):
        raise ValueError(f"unknown gelu={config.gelu!r}; use 'none' (exact) or 'tanh'")
    init.linear_std(config), init.residual_std(config)  # raise on an unknown scheme


def check_tokens(idx: Tensor, block_size: int | None, weight: Tensor) -> None:
    """Errors for what is no batch of ids. `block_size` None allows any length."""
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"idx must be int64 or int32 token ids, got {idx.dtype}; convert with .long()"
        )
    if idx.is_meta and not weight.is_meta:  # a CPU's embedding takes them, and returns noise
        raise RuntimeError(f"idx is on meta, the model on {weight.device}; move one with .to()")
    if idx.dim() != 2:
        raise ValueError(
            f"idx must be (B, T), got shape {tuple(idx.shape)}; add a batch with idx[None]"
        )
    if block_size is not None and idx.size(1) > block_size:
        raise ValueError(
            f"idx has T={idx.size(1)} tokens, block_size is {block_size}; crop it with "
            "idx[:, -block_size:] or build the model with a larger block_size"
        )
