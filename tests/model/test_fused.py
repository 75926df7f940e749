"""The fused path: its units against float64, the model on it, and when it steps aside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import GPT, GPTConfig, linear_cross_entropy, reference, use_backend
from fastgpt.fused import block, embedding, launchers
from fastgpt.linear_cross_entropy import mean_loss
from tests.close import DEVICE, assert_as_accurate, randn

MADE_OF = ["triton"] + ["aten"] * (DEVICE == "cpu")
B, T, H, C, V = 2, 19, 3, 48, 61
SHAPES = ((C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (4 * C, C), (4 * C,),
          (C, 4 * C), (C,))  # fmt: skip


def launchers_for(made_of: str, x: torch.Tensor) -> launchers.Launchers:
    maker = launchers.of_kernels if made_of == "triton" else launchers.of_aten
    with use_backend("triton" if made_of == "triton" else "auto"):
        qkv = x.new_empty(1, T, 3 * C)
        assert maker.unsupported((qkv,), H, 0.0) is None
        return maker.launchers(qkv, H, 0.0)


def weights(bias: bool, dtype: torch.dtype) -> list[torch.Tensor | None]:
    made = [randn(*shape, dtype=dtype, scale=shape[-1] ** -0.5) for shape in SHAPES]
    return [t if bias or i % 2 == 0 else None for i, t in enumerate(made)]


def block_in_pytorch(tanh, delta, x, *weights):
    w = block.Weights(*weights)
    s1 = x if delta is None else x + delta
    qkv = F.linear(F.layer_norm(s1, (C,), w.ln_1, w.ln_1_bias), w.qkv, w.qkv_bias)
    y = reference.packed_causal_attention(qkv, H)
    s2 = s1 + F.linear(y, w.attn_proj, w.attn_proj_bias)
    n2 = F.layer_norm(s2, (C,), w.ln_2, w.ln_2_bias)
    mlp = (w.fc, w.fc_bias, w.mlp_proj, w.mlp_proj_bias)
    return reference.mlp(n2, *mlp, "tanh" if tanh else "none"), s2


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("tanh, bias", [(False, True), (True, False)])
def test_block(made_of, first, tanh, bias, dtype):
    def ours(delta, x, *w):
        settings, w = block.Settings(H, tanh, 0.0), block.Weights(*w)
        low = block.Weights(*(t if t is None else t.detach() for t in w))
        return block.block(launchers_for(made_of, x), settings, delta, x, w, low)

    def theirs(delta, x, *w):
        return block_in_pytorch(tanh, delta, x, *w)

    delta = None if first else randn(B, T, C, dtype=dtype)
    x = randn(T, B, C, dtype=dtype).transpose(0, 1)
    grads = [randn(B, T, C, dtype=dtype), randn(B, C, T, dtype=dtype).transpose(1, 2)]
    # a block is some ten ops deep, and each rounds
    assert_as_accurate(ours, theirs, delta, x, *weights(bias, dtype), grads=grads, budget=3.0)


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_norm(made_of, first, dtype):
    def ours(delta, x, weight, bias):
        return block.norm(launchers_for(made_of, x), delta, x, weight, bias, x.dtype)

    def theirs(delta, x, weight, bias):
        return F.layer_norm(x if delta is None else x + delta, (C,), weight, bias)

    delta = None if first else randn(B, T, C, dtype=dtype)
    given = delta, randn(B, T, C, dtype=dtype), randn(C, dtype=dtype), randn(C, dtype=dtype)
    assert_as_accurate(ours, theirs, *given, grads=[randn(B, T, C, dtype=dtype)])


@pytest.mark.parametrize("made_of", MADE_OF)
def test_embedding_and_head_share_a_gradient(made_of, dtype):
    idx = torch.randint(7, (B, T), device=DEVICE)  # each id many times
    idx[0, 0] = V - 1

    def ours(wte, wpe):
        x, alias = embedding.embed(launchers_for(made_of, wte).add_rows_, idx, wte, wpe)
        return F.linear(x, alias)

    def theirs(wte, wpe):
        return F.linear(F.embedding(idx, wte) + wpe[:T], wte)

    given = randn(V, C, dtype=dtype, scale=C**-0.5), randn(T + 4, C, dtype=dtype)
    assert_as_accurate(ours, theirs, *given, grads=[randn(B, T, V, dtype=dtype)])


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0])
def test_linear_cross_entropy(monkeypatch, made_of, chunked, upstream, dtype):
    if chunked:
        monkeypatch.setitem(linear_cross_entropy.CHUNKS, DEVICE, (1, 16))
    N = 37
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[::5] = -1

    def ours(x, weight):
        in_place = launchers_for(made_of, x).cross_entropy_
        return mean_loss(in_place, x, weight, weight.detach(), targets, -1)

    def theirs(x, weight):
        logits = F.linear(x, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=-1)

    given = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype, scale=C**-0.5)
    grad = torch.tensor(upstream, device=DEVICE)
    assert_as_accurate(ours, theirs, *given, grads=[grad], budget=2.0)


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_sums_of_half_precision_gradients_neither_overflow_nor_vanish(
    monkeypatch, made_of, chunked
):
    """dw adds up rows that all pull one way; times 2^15 fp16 does not hold the sum."""
    if chunked:
        monkeypatch.setitem(linear_cross_entropy.CHUNKS, DEVICE, (1, 64))
    x = 30 + randn(200, C, dtype=torch.float16)
    weight = randn(V, C, dtype=torch.float16, scale=8 * C**-0.5)
    weight -= weight.mean(1, keepdim=True)  # or the 30 made all logits huge
    targets = torch.full((200,), 5, device=DEVICE)

    def ours(x, weight):
        in_place = launchers_for(made_of, x).cross_entropy_
        return mean_loss(in_place, x, weight, weight.detach(), targets, -1)

    def theirs(x, weight):
        return reference.linear_cross_entropy(x, weight, targets)

    grad = torch.tensor(1024.0, device=DEVICE)
    assert_as_accurate(ours, theirs, x, weight, grads=[grad], budget=2.0)


@pytest.mark.parametrize("made_of", MADE_OF)
def test_loss_of_no_counted_rows(made_of):
    x, w = randn(5, C).requires_grad_(), randn(V, C).requires_grad_()
    none = torch.full((5,), -1, device=DEVICE)
    in_place = launchers_for(made_of, x).cross_entropy_
    loss = mean_loss(in_place, x, w, w.detach(), none, -1)
    loss.backward()
    assert loss.isnan() and not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_loss_goes_backward_twice(monkeypatch, made_of, chunked, upstream):
    """What its first backward gave is the caller's, who may write to it."""
    if chunked:
        monkeypatch.setitem(linear_cross_entropy.CHUNKS, DEVICE, (1, 16))
    x, w = randn(40, C).requires_grad_(), randn(V, C).requires_grad_()
    targets = torch.randint(V, (40,), device=DEVICE)
    loss = mean_loss(launchers_for(made_of, x).cross_entropy_, x, w, w.detach(), targets, -1)
    given = torch.autograd.grad(upstream * loss, (x, w), retain_graph=True)
    first = [t.clone() for t in given]
    for t in given:
        t.zero_()
    assert all(map(torch.equal, torch.autograd.grad(upstream * loss, (x, w)), first))


def model(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = dict(n_layer=3, n_head=H, n_embd=C, vocab_size=V, block_size=T + 3)
    return GPT(GPTConfig(**sizes | changes)).to(DEVICE)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    idx = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    idx[1, 0, :4] = -1
    return idx[0], idx[1]


def loss_and_gradients(gpt: GPT, mode: str) -> list[torch.Tensor]:
    gpt.zero_grad()
    with use_backend(mode):
        loss = gpt(*batch())[1]
        loss.backward()
    return [loss.detach(), *(p.grad for p in gpt.parameters())]


def mode_of(made_of: str) -> str:
    return "triton" if made_of == "triton" else "auto"


@pytest.fixture
def blocks_run(monkeypatch):
    """A list that grows by one with every block that runs fused."""
    calls, original = [], block.block

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(block, "block", counted)
    return calls


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize(
    "changes",
    [{}, dict(bias=False), dict(return_logits=False), dict(gelu="tanh", checkpoint_blocks=True)],
    ids=str,
)
def test_model(blocks_run, made_of, changes):
    gpt = model(**changes)
    ours = [t.clone() for t in loss_and_gradients(gpt, mode_of(made_of))]
    assert len(blocks_run) == 3 * (2 if gpt.config.checkpoint_blocks else 1)
    theirs = loss_and_gradients(gpt, "torch")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("returned", [True, False], ids=["logits", "no logits"])
def test_backward_twice_and_runs_repeat_bit_by_bit(made_of, returned):
    gpt = model(return_logits=returned)
    with use_backend(mode_of(made_of)):
        loss = gpt(*batch())[1]
        first = torch.autograd.grad(loss, list(gpt.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(gpt.parameters()))
        anew = torch.autograd.grad(gpt(*batch())[1], list(gpt.parameters()))
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("made_of", MADE_OF)
def test_create_graph_is_refused(made_of):
    with use_backend(mode_of(made_of)), pytest.raises(RuntimeError, match="only once"):
        model()(*batch())[1].backward(create_graph=True)


def test_dropout_draws_its_masks_again_where_a_block_is_computed_again(blocks_run):
    stored, again = model(dropout=0.3), model(dropout=0.3, checkpoint_blocks=True)
    results = []
    for gpt in (stored, again, stored):
        torch.manual_seed(7)
        results.append([t.clone() for t in loss_and_gradients(gpt, "triton")])
    assert len(blocks_run) == 12
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    torch.manual_seed(8)
    assert loss_and_gradients(stored, "triton")[0] != results[0][0]


def test_dropout_gradient_is_the_losses_slope():
    gpt = model(dropout=0.3, n_layer=1)
    weight = gpt.transformer.h[0].mlp.c_proj.weight

    def loss(change: torch.Tensor | float) -> torch.Tensor:
        torch.manual_seed(5)  # the same masks
        with use_backend("triton"):
            weight.data += change
            value = gpt(*batch())[1]
            weight.data -= change
        return value

    (gradient,) = torch.autograd.grad(loss(0.0), weight)
    uphill = 0.05 * gradient / gradient.norm()
    slope = (loss(uphill) - loss(-uphill)) / 0.1
    torch.testing.assert_close(gradient.norm(), slope, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("frozen", ["wte", "c_attn", "ln_2"])
@pytest.mark.parametrize("made_of", MADE_OF)
def test_frozen_parameters_get_no_gradient_and_change_no_other(made_of, frozen):
    gpt, free = model(return_logits=False), model(return_logits=False)
    for name, p in gpt.named_parameters():
        p.requires_grad_(frozen not in name)
    with use_backend(mode_of(made_of)):
        for m in (gpt, free):
            m(*batch())[1].backward()
    for (name, p), q in zip(gpt.named_parameters(), free.parameters(), strict=True):
        assert (p.grad is None) if frozen in name else torch.equal(p.grad, q.grad), name


def _hook(gpt):
    gpt.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: None)


def _other_linear(gpt):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    gpt.transformer.h[1].attn.c_proj = Doubled(C, C).to(DEVICE)


def _patched_forward(gpt):
    mlp = gpt.transformer.h[1].mlp
    mlp.forward = lambda x: 2 * mlp.c_proj(mlp.gelu(mlp.c_fc(x)))


def _parametrised(gpt):
    nn.utils.parametrizations.weight_norm(gpt.transformer.h[1].attn.c_attn)


def _heads(gpt):
    gpt.transformer.h[1].attn.n_head = 1


@pytest.mark.parametrize("change", [_hook, _other_linear, _patched_forward, _parametrised, _heads])
def test_a_block_that_was_changed_runs_module_by_module(blocks_run, change):
    torch.manual_seed(0)
    gpt = model()
    change(gpt)
    ours = [t.clone() for t in loss_and_gradients(gpt, "auto")]
    if DEVICE == "cpu":
        assert len(blocks_run) == 2
    for a, b in zip(ours, loss_and_gradients(gpt, "torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_changed_head_is_called(blocks_run):
    gpt, seen = model(), []
    gpt.lm_head.register_forward_hook(lambda *_: seen.append(1))
    loss_and_gradients(gpt, "auto")
    assert seen == [1]


@pytest.mark.parametrize("mode", ["torch", "compile", "func"])
def test_elsewhere_no_block_runs_fused(blocks_run, mode):
    gpt = model()
    idx, targets = batch()
    if mode == "torch":
        loss_and_gradients(gpt, "torch")
    elif mode == "compile":
        torch.compile(gpt, backend="eager", fullgraph=True)(idx, targets)
    else:
        params = dict(gpt.named_parameters())
        loss = torch.func.grad(lambda p: torch.func.functional_call(gpt, p, (idx, targets))[1])
        assert loss(params)["transformer.ln_f.weight"].isfinite().all()
    assert not blocks_run


def test_forward_mode_differentiation_falls_back():
    gpt = model()
    idx, targets = batch()
    params = {name: p.detach() for name, p in gpt.named_parameters()}
    tangents = {name: torch.ones_like(p) for name, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):  # SDPA's others have no forward mode
        _, slope = torch.func.jvp(
            lambda p: torch.func.functional_call(gpt, p, (idx, targets))[1], (params,), (tangents,)
        )
    gradients = torch.autograd.grad(gpt(idx, targets)[1], list(gpt.parameters()))
    torch.testing.assert_close(slope, sum(g.sum() for g in gradients), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("made_of", MADE_OF)
def test_a_wrong_target_is_explained(made_of):
    gpt = model(return_logits=False)
    idx, targets = batch()
    targets[1, 2] = V
    if DEVICE == "cpu":  # on CUDA looking would wait for the device: the loss is NaN
        message = rf"Target {V} is out of bounds.*\[0, {V}\)"
        with use_backend(mode_of(made_of)), pytest.raises(IndexError, match=message):
            gpt(idx, targets)
