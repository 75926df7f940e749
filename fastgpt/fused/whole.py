"""A GPT's forward as a chain of autograd units: ids enter it once, logits and loss leave it once.

    embed -> block -> ... -> block -> norm -> head and loss

Each name is a unit with its own forward and backward. Between blocks the residual stream is two
terms, x and delta, which the next norm adds as it reads them. A module that somebody has changed is
called as it is, in its place in the chain.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt import backend, ops, reference
from fastgpt.config import setting
from fastgpt.fused import block as block_unit
from fastgpt.fused import embedding
from fastgpt.fused.block import Settings, Weights
from fastgpt.fused.launchers import Launchers
from fastgpt.fused.untouched import (
    alike,
    block_weights,
    calls_untouched,
    embeddings_as_built,
    flat,
    plain,
    plain_matmul,
    untouched,
)
from fastgpt.linear_cross_entropy import is_padded, logits_and_loss, mean_loss, padded_linear

# tokens * C**2 from which the fused path pays inside torch.compile: nanoGPT's own batch. Python
# launches fastgpt's operators, and with fewer tokens the GPU waits for it. On an H200 with a slow
# host a step of 124M at 4 x 1024 tokens took 20 ms fused and 12 ms left to inductor; at 16 x 1024
# the fused path is 1.07x as fast.
WORTH_OPERATORS = 12 * 1024 * 768**2


def fused_model(model: Any, idx: Tensor) -> "FusedModel | None":
    """The chain for a forward of `model`, a GPT, on idx (B, T); None if its modules have to run one
    by one: under backend "torch", where a kernel cannot run (under "triton" that raises), under
    torch.func, and inside torch.compile for small batches. Inside torch.compile the whole chain is
    traced, made of what backend.OPS has for "compiled".
    """
    if torch.compiler.is_compiling():
        from fastgpt.fused.guards import guard_tied_weights

        guard_tied_weights(model.transformer.wte, model.lm_head)
    if torch.compiler.is_compiling() and _recomputes(model):
        return None  # up to PyTorch 2.11 checkpointing keeps what an autograd.Function saves
    weight, cfg = getattr(model.lm_head, "weight", None), model.config
    if idx.numel() == 0 or not calls_untouched():
        return None
    if weight is None or not plain(weight) or weight.dim() != 2 or weight.shape[1] % cfg.n_head:
        return None
    if torch.compiler.is_compiling() and _is_little(idx, weight.shape[1]):
        return None
    dropout_p = cfg.dropout if model.training else 0.0
    settings = Settings(cfg.n_head, setting(cfg, "gelu") == "tanh", dropout_p)
    facts = dict(n_head=cfg.n_head, dropout_p=settings.dropout_p)
    dtype = ops.autocast_dtype(weight)
    qkv = weight.new_empty((1, idx.shape[1], 3 * weight.shape[1]), dtype=dtype)
    chosen = backend.choose("compiled" if torch.compiler.is_compiling() else "block", qkv, **facts)
    if chosen is reference:
        return None
    run = chosen.launchers(qkv, **facts)
    if model.overlaps:
        run = run._replace(overlaps=True)
    return FusedModel(model, run, settings, weight, dtype)


def _is_little(idx: Tensor, C: int) -> bool:
    on_gpu = idx.device.type == "cuda" and backend.is_open("compiled")
    return on_gpu and idx.numel() * C**2 < WORTH_OPERATORS


class FusedModel(NamedTuple):
    model: Any  # a GPT
    run: Launchers
    settings: Settings
    weight: Tensor  # the head's: a unit's tensors must have its dtype, device and width
    dtype: torch.dtype  # of the matmuls

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What GPT.forward returns."""
        x, head_weight = self.hidden(idx)
        return self.head(x, head_weight, targets)

    def head_is_outside(self, targets: Tensor | None) -> bool:
        """Whether the head is left out of the graph that is traced (eager_head.py)."""
        wanted = setting(self.model.config, "return_logits") == "eager" and targets is not None
        return wanted and torch.compiler.is_compiling()

    def hidden(self, idx: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last norm's output (B, T, C), and the tied weight's alias as `_embed` returns it."""
        parts = self.model.transformer
        again = _recomputes(self.model)
        x, head_weight = self._embed(idx)  # (B, T, C)
        delta, x = None, parts.drop(x)
        for block in parts.h:
            if again:
                delta, x = checkpoint(self._block, block, delta, x, use_reentrant=False)
            else:
                delta, x = self._block(block, delta, x)
        return self._norm(parts.ln_f, delta, x), head_weight

    def _embed(self, idx: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C), and the alias of the tied weight for the head (embedding.py), or None."""
        wte, wpe = self.model.transformer.wte, self.model.transformer.wpe
        if embeddings_as_built(self.model, self.weight, idx.shape[1]):
            return embedding.embed(self.run.add_rows_, idx, wte.weight, wpe.weight)
        return wte(idx) + wpe(torch.arange(idx.shape[1], device=idx.device)), None

    def _block(self, block: Any, delta: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """One block on the residual stream x + delta -> its new delta and x."""
        weights = block_weights(block, self.settings, self.weight.shape[1])
        if weights is None or not alike(self.weight, x, *weights):
            return None, block(_sum(delta, x))
        low = self._low_matrices(weights)
        return block_unit.block(self.run, self.settings, delta, x, weights, low)

    def _norm(self, ln_f: Any, delta: Tensor | None, x: Tensor) -> Tensor:
        """ln_f of the residual stream x + delta; in the matmuls' dtype if ln_f is as built."""
        as_built = untouched(ln_f, "LayerNorm") and flat(ln_f.weight) and flat(ln_f.bias)
        if not (as_built and alike(self.weight, x, ln_f.weight, ln_f.bias)):
            return ln_f(_sum(delta, x))
        return block_unit.norm(self.run, delta, x, ln_f.weight, ln_f.bias, self.dtype)

    def head(
        self, x: Tensor, weight: Tensor | None, targets: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss; `weight` None calls the head as the module it is."""
        head, returned = self.model.lm_head, setting(self.model.config, "return_logits")
        if targets is None:
            return head(x[:, [-1], :]), None
        targets = targets.reshape(-1)
        rows = x.reshape(-1, x.shape[-1])
        if weight is not None and x.dtype == self.dtype:
            given = rows, weight, self._low(head.weight), ops.checked_targets(rows, targets), -1
            if not returned:
                return None, mean_loss(self.run.cross_entropy_, *given)
            if self.run.cross_entropy is not None:
                logits, loss = logits_and_loss(self.run.cross_entropy, *given)
                return logits.view(*x.shape[:-1], -1), loss
        if not returned and plain_matmul(head):
            return None, ops.linear_cross_entropy(rows, head.weight, targets)
        if weight is None:
            logits = head(x)
        elif x.dtype == self.dtype and is_padded(x, len(weight)):
            logits = padded_linear(x, weight, self._low(head.weight))
        else:
            logits = F.linear(x, weight)
        loss = ops.cross_entropy(logits.view(-1, logits.shape[-1]), targets)
        return (logits if returned else None), loss

    def _low_matrices(self, w: Weights) -> Weights:
        """The weights, with the matmuls' weights and biases in the matmuls' dtype."""
        if self.dtype == w.qkv.dtype:
            return w
        low = self._low
        return Weights(
            w.ln_1, w.ln_1_bias,
            low(w.qkv), None if w.qkv_bias is None else low(w.qkv_bias),
            low(w.attn_proj), None if w.attn_proj_bias is None else low(w.attn_proj_bias),
            w.ln_2, w.ln_2_bias,
            low(w.fc), None if w.fc_bias is None else low(w.fc_bias),
            low(w.mlp_proj), None if w.mlp_proj_bias is None else low(w.mlp_proj_bias),
        )  # fmt: skip

    def _low(self, p: Tensor) -> Tensor:
        """A parameter in the matmuls' dtype, outside autograd: TrainStep's copy, or a cast."""
        copies = self.model.matmul_copies
        copy = None if copies is None else copies.get(p)
        return p.detach().to(self.dtype) if copy is None else copy


def _recomputes(model: Any) -> bool:
    return setting(model.config, "checkpoint_blocks") and torch.is_grad_enabled()


def _sum(delta: Tensor | None, x: Tensor) -> Tensor:
    return x if delta is None else x + delta
