"""The kernels as torch operators: opaque to torch.compile, true to opcheck, differentiable once."""

import pytest
import torch

from fastgpt import GPT, GPTConfig, backend, ops, use_backend
from fastgpt.kernels import attention, cross_entropy, gelu_mlp, gemm_gelu, layer_norm
from tests.close import DEVICE, randn


def operator_samples():
    """Every registered operator with arguments it accepts."""
    x, w, b = randn(6, 24), randn(24), randn(24)
    y, mean, rstd = layer_norm.forward(x, w, b, 1e-5, x.dtype)
    yield layer_norm._forward, (x, w, b, 1e-5, x.dtype)
    yield layer_norm._add_forward, (x, x.clone(), w, b, 1e-5, x.dtype)
    yield layer_norm._backward, (y, None, x, w, mean, rstd, True, x.dtype)
    yield layer_norm._backward, (y, x, x, w, mean, rstd, False, torch.float16)
    yield gelu_mlp._gelu_forward, (x, False)
    yield gelu_mlp._gelu_backward, (y, x, True, True, True)
    yield gelu_mlp._gelu_backward, (y, x, False, False, False)
    yield gemm_gelu._forward, (x, randn(17, 24), randn(17), False)
    q, k, v = (randn(2, 2, 9, 16) for _ in range(3))
    seed = torch.tensor([5], device=DEVICE)
    o, lse = attention.forward(q, k, v, None, 0.25, 0.0)
    yield attention._forward, (q, k, v, None, 0.25, 0.0)
    yield attention._forward, (q, k, v, seed, 0.25, 0.5)
    yield attention._backward, (o, q, k, v, o, lse, None, 0.25, 0.0)
    qkv = randn(2, 9, 96)
    y, lse = attention.packed_forward(qkv, 2, seed, 0.5)
    yield attention._packed_forward, (qkv, 2, seed, 0.5)
    yield attention._packed_backward, (y, qkv, y, lse, seed, 2, 0.5)
    targets = torch.randint(24, (6,), device=DEVICE)
    _, lse = cross_entropy.forward(x, targets, -1)
    yield cross_entropy._forward, (x, targets, -1)
    yield cross_entropy._backward, (x, targets, lse, torch.ones((), device=DEVICE), -1)


def test_opcheck():
    """Schemas tell the truth about aliasing and mutation; fakes have the real strides."""
    checked = set()
    for op, args in operator_samples():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        checked.add(op.name())
    registered = {
        name for name in dir(torch.ops.fastgpt) if name.endswith(("_forward", "_backward"))
    }
    assert checked == {f"fastgpt::{name}" for name in registered}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_kernels_inside_a_compiled_model(training):
    """fullgraph, so one graph without breaks; same numbers as the kernels give uncompiled."""
    model = GPT(GPTConfig(24, 33, 1, 2, 32, bias=True)).to(DEVICE).train(training)
    idx = torch.randint(33, (2, 17), device=DEVICE)
    with use_backend("triton"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for run in (model, compiled):
            model.zero_grad()
            logits, loss = run(idx, idx)
            loss.backward()
            results.append([logits, loss, *(p.grad.clone() for p in model.parameters())])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(plain, traced)


def test_no_second_derivative():
    """create_graph raises: a constant in place of the second derivative would be silently wrong."""
    x = randn(4, 16).requires_grad_()
    with use_backend("triton"):
        loss = ops.layer_norm(x, randn(16)).sum()
        with pytest.raises(RuntimeError, match=r"only once.*use_backend"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_backward_twice_gives_the_same_bits():
    model = GPT(GPTConfig(24, 33, 1, 2, 32, bias=True)).to(DEVICE)
    idx = torch.randint(33, (2, 17), device=DEVICE)
    with use_backend("triton"):
        _, loss = model(idx, idx)
        params = list(model.parameters())
        first = torch.autograd.grad(loss, params, retain_graph=True)
        second = torch.autograd.grad(loss, params)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_func_transforms_fall_back():
    """torch.func sees PyTorch's own ops, whose per-sample gradients exist; kernels say why not."""
    w, x, problems = randn(16), randn(3, 5, 16), []

    def loss(w, x):
        problems.append(backend._tensor_problem((x, w)))
        return ops.layer_norm(x, w).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    expected = torch.stack([torch.func.grad(loss)(w, row) for row in x])
    torch.testing.assert_close(per_sample, expected)
    assert all("torch.func" in problem for problem in problems)
