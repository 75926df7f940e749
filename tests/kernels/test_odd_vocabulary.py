"""Logits of a vocabulary that is no multiple of 64, in rows that are a little further apart."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig, linear_cross_entropy, reference, use_backend
from fastgpt.fused import launchers
from fastgpt.linear_cross_entropy import mean_loss, padded_linear
from tests.close import DEVICE, assert_as_accurate, randn

MODES = ["triton"] + ["auto"] * (DEVICE == "cpu")
B, T, C = 2, 11, 32


@pytest.fixture(autouse=True)
def padded(monkeypatch):
    """As on a GPU, and what lies between the rows is NaN."""
    monkeypatch.setitem(linear_cross_entropy.ROW_MULTIPLE, DEVICE, 64)
    empty = torch.Tensor.new_empty_strided

    def poisoned(x, shape, strides):
        made = empty(x, shape, strides)
        size = made.untyped_storage().nbytes() // made.element_size()
        made.as_strided((size,), (1,)).fill_(torch.nan)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poisoned)


def launchers_for(mode, x):
    maker = launchers.of_kernels if mode == "triton" else launchers.of_aten
    with use_backend(mode):
        return maker.launchers(x.new_empty(1, T, 3 * C), 2, 0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("V", [1, 63, 65, 127])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_the_loss_alone(monkeypatch, mode, V, chunked, dtype):
    if chunked:
        monkeypatch.setitem(linear_cross_entropy.CHUNKS, DEVICE, (1, 16))
    targets = torch.randint(V, (37,), device=DEVICE)
    targets[::5] = -1

    def ours(x, weight):
        in_place = launchers_for(mode, x).cross_entropy_
        return mean_loss(in_place, x, weight, weight.detach(), targets, -1)

    def theirs(x, weight):
        return reference.linear_cross_entropy(x, weight, targets)

    given = randn(37, C, dtype=dtype), randn(V, C, dtype=dtype, scale=C**-0.5)
    grads = [torch.tensor(1.0, device=DEVICE)]
    assert_as_accurate(ours, theirs, *given, grads=grads, budget=2.0)


@pytest.mark.parametrize("V", [1, 63, 65, 127])
def test_logits(V, dtype):
    strides = []

    def ours(x, w):
        logits = padded_linear(x, w, w.detach())
        strides.append(logits.stride())
        return logits

    def theirs(x, w):
        return F.linear(x, w)

    given = randn(B, T, C, dtype=dtype), randn(V, C, dtype=dtype, scale=C**-0.5)
    assert_as_accurate(ours, theirs, *given, grads=[randn(B, T, V, dtype=dtype)])
    row = -(-V // 64) * 64
    assert strides[0] == (T * row, row, 1)


def model(V, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=C, vocab_size=V, block_size=T)
    return GPT(GPTConfig(**sizes)).to(DEVICE, dtype)


def outcome(gpt, mode):
    """Logits, loss and gradients, of a loss that reads the logits once more."""
    V = gpt.config.vocab_size
    idx = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with use_backend(mode):
        logits, loss = gpt(idx[:, :-1], idx[:, 1:])
        kept = logits.detach().clone()
        (loss + 1e-3 * logits.view(-1, V).square().mean()).backward()
    return [kept, loss.detach(), *(p.grad for p in gpt.parameters())]


@pytest.mark.parametrize("mode", MODES)
def test_a_model_gives_the_logits_it_gave(mode):
    ours, exact = outcome(model(61), mode), outcome(model(61, torch.float64), "torch")
    assert ours[0].shape == (B, T, 61)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_their_gradient_is_padded_too(mode):
    """Of the kernels: three GEMMs of the head read or write it."""
    gpt, idx = model(61), torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    apart = []
    with use_backend(mode):
        logits, loss = gpt(idx, idx)
        logits.register_hook(lambda grad: apart.append(grad.stride(1)))
        loss.backward()
    assert logits.stride(1) == 64 and apart == [64 if mode == "triton" else 61]


def test_a_compiler_sees_nothing_of_it():
    gpt, idx = model(61), torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    logits, _ = torch.compile(gpt, fullgraph=True, backend="aot_eager")(idx, idx)
    assert logits.is_contiguous()
