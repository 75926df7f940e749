"""The loss without logits accepts and refuses what the loss with them does: same numbers, same kind
of error; so do the ops, with inputs of several dtypes, as their definitions.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, ops, reference, use_backend
from tests.close import DEVICE
from tests.kernels.test_odd_tensors import SHAPES, operands

V, B, T = 23, 2, 6
TARGETS = {
    "int64": lambda t: t,
    "uint8": lambda t: t.byte(),
    "int32": lambda t: t.int(),
    "int16": lambda t: t.short(),
    "bool": lambda t: t.bool(),
    "float": lambda t: t.float(),
    "probabilities": lambda t: F.one_hot(t, V).float(),
    "shorter": lambda t: t[:, :4],
    "longer": lambda t: torch.cat([t, t], 1),
    "one row": lambda t: t[:1],
    "half as many rows": lambda t: t.flatten()[::2],
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.t(),
    "three-dimensional": lambda t: t[..., None],
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1, :1].expand(B, T),
    "all ignored": lambda t: torch.full_like(t, -1),
    "-2": lambda t: t.masked_fill(t == t.max(), -2),
    "the vocabulary's size": lambda t: t.masked_fill(t == t.max(), V),
    "huge": lambda t: t.masked_fill(t == t.max(), 2**40),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}
OUT_OF_RANGE = ("-2", "the vocabulary's size", "huge")


def model(returned: bool) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(8, V, 2, 1, 16, return_logits=returned)).to(DEVICE)


def outcome(returned: bool, targets: Tensor, frozen: bool = False) -> list[Tensor] | Exception:
    gpt = model(returned).requires_grad_(not frozen)
    idx = torch.arange(B * T, device=DEVICE).view(B, T)
    try:
        loss = gpt(idx, targets)[1]
        if not frozen:
            loss.backward()
    except Exception as error:  # whatever it is, it is what is compared
        return error
    return [loss.detach(), *(p.grad for p in gpt.parameters() if not frozen)]


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", TARGETS)
def test_targets(mode, frozen, kind):
    if DEVICE == "cuda" and kind in OUT_OF_RANGE:
        pytest.skip("nobody looks at them there; the loss is NaN")
    ids = torch.randint(V - 1, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = TARGETS[kind](ids)
    with use_backend("torch"):
        expected = outcome(True, targets, frozen)
    with use_backend(mode):
        found = outcome(False, targets, frozen)
    assert type(found) is type(expected), (found, expected)
    if not isinstance(found, Exception):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


LOW = torch.bfloat16
MIXED = [
    pytest.param(op, dtypes, autocast, id=f"{op}-{autocast}-{dtypes}")
    for op in SHAPES
    for dtypes in itertools.islice(
        itertools.product((torch.float32, LOW, torch.float64), repeat=len(SHAPES[op])), 27
    )
    for autocast in (False, True)
]


@pytest.mark.parametrize("op, dtypes, autocast", MIXED)
def test_inputs_of_several_dtypes(op, dtypes, autocast):
    results = []
    given = operands(op)
    for module in (reference, ops):
        cast = {
            name: t.to(dtype).requires_grad_() if t.is_floating_point() else t
            for (name, t), dtype in zip(given.items(), dtypes, strict=True)
        }
        options = {"n_head": 2} if op == "packed_causal_attention" else {}
        try:
            with torch.autocast(DEVICE, LOW, enabled=autocast):
                outputs = getattr(module, op)(**cast, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
            results.append([*outputs, *(t.grad for t in cast.values() if t.requires_grad)])
        except (RuntimeError, TypeError, ValueError) as error:
            results.append(type(error))
    expected, found = results
    if isinstance(expected, list):
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    elif DEVICE == "cpu":  # the kernels' norms take weights of any dtype
        assert found is expected


class WideNorm(nn.Module):
    def forward(self, x):
        return (1.5 * x.float()).transpose(0, 1).contiguous().transpose(0, 1)  # in odd strides


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("change", ["replaced", "hooked", "dropout"])
def test_the_head_after_another_norm_or_dropout(autocast, change):
    results = []
    for returned in (True, False):
        gpt = model(returned)
        if change == "replaced":
            gpt.transformer.ln_f = WideNorm()
        elif change == "hooked":
            gpt.transformer.ln_f.register_forward_hook(lambda m, i, out: 2 * out.float())
        else:
            for m in gpt.modules():
                if isinstance(getattr(m, "dropout", None), float):
                    m.dropout = 0.2
        idx = torch.arange(B * T, device=DEVICE).view(B, T)
        with torch.autocast(DEVICE, LOW, enabled=autocast):
            torch.manual_seed(1)
            loss = gpt(idx, idx)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    torch.testing.assert_close(*results, rtol=0.03, atol=3e-3)
