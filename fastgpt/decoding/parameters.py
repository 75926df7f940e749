"""What decoding reads of a GPT: its parameters, where they are all that its modules work with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.fused.block import Settings, Weights
from fastgpt.fused.untouched import alike, block_weights, decodable, embeddings_as_built

_MATRICES = "qkv", "attn_proj", "fc", "mlp_proj"


class Parameters(NamedTuple):
    """A GPT's own tensors, or copies of them in other dtypes."""

    wte: Tensor  # (V, C)
    wpe: Tensor  # (block_size, C)
    blocks: tuple[Weights, ...]
    ln_f: Tensor  # (C,)
    ln_f_bias: Tensor | None
    head: Tensor  # (V, C)
    n_head: int
    approximate: str  # of GELU

    def tensors(self) -> list[Tensor]:
        of_blocks = (t for block in self.blocks for t in block)
        found = (self.wte, self.wpe, *of_blocks, self.ln_f, self.ln_f_bias, self.head)
        return [t for t in found if t is not None]


def parameters(model: Any) -> Parameters | None:
    """Those of `model`, or None where its forward may do something else with them, or with more:
    then it samples by whole forwards.
    """
    if not decodable(model):
        return None
    cfg, parts, head = model.config, model.transformer, model.lm_head.weight
    settings = Settings(cfg.n_head, cfg.gelu == "tanh", 0.0)
    blocks = [block_weights(block, settings, head.shape[1]) for block in parts.h]
    ln_f = parts.ln_f
    if not embeddings_as_built(model, head, cfg.block_size) or None in blocks:
        return None
    made = Parameters(
        parts.wte.weight, parts.wpe.weight, tuple(b for b in blocks if b is not None),
        ln_f.weight, ln_f.bias, head, cfg.n_head, cfg.gelu,
    )  # fmt: skip
    return made if alike(head, *made.tensors()) and head.is_contiguous() else None


def state_of(parameters: Parameters) -> tuple[tuple[int, int], ...]:
    """Where they lie and how often they were written to: what differs after a change of them."""
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version) for t in parameters.tensors()
    )


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

    return parameters._replace(
        blocks=tuple(map(block, parameters.blocks)),
        ln_f=to(wide, parameters.ln_f),
        ln_f_bias=to(wide, parameters.ln_f_bias),
        head=to(dtype, parameters.head),
    )
