"""Functions and classes that a script assigns, and modes that it enters."""

from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def assign(undo, owner, name, new):
    undo.enter_context(mock.patch.object(owner, name, new))


def double(function):
    """The function's result, times two."""
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def double_forward(undo, kind, name="forward"):
    before = getattr(kind, name)
    assign(undo, kind, name, lambda self, *args, **kwargs: 2 * before(self, *args, **kwargs))


def gelu_assigned(model, undo):
    assign(undo, F, "gelu", lambda x, approximate="none": x * torch.sigmoid(1.702 * x))


def layer_norm_assigned(model, undo):
    def rms_norm(x, shape, weight=None, bias=None, eps=1e-5):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    assign(undo, F, "layer_norm", rms_norm)


def linear_assigned(model, undo):
    assign(undo, F, "linear", double(F.linear))


def attention_assigned(model, undo):
    assign(undo, F, "scaled_dot_product_attention", double(F.scaled_dot_product_attention))


def attention_assigned_that_reads_its_arguments(model, undo):
    """nanoGPT passes these, whoever stands in for SDPA may read them."""
    before = F.scaled_dot_product_attention

    def capped(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert attn_mask is None and is_causal and dropout_p == 0
        return before(q * 2, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)

    assign(undo, F, "scaled_dot_product_attention", capped)


def cross_entropy_assigned(model, undo):
    before = F.cross_entropy

    def smoothed(logits, targets, ignore_index=-100):
        return before(logits, targets, ignore_index=ignore_index, label_smoothing=0.2)

    assign(undo, F, "cross_entropy", smoothed)


def embedding_assigned(model, undo):
    assign(undo, F, "embedding", double(F.embedding))


def dropout_assigned(model, undo):
    assign(undo, F, "dropout", lambda x, p=0.5, training=True, inplace=False: x.tanh())


def softmax_assigned(model, undo):
    """What generate draws from."""
    before = F.softmax
    assign(undo, F, "softmax", lambda x, dim=None: before(3 * x, dim=dim))


def multinomial_assigned(model, undo):
    assign(undo, torch, "multinomial", lambda p, num_samples: p.argmin(-1, keepdim=True))


def topk_assigned(model, undo):
    before = torch.topk
    assign(undo, torch, "topk", lambda x, k: before(x, min(3, x.shape[-1])))


def gelus_forward_assigned(model, undo):
    assign(undo, nn.GELU, "forward", lambda self, x: x.relu())


def linears_forward_assigned(model, undo):
    double_forward(undo, nn.Linear)


def embeddings_forward_assigned(model, undo):
    double_forward(undo, nn.Embedding)


def dropouts_forward_assigned(model, undo):
    assign(undo, nn.Dropout, "forward", lambda self, x: x.tanh())


def norms_forward_assigned(model, undo):
    double_forward(undo, type(model.transformer.ln_f))


def mlps_forward_assigned(model, undo):
    double_forward(undo, type(model.transformer.h[0].mlp))


def attentions_forward_assigned(model, undo):
    double_forward(undo, type(model.transformer.h[0].attn))


def blocks_forward_assigned(model, undo):
    double_forward(undo, type(model.transformer.h[0]))


def models_forward_assigned(model, undo):
    kind = type(model)
    before = kind.forward
    assign(
        undo, kind, "forward", lambda self, idx, targets=None: before(self, idx.flip(1), targets)
    )


def blocks_call_assigned(model, undo):
    double_forward(undo, type(model.transformer.h[0]), "__call__")


def linears_call_assigned(model, undo):
    double_forward(undo, nn.Linear, "__call__")


def blocks_call_impl_assigned(model, undo):
    double_forward(undo, type(model.transformer.h[0]), "_call_impl")


def every_modules_call_assigned(model, undo):
    before = nn.Module.__call__

    def call(self, *args, **kwargs):
        y = before(self, *args, **kwargs)
        return 2 * y if isinstance(self, nn.GELU) else y

    assign(undo, nn.Module, "__call__", call)


def every_modules_call_impl_assigned(model, undo):
    before = nn.Module._call_impl

    def call(self, *args, **kwargs):
        y = before(self, *args, **kwargs)
        return 2 * y if isinstance(self, nn.Linear) else y

    assign(undo, nn.Module, "_call_impl", call)
    assign(undo, nn.Module, "__call__", call)


def one_blocks_forward(model, undo):
    block = model.transformer.h[0]
    block.forward = double(block.forward)


def one_norms_forward(model, undo):
    norm = model.transformer.h[0].ln_2
    norm.forward = double(norm.forward)


def one_embeddings_forward(model, undo):
    wte = model.transformer.wte
    wte.forward = double(wte.forward)


def one_heads_forward(model, undo):
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight).tanh()


def one_models_forward(model, undo):
    forward = model.forward
    model.forward = lambda idx, targets=None: forward(idx.flip(1), targets)


def one_attentions_call_impl(model, undo):
    attn = model.transformer.h[0].attn
    attn._call_impl = double(attn._call_impl)


def own_generate(model, undo):
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        return super(type(self), self).generate(idx.flip(1), max_new_tokens, 2.0, top_k)

    model.__class__ = type("Own", (type(model),), {"generate": generate})


def generates_by_an_own_call(model, undo):
    """generate calls the model, whatever its `__call__` is."""

    def call(self, idx, targets=None):
        logits, loss = super(type(self), self).__call__(idx, targets)
        if logits is not None:
            logits = logits * torch.linspace(-1, 1, logits.shape[-1])
        return logits, loss

    model.__class__ = type("Biased", (type(model),), {"__call__": call})


class Doubling(TorchFunctionMode):
    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return 2 * y if function in self.functions else y


class DoublingBelow(TorchDispatchMode):
    def __init__(self, *ops):
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        return 2 * y if op in self.ops else y


def mode_on_gelu(model, undo):
    undo.enter_context(Doubling(F.gelu, torch._C._nn.gelu))


def mode_on_linear(model, undo):
    undo.enter_context(Doubling(F.linear))


def mode_on_attention(model, undo):
    undo.enter_context(Doubling(F.scaled_dot_product_attention))


def mode_on_cross_entropy(model, undo):
    undo.enter_context(Doubling(F.cross_entropy))


def dispatch_mode_on_gelu(model, undo):
    undo.enter_context(DoublingBelow(torch.ops.aten.gelu.default))


def dispatch_mode_on_its_gradient(model, undo):
    undo.enter_context(DoublingBelow(torch.ops.aten.gelu_backward.default))


def dispatch_mode_on_norms(model, undo):
    """Of the first result alone, the normed rows."""

    class Norms(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            y = op(*args, **(kwargs or {}))
            is_norm = op is torch.ops.aten.native_layer_norm.default
            return (2 * y[0], *y[1:]) if is_norm else y

    undo.enter_context(Norms())


def attention_held_to_math(model, undo):
    undo.enter_context(sdpa_kernel(SDPBackend.MATH))


def anomaly_mode(model, undo):
    undo.enter_context(torch.autograd.detect_anomaly(check_nan=True))


def default_dtype_of_doubles(model, undo):
    undo.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)


def bfloat16_autocast(model, undo):
    undo.enter_context(torch.autocast("cpu", torch.bfloat16))


def float16_autocast(model, undo):
    undo.enter_context(torch.autocast("cpu", torch.float16))


def bfloat16_autocast_of_one_block(model, undo):
    block = model.transformer.h[0]
    run = block.forward

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    block.forward = forward


CHANGES = (
    gelu_assigned, layer_norm_assigned, linear_assigned, attention_assigned,
    attention_assigned_that_reads_its_arguments, cross_entropy_assigned, embedding_assigned,
    dropout_assigned, softmax_assigned, multinomial_assigned, topk_assigned, gelus_forward_assigned,
    linears_forward_assigned, embeddings_forward_assigned, dropouts_forward_assigned,
    norms_forward_assigned, mlps_forward_assigned, attentions_forward_assigned,
    blocks_forward_assigned, models_forward_assigned, blocks_call_assigned, linears_call_assigned,
    blocks_call_impl_assigned, every_modules_call_assigned, every_modules_call_impl_assigned,
    one_blocks_forward, one_norms_forward, one_embeddings_forward, one_heads_forward,
    one_models_forward, one_attentions_call_impl, own_generate, generates_by_an_own_call,
    mode_on_gelu, mode_on_linear, mode_on_attention, mode_on_cross_entropy, dispatch_mode_on_gelu,
    dispatch_mode_on_its_gradient, dispatch_mode_on_norms, attention_held_to_math, anomaly_mode,
    default_dtype_of_doubles, bfloat16_autocast, float16_autocast, bfloat16_autocast_of_one_block,
)  # fmt: skip
