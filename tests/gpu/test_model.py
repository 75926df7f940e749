"""The whole model in every precision: logits, loss and gradients, beside eager's error.

What 200 steps of training do in these precisions, activation checkpointing and repeatability are in
test_training.py, which the GPU suite runs too.
"""

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, use_backend
from tests.close import DEVICE, EPS_BUDGET
from tests.gpu.here import ON_GPU, needs_gpu, size

pytestmark = needs_gpu
SIZES = size(
    dict(block_size=1024, vocab_size=50304, n_layer=4, n_head=12, n_embd=768),
    dict(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=32),
)
ONLY_ON_GPU = pytest.mark.skipif(not ON_GPU, reason="the interpreter has neither bf16 nor TF32")
PRECISIONS = [  # autocast's dtype, or float32 without; matmul precision; loss scale
    pytest.param(torch.float32, "highest", 1.0, id="fp32"),
    pytest.param(torch.float32, "high", 1.0, id="TF32", marks=ONLY_ON_GPU),
    pytest.param(torch.float16, "highest", 2.0**12, id="fp16"),
    pytest.param(torch.bfloat16, "highest", 1.0, id="bf16", marks=ONLY_ON_GPU),
]
EPS_OF_TF32 = 2.0**-10


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES)).to(DEVICE)


def step(
    model: torch.nn.Module, autocast: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Tensor]:
    """Logits, loss and every gradient."""
    V, T = SIZES["vocab_size"], SIZES["block_size"]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(V, (2, T + 1), generator=generator).to(DEVICE)
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, autocast, enabled=autocast != torch.float32):
        logits, loss = model(rows[:, :-1], rows[:, 1:].contiguous())
    (scale * loss).backward()
    found = {name: p.grad / scale for name, p in model.named_parameters()}
    return found | {"logits": logits.detach(), "loss": loss.detach()}


def assert_as_close(ours: dict, eager: dict, exact: dict, eps: float) -> None:
    """In norm, which chance moves less than a maximum, |ours - exact| is within twice eager's."""
    for name, truth in exact.items():
        mine, theirs = ((found[name].double() - truth).norm() for found in (ours, eager))
        allowed = 2 * theirs + eps * truth.norm()
        assert mine <= allowed, f"{name}: error {mine:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize(
    "dtype, matmul_precision, scale", PRECISIONS, indirect=["matmul_precision"]
)
def test_model(dtype, matmul_precision, scale, mode):
    with use_backend("torch"):
        exact, eager = step(gpt().double()), step(gpt(), dtype, scale)
    with use_backend(mode):
        ours = step(gpt(), dtype, scale)
    eps = EPS_OF_TF32 if matmul_precision == "high" else torch.finfo(dtype).eps
    assert_as_close(ours, eager, exact, EPS_BUDGET[dtype] * eps)


@pytest.mark.parametrize("autocast", size([torch.float32, torch.bfloat16], [torch.float32]))
@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_compiled_model(mode, autocast):
    """One graph through inductor, with the kernels as opaque operators or PyTorch's own ops."""
    with use_backend("torch"):
        exact, eager = step(gpt().double()), step(gpt(), autocast)
    with use_backend(mode):
        compiled = torch.compile(gpt(), fullgraph=True, backend=size("inductor", "aot_eager"))
        ours = step(compiled, autocast)
    ours = {name.removeprefix("_orig_mod."): t for name, t in ours.items()}
    assert_as_close(ours, eager, exact, EPS_BUDGET[autocast] * torch.finfo(autocast).eps)
