"""Checks of what a GPT is called with: its configuration, token ids and options."""

import math
import operator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import init
from fastgpt.config import setting
from fastgpt.implementations.interception import interception


def check_config(config: Any) -> None:
    """ValueError names a bad field."""
    for field in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, field)
        least = 0 if field == "n_layer" else 1  # embeddings and a head alone are a bigram model
        if not isinstance(value, Integral) or value < least:  # numpy's integers are not ints
            raise ValueError(f"{field}={value!r} must be an integer of at least {least}")
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}; "
            f"try n_embd={math.ceil(config.n_embd / config.n_head) * config.n_head}"
        )
    if (gelu := setting(config, "gelu")) not in ("none", "tanh"):
        raise ValueError(f"unknown gelu={gelu!r}; use 'none' (exact) or 'tanh'")
    if (returned := setting(config, "return_logits")) not in (True, False, "eager"):
        raise ValueError(f"unknown return_logits={returned!r}; use a bool or 'eager'")
    init.linear_std(config), init.residual_std(config)  # raise on an unknown scheme


def check_tokens(idx: Tensor, longest: int | None, wte: nn.Embedding | None) -> None:
    """Errors unless idx is a batch of ids of `wte`'s vocabulary, at most `longest` in a row.

    `wte` None allows any id, for an embedding that is not a plain one. On a GPU, where looking
    would wait for the device, an id outside the vocabulary is for PyTorch to notice.
    """
    if not isinstance(idx, Tensor):
        raise TypeError(f"idx must be a tensor of token ids, got {type(idx).__name__}")
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"idx must be int64 or int32 token ids, got {idx.dtype}; convert with .long()"
        )
    if idx.dim() != 2:
        raise ValueError(
            f"idx must be (B, T), got shape {tuple(idx.shape)}; add a batch with idx[None]"
        )
    if longest is not None and idx.size(1) > longest:
        raise ValueError(
            f"idx has T={idx.size(1)} tokens, block_size is {longest}; crop it with "
            "idx[:, -block_size:] or build the model with a larger block_size"
        )
    if wte is None:
        return
    if idx.is_meta and not wte.weight.is_meta:  # a CPU's embedding takes them, and returns noise
        raise RuntimeError(f"idx is on meta, the model on {wte.weight.device}; move one with .to()")
    check_ids(idx, wte.weight.shape[0])  # a fork may have given it more rows than num_embeddings


def check_ids(idx: Tensor, V: int) -> None:
    """IndexError for an id outside the vocabulary, where there are values to look at."""
    if can_be_read(idx):
        low, high = (t.item() for t in idx.aminmax())
        if low < 0 or high >= V:
            raise IndexError(
                f"idx holds ids from {low} to {high}, but vocab_size={V} allows 0 to {V - 1}; "
                "check that the data and the model use the same tokenizer"
            )


def check_prompt(idx: Tensor, wte: nn.Embedding | None) -> None:
    """check_ids on a GPU too, where PyTorch's own error leaves a process without the GPU: once a
    text the wait is worth it.
    """
    if wte is not None and not idx.is_meta and not torch.compiler.is_compiling():
        check_ids(idx.cpu(), wte.weight.shape[0])


def check_lengths(lengths: Any, idx: Tensor) -> list[int] | None:
    """The lengths of the prompts in idx (B, T), each at its row's right end, as a list."""
    if lengths is None:
        return None
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if (
        not isinstance(values, list | tuple)
        or len(values) != idx.size(0)
        or not all(type(n) is int and 0 < n <= idx.size(1) for n in values)
    ):
        raise ValueError(
            f"lengths={values} must be (B,) integers from 1 to T, for idx (B, T), "
            f"{tuple(idx.shape)}; an empty prompt has nothing to go on from"
        )
    return list(values)


def check_decoding_dtype(dtype: torch.dtype | None) -> None:
    known = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype={dtype} is no dtype to decode in; use one of {known} or None")


def checked_count(max_new_tokens: Any) -> int:
    """As an int, which it may be a tensor of."""
    try:
        count = operator.index(max_new_tokens)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 0")
    return count


def check_kind(name: str, value: Any, kind: type, or_none: bool = False) -> None:
    """TypeError unless value is one of these numbers (a bool is none of them), or a tensor of one,
    or None.
    """
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if or_none and value is None:
        return
    if isinstance(value, kind) and not isinstance(value, bool):
        return
    what = "an integer" if kind is Integral else "a number"
    raise TypeError(f"{name}={value!r} must be {what}{' or None' if or_none else ''}")


def check_stop_token(stop_token: Any, wte: nn.Embedding | None) -> None:
    check_kind("stop_token", stop_token, Integral, or_none=True)
    V = None if wte is None else wte.weight.shape[0]
    if stop_token is not None and (stop_token < 0 or (V is not None and stop_token >= V)):
        ids = "not negative" if V is None else f"from 0 to {V - 1}"
        raise ValueError(
            f"stop_token={stop_token} is never sampled: ids are {ids}; use None to go on to the end"
        )


def check_logits(logits: Tensor) -> None:
    """On a GPU, where looking would wait for the device, `zero` keeps what it would see."""
    if can_be_read(logits) and not logits.amax(-1).isfinite().all():  # NaN is the largest
        raise not_finite()


def zero(logits: Tensor) -> Tensor:
    """logits (B, V) -> (B, 1), 0 or NaN where the largest is NaN or infinite."""
    return 0 * logits.amax(-1, keepdim=True)


def not_finite() -> RuntimeError:
    return RuntimeError(
        "the logits hold NaN or inf; look for NaN or inf in the model's weights, or for values "
        "beyond float16's range"
    )


def check_qkv(qkv: Tensor, C: int, n_embd: int) -> None:
    """Queries, keys and values (B, T, 3C) of an attention whose `n_embd` may have been changed."""
    if qkv.size(-1) != 3 * n_embd or n_embd != C:
        raise ValueError(
            f"c_attn gave {tuple(qkv.shape)} for inputs of width {C}, and n_embd={n_embd}; the "
            "attention needs 3 * n_embd columns for inputs of width n_embd"
        )


def check_last_position(idx: Tensor) -> None:
    if idx.size(1) == 0:
        shape = tuple(idx.shape)
        raise IndexError(f"idx {shape} has no last position; give at least one token")


def can_be_read(idx: Tensor) -> bool:
    """Whether there are values on a CPU, and nobody is tracing what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and interception() is None
        and type(idx) is Tensor
        and idx.device.type == "cpu"
        and idx.numel() > 0
    )
