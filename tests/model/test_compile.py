"""torch.compile: the model is one graph, with or without kernels, which are operators in it.

As operators the kernels are opaque to the compiler, true to opcheck, and differentiable once.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from fastgpt import GPT, GPTConfig, backend, ops, use_backend
from fastgpt.implementations.interception import interception
from fastgpt.kernels import attention, cross_entropy, embedding, gelu, gemm_gelu, layer_norm
from tests.close import DEVICE, randn
from tests.marks import slow


def operator_samples():
    """Every registered operator with arguments it accepts."""
    x, w, b = randn(6, 24), randn(24), randn(24)
    y, mean, rstd = layer_norm.forward(x, w, b, 1e-5, x.dtype)
    yield layer_norm.registered_forward, (x, w, b, 1e-5, x.dtype)
    yield layer_norm.registered_add_forward, (x, x.clone(), w, b, 1e-5, x.dtype)
    yield layer_norm.registered_backward, (y, None, x, w, mean, rstd, True, x.dtype)
    yield layer_norm.registered_backward, (y, x, x, w, mean, rstd, False, torch.float16)
    yield gelu.registered_forward, (x, False)
    yield gelu.registered_backward, (y, x, True, True, True)
    yield gelu.registered_backward, (y, x, False, False, False)
    yield gemm_gelu.registered_forward, (x, randn(17, 24), randn(17), False)
    yield gemm_gelu.registered_dgrad, (randn(6, 8), randn(8, 24), x, False, True, True)
    q, k, v = (randn(2, 2, 9, 16) for _ in range(3))
    seed = torch.tensor([5], device=DEVICE)
    o, lse = attention.forward(q, k, v, None, 0.25, 0.0)
    yield attention.registered_forward, (q, k, v, None, 0.25, 0.0)
    yield attention.registered_forward, (q, k, v, seed, 0.25, 0.5)
    yield attention.registered_backward, (o, q, k, v, o, lse, None, 0.25, 0.0)
    qkv = randn(2, 9, 96)
    y, lse = attention.packed_forward(qkv, 2, seed, 0.5)
    yield attention.registered_packed_forward, (qkv, 2, seed, 0.5)
    yield attention.registered_packed_backward, (y, qkv, y, lse, seed, 2, 0.5)
    targets = torch.randint(24, (6,), device=DEVICE)
    _, *top_and_total = cross_entropy.forward(x, targets, -1)
    yield cross_entropy.registered_forward, (x, targets, -1)
    saved = x, targets, *top_and_total, torch.ones((), device=DEVICE)
    yield cross_entropy.registered_backward, (*saved, None, -1)
    yield cross_entropy.registered_backward, (*saved, randn(24, 6).t(), -1)
    yield cross_entropy.registered_cross_entropy_, (x.clone(), targets, -1, saved[-1])
    yield cross_entropy.registered_rescale_, (x.clone(), 2 * saved[-1])
    yield embedding.registered_add_rows_, (randn(9, 24), targets % 9, x)


def test_opcheck():
    """Schemas tell the truth about aliasing and mutation; fakes have the real strides."""
    checked = set()
    for op, args in operator_samples():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        checked.add(op.name())
    registered = {
        name
        for name in dir(torch.ops.fastgpt)
        if name.endswith(("_forward", "_backward", "_dgrad", "_")) and not name.startswith("_")
    }
    assert checked == {f"fastgpt::{name}" for name in registered}


class Compiler:
    """All of torch.compile but the generated code; lists the operators of the graphs, and shapes of
    what the backward ones are given.
    """

    def __init__(self) -> None:
        self.operators: set[str] = set()
        self.given_back: list[tuple[int, ...]] = []
        self.compile = aot_autograd(fw_compiler=self._read, bw_compiler=self._read_backward)

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return self.compile(graph, inputs)

    def _read(self, graph: GraphModule, inputs: Sequence[Any]) -> Any:
        self.operators |= {str(node.target) for node in graph.graph.nodes}
        return make_boxed_func(graph.forward)

    def _read_backward(self, graph: GraphModule, inputs: Sequence[Any]) -> Any:
        self.given_back += [tuple(t.shape) for t in inputs if isinstance(t, Tensor)]
        return self._read(graph, inputs)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch.compiler.reset()
    counters.clear()


def small(**changes: Any) -> GPT:
    return GPT(GPTConfig(24, 33, 1, 2, 32, **changes)).to(DEVICE)


def step(model: Any, B: int = 2, T: int = 17) -> list[Tensor]:
    """Logits, loss and, in training, every gradient of one batch, the same each time."""
    torch.manual_seed(1)  # of the dropout too
    idx, targets = torch.randint(33, (2, B, T), device=DEVICE)
    with torch.set_grad_enabled(model.training):
        logits, loss = model(idx, targets)
        gradients = torch.autograd.grad(loss, list(model.parameters())) if model.training else []
    return [logits, loss, *gradients]


by_choice = dict.fromkeys(backend.OPS, "triton")
CHOICES: dict[str, tuple[str, dict[str, str], bool]] = {  # whether kernels will run
    "PyTorch": ("auto", {}, False),
    "kernels": ("triton", {}, True),
    "by choice": ("auto", by_choice, DEVICE == "cuda"),  # "auto" uses none on a CPU
}
CASES = [
    (choice, way, dynamic)
    for choice in ("PyTorch", "kernels")
    for way, dynamic in (("train", False), ("train", True), ("train", None), ("eval", None))
] + [("by choice", "train", None)]
QUICK = ("kernels", "train", True), ("kernels", "eval", None), ("PyTorch", "train", None)


@pytest.mark.parametrize(
    "choice, way, dynamic", [case if case in QUICK else slow(*case) for case in CASES]
)
def test_one_graph_that_computes_the_same(choice, way, dynamic):
    """fullgraph forbids breaks; dispatch is traced, and leaves the kernels in the graph by name."""
    mode, implementations, kernels = CHOICES[choice]
    model, compiler = small(dropout=0.2).train(way == "train"), Compiler()
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=dynamic)
    with use_backend(mode, **implementations):
        torch.testing.assert_close(step(compiled), step(model))
    assert graphs() == 1
    operators = " ".join(name for name in compiler.operators if name.startswith("fastgpt."))
    # the first is in no module's forward: the fused path as a whole
    parts = ("add_layer_norm", "layer_norm", "attention", "gelu", "cross_entropy")
    assert {part for part in parts if part in operators} == (set(parts) if kernels else set())


def test_a_loss_on_the_logits():
    """They leave the graph, and their gradient comes back into it."""
    model = small()
    idx = torch.randint(33, (2, 17), device=DEVICE)

    def gradients(forward):
        logits, loss = forward(idx, idx)
        return torch.autograd.grad(loss + logits.square().mean(), list(model.parameters()))

    with use_backend("triton"):
        found = gradients(torch.compile(model, backend=Compiler(), fullgraph=True))
        torch.testing.assert_close(found, gradients(model))


@pytest.mark.parametrize("implementation", ["cublas", "triton"])
def test_an_mlp_in_one_graph(implementation):
    args = [randn(5, 16), randn(64, 16), randn(64), randn(16, 64), randn(16)]
    args = [t.requires_grad_() for t in args]

    def gradients(mlp):
        return torch.autograd.grad(mlp(*args).square().sum(), args)

    compiler = Compiler()
    compiled = torch.compile(ops.mlp, backend=compiler, fullgraph=True)
    with use_backend("triton", mlp=implementation):
        torch.testing.assert_close(gradients(compiled), gradients(ops.mlp))
    assert any("gelu" in name for name in compiler.operators)


@pytest.mark.parametrize("mode", [slow("auto"), "triton"])
def test_a_third_batch_or_length_compiles_nothing(mode):
    """The second makes the graph dynamic, as it does for any model."""
    model = small()
    compiled = torch.compile(model, backend=Compiler(), fullgraph=True)
    with use_backend(mode):
        for B, T in [(2, 9), (3, 7)]:
            step(compiled, B, T)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for B, T in [(4, 7), (4, 12)]:
                torch.testing.assert_close(step(compiled, B, T), step(model, B, T))
    assert graphs() == 2


def processor_seconds() -> float:
    """Of this process and of the compilers that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_the_first_step_is_no_later_than_inductors_own():
    """Nothing comes from caches, and nothing is compiled beside. On a CPU ours takes 0.4 of the
    seconds at three layers, with its kernels interpreted: there is less for a compiler to do.
    """
    step(torch.compile(small(), fullgraph=True))  # what is imported and made once a process
    seconds = {}
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        for mode in ("torch", "triton"):
            torch.compiler.reset()
            model = GPT(GPTConfig(24, 33, 3, 2, 32)).to(DEVICE)
            with use_backend(mode):
                step(model)  # our kernels are compiled the first time that they run anywhere
                start = processor_seconds()
                step(torch.compile(model, fullgraph=True))
                seconds[mode] = processor_seconds() - start
    assert seconds["triton"] < seconds["torch"]


def embeddings_compile() -> bool:
    """Whether PyTorch's own embedding has the right gradient once compiled: on a CPU 2.6's not."""
    weight, ids = randn(33, 32).requires_grad_(), torch.arange(34, device=DEVICE) % 3

    def loss(weight):
        return torch.nn.functional.embedding(ids, weight).square().sum()

    gradients = [torch.autograd.grad(f(weight), weight)[0] for f in (loss, torch.compile(loss))]
    return torch.allclose(*gradients)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", [slow("auto"), "triton"])
def test_through_inductor(mode):
    if not embeddings_compile():
        pytest.skip("this PyTorch's compiled embeddings lose gradients of repeated ids")
    model = small()
    with use_backend(mode):
        torch.testing.assert_close(step(torch.compile(model, fullgraph=True)), step(model))


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
        problems.append(interception() or "nothing")
        return ops.layer_norm(x, w).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    expected = torch.stack([torch.func.grad(loss)(w, row) for row in x])
    torch.testing.assert_close(per_sample, expected)
    assert all("torch.func" in problem for problem in problems)
