"""Tensors that no kernel was written for: each is refused by name, or treated as eager treats it.

Complex and integer, on the wrong device, nested, sparse, float64, empty, without data; in every
place of every op, and in every mode.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt import GPT, GPTConfig, ops, reference, use_backend
from tests.close import DEVICE

SHAPES = {  # of every op's tensors, a letter for each size
    "layer_norm": dict(x="RK", weight="K", bias="K"),
    "add_layer_norm": dict(delta="RK", residual="RK", weight="K", bias="K"),
    "linear_gelu": dict(x="RK", weight="NK", bias="N"),
    "mlp": dict(x="RK", fc_weight="NK", fc_bias="N", proj_weight="KN", proj_bias="K"),
    "causal_attention": dict(q="BHTD", k="BHTD", v="BHTD"),
    "packed_causal_attention": dict(qkv="BTC"),
    "cross_entropy": dict(logits="RV", targets="R"),
    "linear_cross_entropy": dict(x="RK", weight="VK", targets="R"),
}
LETTERS = dict(B=1, H=2, T=5, D=16, C=96, R=6, K=16, N=8, V=9)
every_op_in_every_mode = [
    pytest.param(op, mode, id=f"{op}-{mode}")
    for op in SHAPES
    for mode in ("auto", "torch", "triton")
]
Operands = dict[str, Tensor]


def operands(op: str, **sizes: int) -> Operands:
    given = {}
    for name, letters in SHAPES[op].items():
        shape = [{**LETTERS, **sizes}[letter] for letter in letters]
        given[name] = torch.randn(shape, device=DEVICE)
    if "targets" in given:
        given["targets"] = torch.zeros_like(given["targets"], dtype=torch.int64)
    return given


def call(module: Any, op: str, given: Operands) -> tuple[Tensor, ...]:
    options = {"n_head": 2} if op == "packed_causal_attention" else {}
    outputs = getattr(module, op)(**given, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def outcome(module: Any, op: str, given: Operands) -> list[Tensor | None] | Exception:
    """Dense outputs and, of dense inputs, their gradients; or what was raised instead."""
    leaves = {name: t.detach() for name, t in given.items()}
    dense = all(t.layout == torch.strided and not t.is_nested for t in leaves.values())
    for t in leaves.values():
        t.requires_grad_(dense and t.is_floating_point())
    try:
        outputs = call(module, op, leaves)
        if not dense:
            return [t.values() if t.is_nested else t.to_dense() for t in outputs]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    except Exception as error:  # whatever eager raises is what is compared
        return error
    return [*outputs, *(t.grad for t in leaves.values())]


def assert_as_eager_or_refused(op: str, mode: str, given: Operands) -> None:
    expected = outcome(reference, op, given)
    with use_backend(mode):
        found = outcome(ops, op, given)
    if not isinstance(found, Exception):
        torch.testing.assert_close(found, expected, equal_nan=True)
    elif type(found) is not type(expected):
        ours = isinstance(found, (TypeError, ValueError))
        assert ours or (mode == "triton" and "cannot run" in str(found)), found


@pytest.mark.parametrize("op, mode", every_op_in_every_mode)
def test_a_tensor_of_another_dtype_is_refused_by_name(op, mode):
    for name, t in operands(op).items():
        for dtype in {torch.complex64, torch.int64, torch.int32, torch.bool} - {t.dtype}:
            with use_backend(mode), pytest.raises(TypeError) as caught:
                call(ops, op, {**operands(op), name: t.to(dtype)})
            assert re.search(rf"^{name} .*{dtype}.*; convert with \.", str(caught.value))


@pytest.mark.parametrize("op, mode", every_op_in_every_mode)
def test_a_tensor_on_another_device_is_refused_by_name(op, mode):
    """Also where PyTorch does not: its linear takes a weight on the meta device for noise."""
    for name, t in operands(op).items():
        given = {**operands(op), name: t.to("meta")}
        if len(given) == 1:
            continue  # the only tensor is where it is
        with use_backend(mode), pytest.raises(RuntimeError) as caught:
            call(ops, op, given)
        assert f"{name} is on" in str(caught.value) and "move them" in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op, mode", every_op_in_every_mode)
def test_a_nested_tensor_without_a_shape_is_refused_by_name(op, mode):
    for name, t in operands(op).items():
        given = {**operands(op), name: torch.nested.nested_tensor([t])}
        with use_backend(mode), pytest.raises(TypeError, match=f"^{name} is a nested .*padded"):
            call(ops, op, given)


AS_EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda t: t.double() if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr() if t.dim() == 2 else t,
    "jagged": lambda t: torch.nested.nested_tensor([t], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", AS_EAGER)
@pytest.mark.parametrize("op, mode", every_op_in_every_mode)
def test_what_kernels_cannot_take_is_refused_or_done_as_eager_does(op, mode, kind):
    change = AS_EAGER[kind]
    for name, t in operands(op).items():
        assert_as_eager_or_refused(op, mode, {**operands(op), name: change(t)})
    given = {name: change(t) for name, t in operands(op).items()}
    assert_as_eager_or_refused(op, mode, given)


@pytest.mark.parametrize("op, mode", every_op_in_every_mode)
def test_sizes_of_zero(op, mode):
    """One or two at once: some releases of PyTorch divide by them, which ends the process."""
    letters = sorted(set("".join(SHAPES[op].values())))
    for zeros in itertools.combinations_with_replacement(letters, 2):
        assert_as_eager_or_refused(op, mode, operands(op, **dict.fromkeys(zeros, 0)))


EMPTY = [shape for shape in itertools.product((0, 2), (0, 2), (0, 5), (0, 16)) if 0 in shape]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_of_nothing_is_nothing(dropout_p, shape):
    """Here eager PyTorch is no reference: where H = 0, 2.11's divides by it."""
    q, k, v = (torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    for module in (ops, reference):
        y = module.causal_attention(q, k, v, dropout_p)
        gradients = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        assert {t.shape for t in (y, *gradients)} == {shape}


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("op, mode", every_op_in_every_mode)
def test_shapes_are_inferred_without_data(op, mode, where):
    real = outcome(reference, op, operands(op))
    with use_backend(mode):
        if where == "meta":
            given = {name: t.to("meta") for name, t in operands(op).items()}
            found = outcome(ops, op, given)
        else:
            with FakeTensorMode():
                found = outcome(ops, op, operands(op))
    if mode == "triton":
        assert re.search("cannot run .*(for meta|FakeTensor is not a plain tensor)", str(found))
    else:
        assert [t if t is None else (t.shape, t.dtype) for t in found] == [
            t if t is None else (t.shape, t.dtype) for t in real
        ]


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("return_logits", [True, False])
def test_the_models_shapes_are_inferred_without_data(return_logits, where):
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        model = GPT(GPTConfig(8, 23, 2, 2, 16, return_logits=return_logits))
        idx = torch.zeros(2, 5, dtype=torch.long)
        logits, loss = model(idx, idx)
        loss.backward()
        assert logits.shape == (2, 5, 23) if return_logits else logits is None
        assert loss.shape == () and all(p.grad.shape == p.shape for p in model.parameters())
