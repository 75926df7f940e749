"""Two processes (gloo, on a CPU) compute what one does with the whole batch: DDP and FSDP2.

The processes start once and serve every test. What they run is a function of this file, which each
of them imports anew; what they find goes back to the test, which compares.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.training import sharded

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this PyTorch was built without torch.distributed or without gloo",
)

RANKS, STEPS, B, T, V = 2, 2, 1, 9, 41
Everyone = Callable[..., list[Any]]


def join(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    # so that a rank which waits in vain for the other one says so before anybody loses patience
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", meeting_point, patience, world_size=RANKS, rank=rank)


@pytest.fixture(scope="module")
def everyone(tmp_path_factory) -> Iterator[Everyone]:
    """Calls a function in every process at once; the list of what each rank returns."""
    meeting_point = f"file://{tmp_path_factory.mktemp('gloo') / 'ranks'}"
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), join, (rank, meeting_point))
            )
            for rank in range(RANKS)
        ]

        def call(function: Callable, *args: Any) -> list[Any]:
            futures = [process.submit(function, *args) for process in processes]
            return [future.result() for future in futures]

        yield call
        call(dist.destroy_process_group)


on_kernels = functools.partial(  # what is slowest is tried in one way per test
    pytest.param,
    "triton",
    marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="on CPU tensors kernels run in the interpreter only"
    ),
)


def tiny(**changes: Any) -> GPT:
    """The same weights in every process."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_size": 12, "vocab_size": V, "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig(**{**sizes, "n_embd": 32, **changes}))
    with torch.no_grad():
        for p in model.parameters():  # wide enough that every part matters
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A rank's share of a step's batch, or all of it."""
    rows = torch.randint(V, (RANKS * B, T + 1), generator=torch.Generator().manual_seed(step))
    mine = rows if rank is None else rows.chunk(RANKS)[rank]
    return mine[:, :-1], mine[:, 1:]


def two_buckets() -> GPT:
    """1.6 MB of weights, in buckets of 1 MB, DDP's smallest: compiled graphs are cut in between."""
    return tiny(n_embd=128)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


compiled = functools.partial(
    torch.compile, backend="aot_eager"
)  # all of it but inductor's C++ compiler
ddp = functools.partial(DistributedDataParallel, bucket_cap_mb=1)
WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "DDP": ddp,
    "DDP(compile)": lambda model: ddp(compiled(model)),
    "compile(DDP)": lambda model: compiled(ddp(model)),
}


def accumulate(wrap: str, backend: str) -> list[dict[str, Tensor]]:
    """The gradients after each micro step, of which only the last is shared: nanoGPT's loop."""
    model = two_buckets()
    wrapped, after = WRAPS[wrap](model), []
    with use_backend(backend):
        for step in range(STEPS):
            wrapped.require_backward_grad_sync = step == STEPS - 1
            _, loss = wrapped(*batch(step, dist.get_rank()))
            (loss / STEPS).backward()
            after.append(gradients(model))
    return after


@pytest.mark.parametrize(
    "backend, wrap", [*(("auto", wrap) for wrap in WRAPS), on_kernels("compile(DDP)")]
)
def test_ddp_accumulates_then_averages(backend, wrap, everyone):
    model = two_buckets()
    whole = sum(model(*batch(step))[1] / STEPS for step in range(STEPS))
    whole.backward()
    for rank, (first, last) in enumerate(everyone(accumulate, wrap, backend)):
        torch.testing.assert_close(last, gradients(model))
        alone = two_buckets()
        (alone(*batch(0, rank))[1] / STEPS).backward()
        torch.testing.assert_close(first, gradients(alone))


def train(model: nn.Module, rank: int | None = None) -> list[float]:
    """The losses of three steps. With SGD: Adam would not notice gradients of twice the size."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        _, loss = model(*batch(step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_sharded(return_logits: bool, backend: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the weights they lead to."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny(return_logits=return_logits)
    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (RANKS,)))
    for block in model.transformer.h:
        shard(block)
    shard([model.transformer.wte, model.lm_head])  # tied: one weight must be in one group
    shard(model)
    with use_backend(backend):
        losses = train(model, dist.get_rank())
    return losses, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.skipif(sharded.problem("cpu") is not None, reason=str(sharded.problem("cpu")))
@pytest.mark.parametrize(
    "backend, return_logits", [("auto", True), ("auto", False), on_kernels(False)]
)
def test_fsdp2_trains_as_one_process_does(backend, return_logits, everyone):
    """Also without logits: unless it is sharded, the model then reads the head's weight itself."""
    model = tiny()
    expected = train(model)
    shares, weights = zip(*everyone(train_sharded, return_logits, backend), strict=True)
    losses = torch.tensor(shares).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=0, atol=1e-5)
    for found in weights:
        torch.testing.assert_close(found, dict(model.named_parameters()), rtol=0, atol=1e-5)


def train_in_fsdp1(return_logits: bool, originals: bool) -> list[float]:
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = tiny(return_logits=return_logits)
    each_block = ModuleWrapPolicy({type(model.transformer.h[0])})
    device = torch.device("cpu")
    sharded = Fsdp(model, None, None, None, each_block, use_orig_params=originals, device_id=device)
    return train(sharded, dist.get_rank())


@pytest.mark.parametrize("return_logits, originals", [(True, False), (False, True)])
def test_fsdp1_trains_as_one_process_does(return_logits, originals, everyone):
    """Each block inside of a wrapper that answers for it."""
    losses = torch.tensor(everyone(train_in_fsdp1, return_logits, originals)).mean(0)
    torch.testing.assert_close(losses, torch.tensor(train(tiny())), rtol=0, atol=1e-5)
