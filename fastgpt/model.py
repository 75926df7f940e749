"""nanoGPT's GPT: the same names, shapes, initial bits, losses and samples, on the ops of ops.py.

Reads top-down like nanoGPT's model.py (github.com/karpathy/nanoGPT). What differs is marked by a
call to `ops`, or to `path`, the fused training path (whole.py). A fused op skips the forward of the
modules whose weights it takes, so it asks whether they are `untouched`, and steps aside where one
was hooked, replaced, parametrised or sharded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from fastgpt import checks, devices, init, ops, optim, sampling, weights
from fastgpt.fused import whole
from fastgpt.fused.untouched import FORWARDS, plain_lookup, untouched


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self.flash = True  # nanoGPT's name for "not the slow path"; forks read it

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        dropout_p = self.dropout if self.training else 0.0
        y = ops.packed_causal_attention(qkv, self.n_head, dropout_p)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        fc, gelu, proj = self.c_fc, self.gelu, self.c_proj
        if untouched(fc, nn.Linear) and untouched(gelu, nn.GELU) and untouched(proj, nn.Linear):
            x = ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, gelu.approximate)
        else:
            x = proj(gelu(fc(x)))
        return self.dropout(x)


class Block(nn.Module):
    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        delta = self.attn(self.ln_1(x))
        if untouched(self.ln_2, LayerNorm):
            normed, x = ops.add_layer_norm(delta, x, self.ln_2.weight, self.ln_2.bias)
        else:
            x = x + delta
            normed = self.ln_2(x)
        return x + self.mlp(normed)

    def weights(self, settings: whole.Settings) -> whole.Weights | None:
        """What the fused path reads, or None where running the modules might do something else."""
        attn, mlp = self.attn, self.mlp
        norms, dropouts = (self.ln_1, self.ln_2), (attn.resid_dropout, mlp.dropout)
        linears = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
        as_built = [(self, Block), (attn, CausalSelfAttention), (mlp, MLP), (mlp.gelu, nn.GELU)]
        for kind, modules in ((LayerNorm, norms), (nn.Linear, linears), (nn.Dropout, dropouts)):
            as_built += [(m, kind) for m in modules]
        if not all(untouched(m, kind) for m, kind in as_built):
            return None
        rates = {m.p if m.training else 0.0 for m in dropouts}
        rates.add(attn.dropout if attn.training else 0.0)
        tanh = mlp.gelu.approximate == "tanh"
        if rates != {settings.dropout_p} or (attn.n_head, tanh) != settings[:2]:
            return None
        layers = (self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj)
        tensors: Any = (t for layer in layers for t in (layer.weight, layer.bias))
        return whole.Weights(*tensors)


@dataclass
class GPTConfig:
    """nanoGPT's seven fields, then ours, whose defaults change nothing."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    return_logits: bool = True  # False: forward(idx, targets) returns (None, loss)
    gelu: str = "none"  # exact; "tanh" is what OpenAI's weights were trained with
    residual_init: float | str = "0.02/sqrt(2*n_layer)"  # see init.py for the schemes
    linear_init: float | str = 0.02
    checkpoint_blocks: bool = False  # compute a block again in the backward, instead of storing it


class GPT(nn.Module):
    transformer: Any  # a ModuleDict of wte, wpe, drop, h and ln_f

    def __init__(self, config: GPTConfig):
        super().__init__()
        checks.check_config(config, GPTConfig)
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied (arXiv 1608.05859)
        self.register_load_state_dict_pre_hook(weights.accept_wrapped_names)

        self.apply(self._init_weights)
        init.init_residual_projections(self, init.residual_std(config))
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, without the position embeddings by default. The token embeddings count: they
        are the head's weights too."""
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def _init_weights(self, module: nn.Module) -> None:
        tied = module is self.lm_head  # an embedding by its other name
        init.init_module(module, init.EMBEDDING_STD if tied else init.linear_std(self.config))

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, low: whole.Low | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss of token ids idx (B, T), int64 or int32.

        Without targets: logits (B, 1, V) of the last position, and None. With targets (B, T) int64:
        logits (B, T, V), or None under `return_logits=False`, and the mean cross entropy over the
        targets other than -1, an fp32 scalar. `low` is for engine.py: a weight as matmuls read it.
        """
        checks.check_tokens(idx, self.config.block_size, next(self.parameters()))
        cfg, T, p = self.config, idx.size(1), self.config.dropout if self.training else 0.0
        path = whole.path(next(self.parameters()), cfg.n_head, T, cfg.gelu == "tanh", p, low)
        x, head_weight = self._embed(idx, path)  # (B, T, C)
        x, delta = self.transformer.drop(x), None  # the residual stream is x + delta
        for block in self.transformer.h:
            weights = block.weights(path.settings) if path else None
            if path and weights and path.takes(x, *weights):
                delta, x = self._stored_or_not(path.block, delta, x, weights)
            else:
                x, delta = self._stored_or_not(block, x if delta is None else x + delta), None
        ln_f = self.transformer.ln_f
        if path and untouched(ln_f, LayerNorm) and path.takes(x, ln_f.weight, ln_f.bias):
            x = path.norm(delta, x, ln_f.weight, ln_f.bias)
        else:
            x = ln_f(x if delta is None else x + delta)

        if targets is None:
            if T == 0:
                shape = tuple(idx.shape)
                raise IndexError(f"idx {shape} has no last position; give at least one token")
            return self.lm_head(x[:, [-1], :]), None
        return self._loss(path, x, head_weight, targets.reshape(-1))

    def _embed(
        self, idx: Tensor, path: whole.Path | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Token plus position embeddings (B, T, C) from position `start`; and the weight that the
        head is to read, None for its own.
        """
        wte, wpe = self.transformer.wte, self.transformer.wpe
        try:
            if path and self._tied_and_plain() and path.takes(wte.weight, wpe.weight):
                return path.embed(idx, wte.weight, wpe.weight)
            pos = torch.arange(start, start + idx.size(1), device=idx.device)
            return wte(idx) + wpe(pos), None
        except IndexError:  # raised on a CPU; a GPU asserts on the device
            V, low, high = wte.num_embeddings, idx.min().item(), idx.max().item()
            raise IndexError(
                f"idx holds ids from {low} to {high}, but vocab_size={V} allows 0 to {V - 1}; "
                "check that the data and the model use the same tokenizer"
            ) from None

    def _tied_and_plain(self) -> bool:
        """Whether the embeddings and the head are lookups and a matmul, on one weight."""
        wte, wpe, head = self.transformer.wte, self.transformer.wpe, self.lm_head
        return (
            all(plain_lookup(m) for m in (wte, wpe))
            and (untouched(head, nn.Linear) and head.bias is None)
            and head.weight is wte.weight
        )

    def _loss(
        self, path: whole.Path | None, x: Tensor, head_weight: Tensor | None, targets: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """x (B, T, C), targets (B*T,) -> logits or None, loss."""
        head, returned = self.lm_head, self.config.return_logits
        if not returned and untouched(head, nn.Linear) and head.bias is None:
            if path and head_weight is not None:
                return None, path.loss(x, head_weight, head.weight, targets)
            return None, ops.linear_cross_entropy(x.reshape(-1, x.size(-1)), head.weight, targets)
        logits = head(x) if head_weight is None else F.linear(x, head_weight)
        loss = ops.cross_entropy(logits.view(-1, logits.size(-1)), targets, ignore_index=-1)
        return (logits if returned else None), loss

    def _stored_or_not(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.config.checkpoint_blocks and torch.is_grad_enabled():
            return computed_again(function, *args, use_reentrant=False)
        return function(*args)

    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first `block_size` positions of a checkpoint with longer contexts."""
        if not 0 < block_size <= self.config.block_size:
            limit = self.config.block_size
            raise ValueError(f"cannot crop to block_size={block_size}; use 1 to {limit}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """GPT-2 with OpenAI's weights, through Hugging Face: gpt2, gpt2-medium, gpt2-large,
        gpt2-xl.

        `override_args` may set `dropout` and our own fields. As in nanoGPT the GELU stays exact;
        dict(gelu="tanh") gives what the weights were trained with.
        """
        return weights.from_hugging_face(cls, GPTConfig, model_type, override_args or {})

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str,
    ) -> torch.optim.AdamW:
        """AdamW that decays what is two-dimensional: matmul weights and embeddings, no biases or
        norms.
        """
        params = [p for _, p in self.named_parameters() if p.requires_grad]
        decay, no_decay = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        for name, group in (("decayed", decay), ("non-decayed", no_decay)):
            count = sum(p.numel() for p in group)
            print(f"num {name} parameter tensors: {len(group)}, with {count:,} parameters")
        fused = device_type in ("cuda", "cpu")  # exact on both, and several times faster
        print(f"using fused AdamW: {fused}")
        names = {p: name for name, p in self.named_parameters()}
        how = dict(lr=learning_rate, betas=betas, fused=fused or None)
        return optim.CheckedAdamW(groups, names, **how)

    def estimate_mfu(
        self, fwdbwd_per_iter: int, dt: float, peak_flops: float | None = None
    ) -> float:
        """Model FLOP/s over peak FLOP/s, for `fwdbwd_per_iter` sequences of block_size in dt
        seconds.

        FLOPs per token as PaLM counts them (arXiv 2204.02311, appendix B): 6N + 12*L*H*Q*T.
        `peak_flops` None is the dense bf16 peak of the model's device, NaN if that is unknown;
        nanoGPT's number is the one for 312e12, an A100.
        """
        cfg = self.config
        L, H, Q, T = cfg.n_layer, cfg.n_head, cfg.n_embd // cfg.n_head, cfg.block_size
        flops = (6 * self.get_num_params() + 12 * L * H * Q * T) * T * fwdbwd_per_iter
        if peak_flops is None:
            peak_flops = devices.peak_flops(self.lm_head.weight.device)
        return flops / dt / peak_flops

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
    ) -> Tensor:
        """idx (B, T) with up to `max_new_tokens` sampled ids appended.

        temperature 0 is argmax. `top_k` keeps ties, `top_p` the smallest set of ids of that
        probability. `stop_token` ends a row, which is filled up with it; the batch ends when every
        row has. Fills a key-value cache up to block_size; past it the window moves and is computed
        anew, as in nanoGPT.
        """
        how = temperature, top_k, top_p, stop_token
        return torch.cat([idx, *self.generate_stream(idx, max_new_tokens, *how)], dim=1)

    def generate_stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, one (B, 1) column of new ids at a time."""
        checks.check_tokens(idx, None, next(self.parameters()))
        how = sampling.Sampling(temperature, top_k, top_p)
        cacheable = _forwards_untouched(self)
        return sampling.stream(self, idx, max_new_tokens, how, stop_token, cacheable)


FORWARDS |= {kind: kind.forward for kind in (LayerNorm, CausalSelfAttention, MLP, Block, GPT)}


def _forwards_untouched(model: GPT) -> bool:
    """Whether a decoding loop may stand in for GPT's, Block's and CausalSelfAttention's forward."""
    blocks = model.transformer.h
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    draws = any(m.training and m.p > 0 for m in dropouts)  # a mask for every position, each time
    draws = draws or any(block.attn.training and block.attn.dropout > 0 for block in blocks)
    return (
        not draws
        and untouched(model, GPT)
        and untouched(model.transformer.drop, nn.Dropout)
        and all(untouched(block, Block) for block in blocks)
        and all(untouched(block.attn, CausalSelfAttention) for block in blocks)
        and all(untouched(block.attn.resid_dropout, nn.Dropout) for block in blocks)
    )
