"""Other parts in place of nanoGPT's: attention, MLP, norms, embeddings, head."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.forks.changes.sizes import C, V


class Attention(nn.Module):
    """nanoGPT's attention on its weights; what subclasses do to q, k and v is the change."""

    def __init__(self, attn):
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = attn.c_attn, attn.c_proj, attn.n_head

    def forward(self, x):
        B, T, C = x.shape
        split = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in split)
        return self.c_proj(self.attend(q, k, v).transpose(1, 2).reshape(B, T, C))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Rope(Attention):
    def attend(self, q, k, v):
        return super().attend(self.rotated(q), self.rotated(k), v)

    def rotated(self, x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / half)
        a, b = x.split(half, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Alibi(Attention):
    def attend(self, q, k, v):
        T, slopes = q.shape[-2], 2.0 ** -torch.arange(1, self.n_head + 1)
        distance = torch.arange(T) - torch.arange(T)[:, None]
        bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Window(Attention):
    def attend(self, q, k, v):
        T = q.shape[-2]
        seen = torch.ones(T, T, dtype=torch.bool).tril().triu(-2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class QkNorm(Attention):
    def attend(self, q, k, v):
        return super().attend(F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1), v)


class RMSNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class NormOfEps(nn.Module):
    """LayerNorm with another eps, on the weights of nanoGPT's."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 0.1)


class SwiGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(C, 24, bias=False), nn.Linear(C, 24, bias=False)
        self.c_proj = nn.Linear(24, C, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.router, self.experts = nn.Linear(C, 2), nn.ModuleList([mlp, SwiGlu()])

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return sum(weights[..., [i]] * expert(x) for i, expert in enumerate(self.experts))


class ReluSquared(nn.Module):
    def forward(self, x):
        return x.relu().square()


class Bigrams(nn.Module):
    """A token embedding that also looks at the token before."""

    def __init__(self, wte):
        super().__init__()
        self.wte, self.before = wte, nn.Embedding(wte.num_embeddings, wte.embedding_dim)

    def forward(self, idx):
        return self.wte(idx) + F.pad(self.before(idx), (0, 0, 1, 0))[:, :-1]


class Sinusoids(nn.Module):
    def __init__(self, wpe):
        super().__init__()
        angle = torch.arange(wpe.num_embeddings)[:, None] / 10 ** torch.linspace(0, 1, C)
        self.register_buffer("table", angle.sin())

    def forward(self, pos):
        return self.table[pos]


class NoPositions(nn.Module):
    def forward(self, pos):
        return 0.0


class CappedHead(nn.Linear):
    def forward(self, x):
        return 2 * torch.tanh(super().forward(x) / 2)


def rope(model, undo):
    for block in model.transformer.h:
        block.attn = Rope(block.attn)
    model.transformer.wpe = NoPositions()


def alibi_in_one_layer(model, undo):
    model.transformer.h[1].attn = Alibi(model.transformer.h[1].attn)


def sliding_window(model, undo):
    for block in model.transformer.h:
        block.attn = Window(block.attn)


def qk_norm(model, undo):
    model.transformer.h[0].attn = QkNorm(model.transformer.h[0].attn)


def rms_norm(model, undo):
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = RMSNorm(block.ln_1), RMSNorm(block.ln_2)
    model.transformer.ln_f = RMSNorm(model.transformer.ln_f)


def other_eps_in_ln_2(model, undo):
    model.transformer.h[0].ln_2 = NormOfEps(model.transformer.h[0].ln_2)


def torchs_layer_norm_as_ln_f(model, undo):
    norm = nn.LayerNorm(C, eps=0.1)
    norm.load_state_dict(model.transformer.ln_f.state_dict())
    model.transformer.ln_f = norm


def no_final_norm(model, undo):
    model.transformer.ln_f = nn.Identity()


def swiglu(model, undo):
    for block in model.transformer.h:
        block.mlp = SwiGlu()


def experts_in_one_layer(model, undo):
    model.transformer.h[0].mlp = Experts(model.transformer.h[0].mlp)


def relu_squared(model, undo):
    for block in model.transformer.h:
        block.mlp.gelu = ReluSquared()


def tanh_gelu(model, undo):
    for block in model.transformer.h:
        block.mlp.gelu = nn.GELU(approximate="tanh")


def tanh_gelu_in_one_layer(model, undo):
    model.transformer.h[1].mlp.gelu = nn.GELU(approximate="tanh")


def gelu_set_to_tanh(model, undo):
    model.transformer.h[1].mlp.gelu.approximate = "tanh"


def wider_mlp_in_one_layer(model, undo):
    mlp = model.transformer.h[0].mlp
    mlp.c_fc, mlp.c_proj = nn.Linear(C, 40), nn.Linear(40, C)


def no_bias_in_one_linear(model, undo):
    model.transformer.h[1].mlp.c_fc.bias = None


def no_bias_in_one_norm(model, undo):
    model.transformer.h[1].ln_2.bias = None


def no_attention_in_one_layer(model, undo):
    model.transformer.h[1].attn = nn.Identity()


def bigram_embeddings(model, undo):
    model.transformer.wte = Bigrams(model.transformer.wte)


def sinusoidal_positions(model, undo):
    model.transformer.wpe = Sinusoids(model.transformer.wpe)


def norm_after_embeddings(model, undo):
    model.transformer.drop = nn.Sequential(model.transformer.drop, nn.LayerNorm(C))


def untied_head(model, undo):
    head = model.lm_head
    head.weight = nn.Parameter(torch.randn_like(head.weight) / 4)


def head_bias(model, undo):
    model.lm_head.bias = nn.Parameter(torch.randn(V))


def capped_logits(model, undo):
    head = CappedHead(C, V, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def smaller_head(model, undo):
    model.lm_head = nn.Linear(C, V - 2, bias=False)


def two_layer_head(model, undo):
    model.lm_head = nn.Sequential(nn.Linear(C, C), nn.Tanh(), model.lm_head)


def larger_vocabulary(model, undo):
    """Rows added at the end of both, as for new special tokens; tied again."""
    rows = torch.cat([model.lm_head.weight.detach(), torch.randn(3, C) / 4])
    model.transformer.wte = nn.Embedding(V + 3, C)
    model.lm_head = nn.Linear(C, V + 3, bias=False)
    model.lm_head.weight = model.transformer.wte.weight = nn.Parameter(rows)


def larger_vocabulary_in_the_weight_alone(model, undo):
    rows = torch.cat([model.lm_head.weight.detach(), 2 * torch.randn(3, C)])
    model.lm_head.weight = model.transformer.wte.weight = nn.Parameter(rows)


def more_blocks(model, undo):
    block = type(model.transformer.h[0])(model.config)
    model.transformer.h.append(block)


def fewer_blocks(model, undo):
    model.transformer.h = model.transformer.h[:1]


def no_blocks(model, undo):
    model.transformer.h = nn.ModuleList()


def one_row_of_positions(model, undo):
    model.transformer.wpe = nn.Embedding(1, C)


def fewer_positions_than_block_size(model, undo):
    model.transformer.wpe = nn.Embedding(5, C)


def more_positions_than_block_size(model, undo):
    model.transformer.wpe = nn.Embedding(11, C)


CHANGES = (
    rope, alibi_in_one_layer, sliding_window, qk_norm, rms_norm, other_eps_in_ln_2,
    torchs_layer_norm_as_ln_f, no_final_norm, swiglu, experts_in_one_layer, relu_squared, tanh_gelu,
    tanh_gelu_in_one_layer, gelu_set_to_tanh, wider_mlp_in_one_layer, no_bias_in_one_linear,
    no_bias_in_one_norm, no_attention_in_one_layer, bigram_embeddings, sinusoidal_positions,
    norm_after_embeddings, untied_head, head_bias, capped_logits, smaller_head, two_layer_head,
    larger_vocabulary, larger_vocabulary_in_the_weight_alone, more_blocks, fewer_blocks, no_blocks,
    one_row_of_positions, fewer_positions_than_block_size,
    more_positions_than_block_size,
)  # fmt: skip
