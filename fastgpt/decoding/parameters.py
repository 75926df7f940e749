"""What decoding reads of a GPT: its parameters, where they are all that its modules work with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.config import setting
from fastgpt.fused.block import Settings, Weights
from fastgpt.fused.untouched import alike, block_weights, decodable, embeddings_as_built

_MATRICES = "qkv", "attn_proj", "fc", "mlp_proj"


class Int8(NamedTuple):
    """A matrix in 8 bits, rounded to what each of its rows allows: values * scales[:, None]."""

    values: Tensor  # (N, K) int8
    scales: Tensor  # (N,) fp32, which bfloat16 holds too: PyTorch's kernel takes them in that


class Parameters(NamedTuple):
    """A GPT's own tensors, or copies of them in other dtypes; matrices may be Int8."""

    wte: Tensor  # (V, C)
    wpe: Tensor  # (block_size, C)
    blocks: tuple[Weights, ...]
    ln_f: Tensor  # (C,)
    ln_f_bias: Tensor | None
    head: Tensor  # (V, C)
    n_head: int
    approximate: str  # of GELU
    dtype: torch.dtype  # of the cache

    def tensors(self) -> list[Tensor]:
        of_blocks = (t for block in self.blocks for t in block)
        weights = (self.wte, self.wpe, *of_blocks, self.ln_f, self.ln_f_bias, self.head)
        parts = (t if isinstance(t, Int8) else (t,) for t in weights if t is not None)
        return [t for several in parts for t in several]

    def like(self) -> Tensor:
        """A tensor of the cache's dtype and device, to choose an implementation by."""
        return torch.empty(1, dtype=self.dtype, device=self.wte.device)


def parameters(model: Any) -> Parameters | None:
    """Those of `model`, or None where its forward may do something else with them, or with more:
    then it samples by whole forwards.
    """
    if not decodable(model):
        return None
    cfg, parts, head = model.config, model.transformer, model.lm_head.weight
    gelu = setting(cfg, "gelu")
    settings = Settings(cfg.n_head, gelu == "tanh", 0.0)
    blocks = [block_weights(block, settings, head.shape[1]) for block in parts.h]
    ln_f = parts.ln_f
    if not embeddings_as_built(model, head, cfg.block_size) or None in blocks:
        return None
    result = Parameters(
        parts.wte.weight, parts.wpe.weight, tuple(b for b in blocks if b is not None),
        ln_f.weight, ln_f.bias, head, cfg.n_head, gelu, head.dtype,
    )  # fmt: skip
    return result if alike(head, *result.tensors()) and head.is_contiguous() else None


def state_of(parameters: Parameters) -> tuple[Any, ...]:
    """Where they lie and how often they were written to, as PyTorch counts it, and the rest of what
    a change of the model changes.
    """
    counts = ((t.data_ptr(), 0 if t.is_inference() else t._version) for t in parameters.tensors())
    return (parameters.n_head, parameters.approximate, *counts)


def in_dtype(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """The same for steps whose matmuls are in `dtype`, and everything else in fp32 or more.

    Tensors that are so already are not copied.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def to(dtype: torch.dtype, t: Any) -> Any:
        return t if t is None else t.detach().to(dtype).contiguous()

    def block(weights: Weights) -> Weights:
        named = weights._asdict().items()
        return Weights(**{name: to(dtype if name in _MATRICES else wide, t) for name, t in named})

    head = to(dtype, parameters.head)
    of_wte = dtype if parameters.wte.dtype == dtype else wide
    shared = parameters.wte is parameters.head and of_wte == dtype
    wte = head if shared else to(of_wte, parameters.wte)
    return parameters._replace(
        wte=wte,
        wpe=to(wte.dtype, parameters.wpe),
        blocks=tuple(map(block, parameters.blocks)),
        ln_f=to(wide, parameters.ln_f),
        ln_f_bias=to(wide, parameters.ln_f_bias),
        head=head,
        dtype=dtype,
    )


def in_int8(parameters: Parameters) -> Parameters:
    """The same with every matrix that a step multiplies by in 8 bits, a scale for each row."""

    def block(weights: Weights) -> Weights:
        return weights._replace(**{name: _int8(getattr(weights, name)) for name in _MATRICES})

    blocks = tuple(map(block, parameters.blocks))
    return parameters._replace(blocks=blocks, head=_int8(parameters.head))


def _int8(weight: Tensor) -> Any:
    largest = weight.detach().float().abs().amax(1)
    scales = (largest / 127).to(torch.bfloat16).float()
    scales = torch.where(scales == 0, 1.0, scales)
    values = (weight.detach().float() / scales[:, None]).round_().clamp_(-127, 127)
    return Int8(values.to(torch.int8), scales)


def hidden_size(weights: Weights) -> int:
    fc: Any = weights.fc
    return len(fc.scales if isinstance(fc, Int8) else fc)


def dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """For products of many rows, where reading it is not what takes the time."""
    if isinstance(weight, Int8):
        return weight.values.to(dtype) * weight.scales.to(dtype)[:, None]
    return weight
