"""Sampling from a GPT: nanoGPT's tokens for the same seed, with a key-value cache while one is
valid.

Positions are absolute, so cached keys hold only while the context fits in block_size. Past that
nanoGPT drops the oldest token and embeds every other one a position earlier; the window is then
computed anew, as nanoGPT does. In fp32 cached logits equal the uncached ones to rounding (different
GEMM shapes); in bf16 they are as far apart as two runs of differently shaped GEMMs are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.fused.untouched import decodable


@dataclass(frozen=True)
class Sampling:
    temperature: float | Tensor = 1.0  # inf draws evenly; (B, 1) is one for each row
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Tensor) and not self.temperature >= 0:  # NaN is not
            raise ValueError(f"temperature={self.temperature} must be 0 (argmax) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps nothing; use None to keep every id")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no probability above 0; use None for every id")

    def draw(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> ids (B, 1), consuming the generator exactly as nanoGPT does."""
        if not isinstance(self.temperature, Tensor) and self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = torch.topk(logits, min(self.top_k, logits.size(-1))).values[:, [-1]]
            logits = logits.masked_fill(logits < kth, -math.inf)  # ties with the k-th stay
        if self.top_p is not None:
            logits = _keep_nucleus(logits, self.top_p)
        return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set of ids of probability top_p together (arXiv 1904.09751)."""
    ordered, ids = logits.sort(dim=-1, descending=True)
    p = F.softmax(ordered, dim=-1)
    drop = p.cumsum(dim=-1) - p >= top_p  # what comes before already adds up to top_p
    return logits.scatter(-1, ids, ordered.masked_fill(drop, -math.inf))


@torch.no_grad()
def stream(
    model: Any,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop_token: int | None,
    watched: bool = True,
) -> Iterator[Tensor]:
    """Columns (B, 1) of new ids after the prompt idx (B, T). Between two of them a caller who is
    `watched` may change the model.
    """
    done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    next_logits = _NextLogits(model)
    for i in range(max_new_tokens):
        if watched and i > 0:
            next_logits.cacheable = decodable(model)
        new = sampling.draw(next_logits(idx))
        if stop_token is not None:
            new = new.masked_fill(done, stop_token)
            done |= new == stop_token
        yield new
        if stop_token is not None and done.all():
            return
        idx = torch.cat((idx, new), dim=1)


class _NextLogits:
    """The logits (B, V) after idx (B, T), whose earlier columns were given in the call before.

    The cache is only for a model as it was built (fused/untouched.py). Without it every call is a
    whole forward.
    """

    def __init__(self, model: Any):
        self.model, self.cacheable = model, decodable(model)
        self.cache: list[tuple[Tensor, Tensor]] = []  # per layer k, v (B, H, block_size, D)
        self.filled = 0  # positions in it

    def __call__(self, idx: Tensor) -> Tensor:
        block_size = self.model.config.block_size
        if 0 < idx.size(1) <= block_size and self.cacheable:
            return self._extend(idx)[:, -1, :]
        self.cache, self.filled = [], 0
        logits, _ = self.model(idx[:, -block_size:])
        return logits[:, -1, :]

    def _extend(self, idx: Tensor) -> Tensor:
        """Forward only the columns that are not cached yet."""
        transformer = self.model.transformer
        start, end = self.filled, idx.size(1)
        pos = torch.arange(start, end, device=idx.device)
        x = transformer.drop(transformer.wte(idx[:, start:]) + transformer.wpe(pos))
        for layer, block in enumerate(transformer.h):
            x = x + self._attend(layer, block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        self.filled = end
        return self.model.lm_head(transformer.ln_f(x[:, [-1], :]))

    def _attend(self, layer: int, attn: Any, x: Tensor) -> Tensor:
        B, T, C = x.shape
        H, start, end = attn.n_head, self.filled, self.filled + x.size(1)
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in attn.c_attn(x).split(C, dim=2))
        if layer == len(self.cache):
            shape = (B, H, self.model.config.block_size, C // H)
            self.cache.append((k.new_empty(shape), v.new_empty(shape)))
        keys, values = self.cache[layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        # the prompt attends causally; a single later token attends to everything before it
        y = F.scaled_dot_product_attention(
            q, keys[:, :, :end], values[:, :, :end], is_causal=start == 0
        )
        return attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
