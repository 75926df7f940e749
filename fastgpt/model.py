"""nanoGPT's GPT: the same names, shapes, initial bits, losses and samples, on the ops of ops.py.

Reads top-down like nanoGPT's model.py (github.com/karpathy/nanoGPT). What differs is a call to
`ops`; and one line in GPT.forward, which hands the whole of it to fused/ where the model allows
that. The modules here are what runs otherwise, and what a fork changes.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import checks, devices, init, ops, optim, reference, sampling, weights
from fastgpt.config import GPTConfig as GPTConfig
from fastgpt.config import setting
from fastgpt.decoding.draws import Sampling
from fastgpt.fused.untouched import plain_lookup, plain_matmul, remember
from fastgpt.fused.whole import fused_model


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    bias: Tensor  # (1, 1, T, T), 0 where nobody attends: what a fork registers for flash=False

    def __init__(self, config: GPTConfig):
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
        checks.check_qkv(qkv, x.size(-1), self.n_embd)
        if self.flash:
            dropout_p = self.dropout if self.training else 0.0
            y = ops.packed_causal_attention(qkv, self.n_head, dropout_p)  # (B, T, C)
        else:
            y = self._masked_attention(qkv)
        return self.resid_dropout(self.c_proj(y))

    def _masked_attention(self, qkv: Tensor) -> Tensor:
        T = qkv.size(1)
        q, k, v = reference.split_heads(qkv, self.n_head)  # (B, H, T, D)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return (att @ v).transpose(1, 2).flatten(2)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        gelu = setting(config, "gelu")
        # without arguments, as nanoGPT: a fork may have put another class there
        self.gelu = nn.GELU() if gelu == "none" else nn.GELU(approximate=gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    transformer: Any  # a ModuleDict of wte, wpe, drop, h and ln_f
    # parameter -> its values in the matmuls' dtype, where somebody keeps them: TrainStep, in a step
    matmul_copies: Mapping[Tensor, Tensor] | None = None
    overlaps = False  # weight gradients on a second stream: TrainStep's `overlap`, in a step

    def __init__(self, config: GPTConfig):
        super().__init__()
        checks.check_config(config)
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
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss of token ids idx (B, T), int64 or int32.

        Without targets: logits (B, 1, V) of the last position, and None. With targets (B, T) int64:
        logits (B, T, V), or None under `return_logits=False`, and the mean cross entropy over the
        targets other than -1, an fp32 scalar. On a GPU rows of logits may lie a bit further apart
        than V, if that is no multiple of 64.
        """
        wte = self.transformer.wte
        checks.check_tokens(idx, self.config.block_size, wte if plain_lookup(wte) else None)
        if targets is None:
            checks.check_last_position(idx)
        fused = fused_model(self, idx)
        if fused and fused.head_is_outside(targets):  # a break further down would make two graphs
            from fastgpt.fused.eager_head import head_of_return_logits_eager

            return head_of_return_logits_eager(self, idx, *fused.hidden(idx), targets)
        if fused:
            return fused.forward(idx, targets)

        pos = torch.arange(idx.size(1), device=idx.device)  # (T,)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe(pos)  # (T, C)
        x = self.transformer.drop(tok_emb + pos_emb)
        recompute = setting(self.config, "checkpoint_blocks") and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x = self.transformer.ln_f(x)

        if targets is None:  # only the last position's; a list, to keep the time dimension
            return self.lm_head(x[:, [-1], :]), None
        targets, head = targets.reshape(-1), self.lm_head
        returned = setting(self.config, "return_logits")
        if not returned and plain_matmul(head):
            return None, ops.linear_cross_entropy(x.flatten(0, 1), head.weight, targets)
        logits = head(x)
        loss = ops.cross_entropy(logits.view(-1, logits.size(-1)), targets, ignore_index=-1)
        return (logits if returned else None), loss

    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first `block_size` positions of a checkpoint with longer contexts."""
        if not 0 < block_size <= self.config.block_size:
            limit = self.config.block_size
            raise ValueError(f"cannot crop to block_size={block_size}; use 1 to {limit}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
        for block in self.transformer.h:
            if hasattr(block.attn, "bias"):  # a fork's causal mask
                block.attn.bias = block.attn.bias[:, :, :block_size, :block_size]

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """GPT-2 with OpenAI's weights, through Hugging Face: gpt2, gpt2-medium, gpt2-large,
        gpt2-xl; or the GPT-2 in a local folder of Hugging Face's format.

        `override_args` may set dropout, gelu, return_logits and checkpoint_blocks. As in nanoGPT
        the GELU stays exact; dict(gelu="tanh") gives what the weights were trained with.
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
        own = torch.optim.AdamW is optim.PYTORCHS  # or a fork's, called as nanoGPT calls it
        real = all(p.is_floating_point() for p in params)
        fused = device_type in ("cuda", "cpu") and real  # exact on both, and several times faster
        if not own:
            known = "fused" in inspect.signature(torch.optim.AdamW).parameters
            fused = known and device_type == "cuda"
        print(f"using fused AdamW: {fused}")
        how: dict[str, Any] = dict(lr=learning_rate, betas=betas)
        if not own:
            return torch.optim.AdamW(groups, **how | ({"fused": True} if fused else {}))
        names = {p: name for name, p in self.named_parameters()}
        return optim.CheckedAdamW(groups, names, fused=fused or None, **how)

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
            peak_flops = devices.peak_flops(next(self.parameters()).device)
        return flops / dt / peak_flops

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float | Tensor = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        dtype: torch.dtype | None = None,
        lengths: Tensor | None = None,
        prompt_lookup: int | sampling.PromptLookup | None = None,
    ) -> Tensor:
        """idx (B, T) with up to `max_new_tokens` sampled ids appended.

        temperature 0 is argmax, inf draws evenly, a tensor (B, 1) is one for each row. `top_k`
        keeps ties, `top_p` the smallest set of ids of that probability. `stop_token` ends a row,
        which is filled up with it; the batch ends when every row has. `dtype` is of the weights as
        they are read: float32, bfloat16, float16, or int8 with a scale for each row, by default the
        model's or autocast's. `lengths` (B,) is for prompts of unequal length: row b's are its last
        lengths[b] ids, and what stands before them changes nothing. `prompt_lookup`, for B = 1, is
        how many ids a step guesses from what the text repeats: the same tokens in fewer steps,
        however they are chosen. (On a CPU with a C compiler the logits have the same bits;
        elsewhere their rounding depends on how many ids a step computes, which can decide between
        nearly equal ones.) A PromptLookup counts the guesses. Fills a key-value cache up to
        block_size; past it the window moves and is computed anew, as in nanoGPT.
        """
        how = Sampling(temperature, top_k, top_p)
        args = idx, max_new_tokens, how, stop_token, dtype, lengths, prompt_lookup
        new = self._sample(*args, watched=False)
        return torch.cat([idx, *new], dim=1)

    def generate_stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float | Tensor = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        dtype: torch.dtype | None = None,
        lengths: Tensor | None = None,
        prompt_lookup: int | sampling.PromptLookup | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, one (B, 1) column of new ids at a time: one for each row."""
        how = Sampling(temperature, top_k, top_p)
        args = idx, max_new_tokens, how, stop_token, dtype, lengths, prompt_lookup
        return self._sample(*args)

    def _sample(
        self,
        idx: Tensor,
        max_new_tokens: int,
        how: Sampling,
        stop_token: int | None,
        dtype: torch.dtype | None,
        lengths: Tensor | None,
        prompt_lookup: int | sampling.PromptLookup | None,
        watched: bool = True,
    ) -> Iterator[Tensor]:
        table = getattr(getattr(self, "transformer", None), "wte", None)  # a subclass may have none
        wte = table if plain_lookup(table) else None
        checks.check_tokens(idx, None, wte)
        checks.check_prompt(idx, wte)
        if count := checks.checked_count(max_new_tokens):
            checks.check_last_position(idx)
        checks.check_stop_token(stop_token, wte)
        checks.check_decoding_dtype(dtype)
        own = checks.check_lengths(lengths, idx)
        lookup = sampling.prompt_lookup(prompt_lookup, rows=idx.size(0))
        args = idx, count, how, stop_token, dtype, own, watched, lookup
        return sampling.stream(self, *args)


remember(LayerNorm, CausalSelfAttention, MLP, Block, GPT)
