"""torch.compile as scripts use it: around and inside DDP, for CUDA graphs, with logits in chunks,
with blocks computed again, with the head outside.
"""

import io
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.linear_cross_entropy import CHUNKS
from tests.close import DEVICE
from tests.marks import slow
from tests.model.test_compile import Compiler, graphs


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch.compiler.reset()
    counters.clear()


def small(**changes: Any) -> GPT:
    torch.manual_seed(0)
    sizes = dict(block_size=24, vocab_size=33, n_layer=2, n_head=1, n_embd=32)
    with redirect_stdout(io.StringIO()):
        return GPT(GPTConfig(**sizes | changes)).to(DEVICE)


def step(forward: Any, model: GPT) -> list[Tensor]:
    """Loss and gradients, by backward() as DDP wants it."""
    idx = torch.arange(34, device=DEVICE).view(2, 17) % 33
    model.zero_grad()
    loss = forward(idx, idx.flip(1))[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    meeting = tmp_path_factory.mktemp("gloo") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "order, logits",
    [
        ("DDP(compile)", True),
        slow("DDP(compile)", False),
        slow("compile(DDP)", True),
        ("compile(DDP)", False),
        slow("DDP(compile)", "eager"),
        slow("compile(DDP)", "eager"),
    ],
)
def test_distributed(one_process, order, logits, monkeypatch):
    """Buckets smaller than the model, between which Dynamo splits a graph that it finds in DDP."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    model, compiler = small(return_logits=logits), Compiler()

    def compiled(module: Any) -> Any:
        return torch.compile(module, backend=compiler)

    def parallel(module: Any) -> Any:
        return DistributedDataParallel(module, bucket_cap_mb=0.03)

    with use_backend("triton"):
        expected = step(model, model)
        run = compiled(parallel(model)) if order == "compile(DDP)" else parallel(compiled(model))
        torch.testing.assert_close(step(run, model), expected)
    assert "fastgpt.add_layer_norm_forward.default" in compiler.operators


@pytest.mark.parametrize("way", [slow({}), dict(return_logits=False)], ids=["logits", "no logits"])
def test_for_cuda_graphs(way):
    """mode="reduce-overhead": that nothing keeps the graphs from it is in test_compile_on_cuda.py;
    here, that it computes the same.
    """
    model = small(**way, n_layer=1)
    with use_backend("triton"):
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(step(compiled, model), step(model, model))
    assert graphs() == 1


def test_logits_in_chunks(monkeypatch):
    """Whose backward may run twice, and must not work in what it was given."""
    monkeypatch.setitem(CHUNKS, DEVICE, (8, 16))
    model, compiler = small(return_logits=False, n_layer=1), Compiler()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    idx = torch.arange(34, device=DEVICE).view(2, 17) % 33
    with use_backend("triton"):
        expected = step(model, model)
        loss = 3 * compiled(idx, idx.flip(1))[1]
        model.zero_grad()
        loss.backward()
    in_place = {name for name in compiler.operators if "auto_functionalized" in name}
    assert in_place  # which is how the compiler sees cross_entropy_
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close([t / 3 for t in found], expected)


def test_checkpointed_blocks():
    """Are computed again as modules: PyTorch up to 2.11 would keep all that a unit saves."""
    model, compiler = small(checkpoint_blocks=True), Compiler()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with use_backend("triton"):
        torch.testing.assert_close(step(compiled, model), step(model, model))
        assert "fastgpt.layer_norm_forward.default" in compiler.operators
        assert "fastgpt.add_layer_norm_forward.default" not in compiler.operators
        with torch.no_grad():
            compiled(torch.arange(17, device=DEVICE)[None])
    assert "fastgpt.add_layer_norm_forward.default" in compiler.operators


@pytest.mark.parametrize("changes", [dict(dropout=0.2), slow(dict(bias=True))])
def test_the_head_outside(changes):
    """One break, with the head after it: nothing as long as the vocabulary leaves the graph."""
    model, compiler = small(return_logits="eager", **changes), Compiler()
    idx = torch.arange(34, device=DEVICE).view(2, 17) % 33

    def gradients(forward: Any) -> list[Tensor]:
        torch.manual_seed(1)  # of the dropout
        logits, loss = forward(idx, idx.flip(1))
        total = loss + logits.square().mean()
        return [logits, loss, *torch.autograd.grad(total, list(model.parameters()))]

    with use_backend("triton"):
        found = gradients(torch.compile(model, backend=compiler))
        torch.testing.assert_close(found, gradients(model))
    assert graphs() == 1 and sum(counters["graph_break"].values()) == 1
    assert not any("cross_entropy" in name or "nll_loss" in name for name in compiler.operators)
    assert any(name.startswith("fastgpt.") for name in compiler.operators)


@pytest.mark.parametrize("returned, given", [(True, True), ("eager", False)])
def test_a_gradient_of_unused_logits(returned, given):
    """Is one of zeros, as long as they, for a graph that they left; for no other."""
    model, compiler = small(return_logits=returned, n_layer=1), Compiler()
    idx = torch.arange(34, device=DEVICE).view(2, 17) % 33
    with use_backend("triton"):
        _, loss = torch.compile(model, backend=compiler)(idx, idx)
        loss.backward()
    assert ((2, 17, 33) in compiler.given_back) == given


def test_fullgraph_says_what_keeps_the_head_outside():
    model = small(return_logits="eager", n_layer=1)
    compiled = torch.compile(model, backend=Compiler(), fullgraph=True)
    idx = torch.arange(17, device=DEVICE)[None]
    with use_backend("triton"):
        torch.testing.assert_close(compiled(idx), model(idx))  # without a loss it is inside
        with pytest.raises(torch._dynamo.exc.Unsupported, match="head_of_return_logits_eager"):
            compiled(idx, idx)
