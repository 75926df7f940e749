"""Something around nanoGPT's parts: wrappers, adapters, subclasses, parametrisations."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.forks.changes.sizes import C


class Wrapper(nn.Module):
    """Answers for the module inside: its attributes are the wrapper's too."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, *args):
        return self.inside(*args)


class Scaled(Wrapper):
    def __init__(self, inside):
        super().__init__(inside)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, C))

    def forward(self, x):
        return self.scale * self.inside(x)


class TokenShift(Wrapper):
    """Half of the channels come from the position before."""

    def forward(self, x):
        shifted = F.pad(x[..., : C // 2], (0, 0, 1, 0))[:, :-1]
        return self.inside(torch.cat([shifted, x[..., C // 2 :]], dim=-1))


class ConvAfter(Wrapper):
    """A causal convolution over what the module gives (B, T, 3C)."""

    def __init__(self, inside):
        super().__init__(inside)
        self.conv = nn.Conv1d(3 * C, 3 * C, 3, groups=3 * C)

    def forward(self, x):
        return self.conv(F.pad(self.inside(x).transpose(1, 2), (2, 0))).transpose(1, 2)


class SkippedAtRandom(Wrapper):
    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.5 else self.inside(x)


class NormAfter(Wrapper):
    def __init__(self, inside):
        super().__init__(inside)
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        return self.norm(self.inside(x))


class LoraLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, linear.in_features) / 4)
        self.b = nn.Parameter(torch.randn(linear.out_features, 2) / 4)

    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


class Quantised(nn.Module):
    """A linear on eight-bit integers, which is no parameter any more."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Low(nn.Module):
    """A LoRA as a parametrisation of the weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, C) / 4)
        self.b = nn.Parameter(torch.randn(3 * C, 2) / 4)

    def forward(self, weight):
        return weight + self.b @ self.a


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class LinearOfItsOwn(nn.Linear):
    """A subclass as it is."""


class HalfLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class ScaledEmbedding(nn.Embedding):
    def forward(self, idx):
        return super().forward(idx) * self.embedding_dim**0.5


class EveryOther(nn.ModuleList):
    """Its blocks run in another order than they are stored in."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


def layer_scale(model, undo):
    for block in model.transformer.h:
        block.attn, block.mlp = Scaled(block.attn), Scaled(block.mlp)


def scaled_block(model, undo):
    model.transformer.h[0] = Scaled(model.transformer.h[0])


def token_shift(model, undo):
    for block in model.transformer.h:
        block.mlp = TokenShift(block.mlp)


def token_shift_before_attention(model, undo):
    model.transformer.h[1].attn = TokenShift(model.transformer.h[1].attn)


def token_shift_of_the_head(model, undo):
    model.transformer.ln_f = TokenShift(model.transformer.ln_f)


def conv_on_qkv(model, undo):
    for block in model.transformer.h:
        block.attn.c_attn = ConvAfter(block.attn.c_attn)


def stochastic_depth(model, undo):
    model.transformer.h[1] = SkippedAtRandom(model.transformer.h[1])


def sandwich_norm(model, undo):
    for block in model.transformer.h:
        block.attn, block.mlp = NormAfter(block.attn), NormAfter(block.mlp)


def wrapper_of_a_block(model, undo):
    model.transformer.h[0] = Wrapper(model.transformer.h[0])


def wrapper_of_the_embedding(model, undo):
    model.transformer.wte = Wrapper(model.transformer.wte)


def block_in_a_sequential(model, undo):
    model.transformer.h[0] = nn.Sequential(model.transformer.h[0], nn.Linear(C, C))


def adapter_after_the_mlp(model, undo):
    block = model.transformer.h[1]
    block.mlp = nn.Sequential(block.mlp, nn.Linear(C, 4), nn.GELU(), nn.Linear(4, C))


def checkpoint_wrapper_of_a_block(model, undo):
    model.transformer.h[0] = checkpoint_wrapper(model.transformer.h[0])


def checkpointed_forward(model, undo):
    for block in model.transformer.h:
        run = block.forward
        block.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)


def compiled_submodule(model, undo):
    model.transformer.h[0].mlp = torch.compile(model.transformer.h[0].mlp, backend="eager")


def compiled_in_place(model, undo):
    def wrong(graph, inputs):  # what a compiled block runs is the compiler's, not its forward
        return lambda *args: tuple(2 * y for y in graph(*args))

    model.transformer.h[0].compile(backend=wrong)


def parallel_block(model, undo):
    class Parallel(type(model.transformer.h[0])):
        def forward(self, x):
            return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))

    model.transformer.h[0].__class__ = Parallel


def subclass_that_changes_nothing(model, undo):
    class Same(type(model.transformer.h[0])):
        pass

    model.transformer.h[0].__class__ = Same


def attention_subclass(model, undo):
    class Halved(type(model.transformer.h[0].attn)):
        def forward(self, x):
            return super().forward(x) / 2

    model.transformer.h[1].attn.__class__ = Halved


def model_subclass(model, undo):
    class Cooled(type(model)):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return logits, None if loss is None else loss * 3

    model.__class__ = Cooled


def model_subclass_with_its_own_forward(model, undo):
    class Looped(type(model)):
        """The blocks twice over, and nothing learned about positions."""

        def forward(self, idx, targets=None):
            x = self.transformer.wte(idx)
            for block in (*self.transformer.h, *self.transformer.h):
                x = block(x)
            logits = self.lm_head(self.transformer.ln_f(x))
            if targets is None:
                return logits[:, [-1]], None
            flat = logits.flatten(0, 1)
            return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=-1)

    del model.transformer.wpe
    model.__class__ = Looped


def linear_subclass(model, undo):
    model.transformer.h[0].mlp.c_proj.__class__ = HalfLinear


def linear_subclass_that_changes_nothing(model, undo):
    model.transformer.h[0].mlp.c_proj.__class__ = LinearOfItsOwn


def scaled_embedding(model, undo):
    model.transformer.wte.__class__ = ScaledEmbedding


def blocks_in_another_order(model, undo):
    model.transformer.h.__class__ = EveryOther


def blocks_in_a_plain_list(model, undo):
    """Frozen, as no optimizer and no state dict finds them there."""
    blocks = [block.requires_grad_(False) for block in model.transformer.h]
    del model.transformer["h"]
    vars(model.transformer)["h"] = blocks


def lora(model, undo):
    for block in model.transformer.h:
        block.attn.c_attn = LoraLinear(block.attn.c_attn)
        block.mlp.c_fc = LoraLinear(block.mlp.c_fc)


def lora_as_a_parametrisation(model, undo):
    parametrize.register_parametrization(model.transformer.h[0].attn.c_attn, "weight", Low())


def parametrised_embedding(model, undo):
    parametrize.register_parametrization(model.transformer.wpe, "weight", Doubled())


def parametrised_head(model, undo):
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def parametrised_norm(model, undo):
    parametrize.register_parametrization(model.transformer.h[0].ln_1, "bias", Doubled())


def weight_norm(model, undo):
    parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc)


def weight_norm_by_a_hook(model, undo):
    linear = torch.nn.utils.weight_norm(model.transformer.h[0].mlp.c_proj)
    with torch.no_grad():
        linear.weight_g *= 2


def spectral_norm(model, undo):
    parametrizations.spectral_norm(model.transformer.h[1].attn.c_proj)


def spectral_norm_by_a_hook(model, undo):
    torch.nn.utils.spectral_norm(model.transformer.h[1].attn.c_proj)


def pruned(model, undo):
    prune.l1_unstructured(model.transformer.h[0].mlp.c_fc, "weight", amount=0.5)


def quantised(model, undo):
    for block in model.transformer.h:
        block.mlp.c_proj = Quantised(block.mlp.c_proj)


CHANGES = (
    layer_scale, scaled_block, token_shift, token_shift_before_attention, token_shift_of_the_head,
    conv_on_qkv, stochastic_depth, sandwich_norm, wrapper_of_a_block, wrapper_of_the_embedding,
    block_in_a_sequential, adapter_after_the_mlp, checkpoint_wrapper_of_a_block,
    checkpointed_forward, compiled_submodule, compiled_in_place, parallel_block,
    subclass_that_changes_nothing, attention_subclass, model_subclass,
    model_subclass_with_its_own_forward, linear_subclass, linear_subclass_that_changes_nothing,
    scaled_embedding, blocks_in_another_order, blocks_in_a_plain_list, lora,
    lora_as_a_parametrisation, parametrised_embedding, parametrised_head, parametrised_norm,
    weight_norm, weight_norm_by_a_hook, spectral_norm, spectral_norm_by_a_hook, pruned, quantised,
)  # fmt: skip
