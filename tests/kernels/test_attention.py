"""Causal attention, separate and packed, against float64; dropout against its own mask."""

import functools
import math

import pytest
import torch

from fastgpt import ops, reference, use_backend
from fastgpt.implementations import hybrid, sdpa
from fastgpt.kernels import attention
from tests.close import DEVICE, LAYOUTS, assert_as_accurate, compare, evaluate, randn

pytestmark = pytest.mark.ops("causal_attention", "packed_causal_attention")

# B, H, T, D: T on both sides of a block's edge, D that are no power of two
SHAPES = [
    (2, 1, 37, 16),
    (1, 2, 129, 24),
    (1, 1, 128, 64),
    (1, 2, 130, 80),
    (2, 2, 17, 25),
    (1, 1, 1, 16),
]
WIDE = [(1, 1, 65, 96), (1, 1, 70, 128), (1, 1, 40, 200), (1, 1, 40, 256)]


def qkv_of(B, H, T, D, dtype=torch.float32):
    return [randn(B, H, T, D, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("B, H, T, D", SHAPES + WIDE)
def test_causal_attention(B, H, T, D, dtype):
    if DEVICE == "cuda" and dtype == torch.float32 and D > 100:
        pytest.skip("takes minutes to compile off the tensor cores; the interpreter runs it")
    grads = [randn(B, H, T, D, dtype=dtype)]
    args = qkv_of(B, H, T, D, dtype)
    assert_as_accurate(ops.causal_attention, reference.causal_attention, *args, grads=grads)


@pytest.mark.parametrize("B, H, T, D", SHAPES)
def test_packed(B, H, T, D, dtype):
    qkv, grads = randn(B, T, 3 * H * D, dtype=dtype), [randn(B, T, H * D, dtype=dtype)]
    ours = functools.partial(ops.packed_causal_attention, n_head=H)
    ref = functools.partial(reference.packed_causal_attention, n_head=H)
    assert_as_accurate(ours, ref, qkv, grads=grads)


def test_sums_are_kept_in_fp32():
    """One large term, then hundreds too small to move a sum in fp16 one by one.

    Every query weighs the first key by 1 and each later one by exp(-12).
    """
    q, k = torch.zeros(2, 1, 1, 330, 16, device=DEVICE, dtype=torch.float16)
    q[..., 0], k[:, :, 0, 0] = 8, 6
    v, do = torch.ones_like(q), torch.full_like(q, 4e-4)
    do[:, :, :64] = 1  # dv of the first key is the sum of do
    for found in compare(
        ops.causal_attention, reference.causal_attention, q, k, v, grads=[do], eager=False
    ):
        if found.what in ("output", "gradient of v"):  # those of q and k cancel to 0
            found.assert_allowed()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, grad_layout):
    args = [LAYOUTS[layout](t) for t in qkv_of(2, 2, 19, 24)]
    grads = [LAYOUTS[grad_layout](randn(2, 2, 19, 24))]
    assert_as_accurate(ops.causal_attention, reference.causal_attention, *args, grads=grads)
    qkv, grads = LAYOUTS[layout](randn(2, 19, 144)), [LAYOUTS[grad_layout](randn(2, 19, 48))]
    ours = functools.partial(ops.packed_causal_attention, n_head=2)
    ref = functools.partial(reference.packed_causal_attention, n_head=2)
    assert_as_accurate(ours, ref, qkv, grads=grads)


def test_every_tensor_in_its_own_layout():
    shape = (2, 2, 70, 24)
    q, k, v, do = (
        LAYOUTS[layout](randn(*shape)) for layout in ("contiguous", "sliced", "strided", "offset")
    )
    assert_as_accurate(ops.causal_attention, reference.causal_attention, q, k, v, grads=[do])


def forward_in_pytorch(qkv, n_head, dropout_p):
    """As cuDNN's: y, and log-sum-exp (B, H, T, 1) as the first of the state."""
    q, k, _ = reference.split_heads(qkv, n_head)
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], device=DEVICE).triu(1).bool()
    lse = scores.masked_fill(hidden, -math.inf).logsumexp(-1, keepdim=True)
    return reference.packed_causal_attention(qkv, n_head), (lse, None, None)


def test_hybrid(dtype, monkeypatch):
    """Our backward after another forward; where that would be slower, cuDNN's."""
    H, D = 3, 32
    qkv, dy = randn(2, 37, 3 * H * D, dtype=dtype), randn(2, 37, H * D, dtype=dtype)
    ours, ref = (
        functools.partial(module.packed_causal_attention, n_head=H)
        for module in (hybrid, reference)
    )
    monkeypatch.setattr(hybrid, "packed_forward", forward_in_pytorch)
    assert_as_accurate(ours, ref, qkv, grads=[dy])
    monkeypatch.setattr(sdpa.cudnn, "packed_backward", lambda dy, qkv, *_: torch.full_like(qkv, 7))
    monkeypatch.setitem(hybrid.OURS_UP_TO, D, 36)
    _, (dqkv,) = evaluate(ours, [qkv], [dy], None)
    assert (dqkv == 7).all()
    assert "dropout" in hybrid.unsupported((qkv,), D, 0.1)


def test_scale():
    args, grads = qkv_of(1, 2, 37, 16), [randn(1, 2, 37, 16)]
    ours = functools.partial(ops.causal_attention, scale=0.7)
    ref = functools.partial(reference.causal_attention, scale=0.7)
    assert_as_accurate(ours, ref, *args, grads=grads)


def test_large_scores(dtype):
    """Scores of some hundreds overflow exp without the running maximum.

    One rounding of a score of 400 is up to 400 roundings of its probability, hence the budget.
    """
    q, k, v = qkv_of(1, 1, 70, 16, dtype)
    args = (q * 20, k * 5, v)
    assert_as_accurate(
        ops.causal_attention,
        reference.causal_attention,
        *args,
        grads=[randn(1, 1, 70, 16, dtype=dtype)],
        budget=8,
    )


def test_future_never_leaks():
    """Whatever stands in later tokens leaves earlier outputs bitwise unchanged."""
    q, k, v = qkv_of(1, 2, 70, 16)
    with use_backend("triton"):
        clean = ops.causal_attention(q, k, v)
        q[:, :, 33:] = k[:, :, 33:] = float("nan")
        v[:, :, 33:] = 1e30  # not NaN: eager's 0 * NaN leaks backwards too
        poisoned = ops.causal_attention(q, k, v)
    assert torch.equal(poisoned[:, :, :33], clean[:, :, :33])
    assert poisoned[:, :, 33:].isnan().all()  # and a NaN is not swallowed


def explicit_attention(q, k, v, kept, p):
    """The definition with an explicit dropout mask."""
    T = q.shape[-2]
    future = torch.ones(T, T, device=q.device, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(future, -float("inf"))
    return (scores.softmax(-1) * kept.to(q.dtype) / (1 - p)) @ v


@pytest.mark.parametrize("B, H, T, D", [(2, 2, 37, 16), (1, 2, 129, 24)])
def test_dropout_replays_from_its_mask(B, H, T, D):
    p, args, grads = 0.3, qkv_of(B, H, T, D), [randn(B, H, T, D)]
    seed = torch.tensor([1234567890123], device=DEVICE)
    kept = attention.dropout_mask(seed, B, H, T, p)
    scale = D**-0.5
    ours = evaluate(
        lambda q, k, v: attention._Attention.apply(q, k, v, seed, scale, p), args, grads, None
    )
    ref = functools.partial(explicit_attention, kept=kept, p=p)
    truth = evaluate(ref, args, grads, torch.float64)
    for a, t in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        assert (a.double() - t).abs().max() < 1e-5 * t.abs().max()


def test_dropout_mask_is_what_it_claims():
    seeds = [torch.tensor([s], device=DEVICE) for s in (1, 2, 1 + 2**32)]
    masks = [attention.dropout_mask(seed, 2, 3, 128, 0.25) for seed in seeds]
    n = masks[0].numel()
    for mask in masks:
        # a binomial share is within 5 of its standard deviations of 1 - p, but for one run in 1.7
        # million
        assert abs(mask.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / n) ** 0.5
        heads = mask.flatten(0, 1).flatten(1).double()
        correlation = torch.corrcoef(torch.cat([heads, heads.roll(1, 1)])) - torch.eye(
            12, device=DEVICE
        )
        assert correlation.abs().max() < 6 / heads.shape[1] ** 0.5
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (
            masks[a] != masks[b]
        ).double().mean() > 0.3  # 2 * p * (1 - p) = 0.375 of them differ


def test_dropout_follows_the_generator():
    q, k, v = qkv_of(1, 2, 37, 16)
    with use_backend("triton"):
        torch.manual_seed(1)
        first, second = (ops.causal_attention(q, k, v, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(1)
        again = ops.causal_attention(q, k, v, dropout_p=0.5)
        assert torch.equal(first, again) and not torch.equal(first, second)
        state = torch.get_rng_state()
        ops.causal_attention(q, k, v)
        assert torch.equal(state, torch.get_rng_state())  # no dropout, no draw
        assert not ops.causal_attention(q, k, v, dropout_p=1.0).any()


def test_refuses_what_it_cannot_do():
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="head dim 8 is not within 16 to 256"):
            ops.causal_attention(*qkv_of(1, 1, 4, 8))
        with pytest.raises(RuntimeError, match="differ in dtype or shape"):
            q, k, v = qkv_of(1, 1, 4, 16)
            ops.causal_attention(q, k[:, :, :3], v[:, :, :3])


def test_more_heads_than_a_grid_axis():
    """B * H = 70,000 would not fit a y or z axis of a CUDA grid; ours is one-dimensional."""
    if DEVICE == "cpu":
        pytest.skip("70,000 interpreted programs take minutes; runs on a GPU")
    q, k, v = qkv_of(7000, 10, 16, 16, torch.float16)
    assert_as_accurate(
        ops.causal_attention, reference.causal_attention, q, k, v, grads=[torch.randn_like(q)]
    )
