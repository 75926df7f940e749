"""Host time of a training step: Python and dispatch, with nothing to wait for on the device.

    python -m bench.host --rounds 30

A GPU with more to do than the host hides this time; where batches are small it is the step's time.
On CUDA the device has caught up before every sample, and the host is timed until it has queued the
step. Elsewhere Triton launches through a driver that does nothing, and tensors are so small that
PyTorch's own ops take about what queueing them would: good for before and after, not for promises.
A line of JSON each, in turns; what the stubbed kernels leave in tensors is noise.
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastgpt import GPT, GPTConfig, TrainStep, use_backend
from fastgpt.commands.timing import host_sample
from fastgpt.environment import versions
from fastgpt.fused.untouched import block_weights
from fastgpt.fused.whole import fused_model

OPTIMIZER: dict[str, Any] = dict(weight_decay=0.1, lr=1e-4, betas=(0.9, 0.95))


def stub_launches() -> None:
    """In this process for good: kernels take a CPU's tensors, are compiled for a GPU, and launched
    into nothing.
    """
    import triton

    from fastgpt.kernels import _launch

    if _launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels instead of launching them")
    triton.runtime.driver.set_active(_Driver())
    _launch.INTERPRETED = True  # for the question where kernels can run; triton.jit knows better


class _Driver:
    """What Triton asks of a CUDA driver to compile, load and launch."""

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            from triton.compiler import CompiledKernel

            loaded = 1, 1, 32, 0, 1024  # module, function, registers, spills, threads at most
            most_threads = "n_max_threads" in CompiledKernel._init_handles.__code__.co_names
            return loaded if most_threads else loaded[:4]  # Triton 3.2 asks for no threads

        @staticmethod
        def unload_module(_: int) -> None: ...

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    class launcher_cls:
        def __init__(self, source: Any, _: Any):
            self.parameters = len(source.signature)  # constants among them since Triton 3.3

        def __call__(self, *args: Any) -> None:
            if len(args) != 9 + self.parameters:  # before them a grid, a stream, hooks
                raise TypeError(f"{len(args)} arguments to a launcher of {self.parameters}")

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def parts(device: torch.device, layers: int) -> dict[str, Callable[[], object]]:
    """What is timed: whole steps, and what they are made of."""
    # the stubs' kernels think they are interpreted, which bfloat16 cannot be
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x, y = torch.randint(32, (2, 1, 4), device=device)

    def model(**how: Any) -> GPT:
        sizes: dict[str, Any] = dict(
            block_size=4, vocab_size=32, n_layer=layers, n_head=1, n_embd=16
        )
        with contextlib.redirect_stdout(io.StringIO()):
            return GPT(GPTConfig(**sizes, bias=False, **how)).to(device)

    ours, dropped_in = model(return_logits=False), model()
    with contextlib.redirect_stdout(io.StringIO()):
        step = TrainStep(ours, **OPTIMIZER, dtype=dtype, max_skipped=0)
        plain = dropped_in.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)

    def forward_and_backward() -> None:
        with torch.autocast(device.type, dtype):
            loss = dropped_in(x, y)[1]
        loss.backward()

    def drop_in() -> None:
        forward_and_backward()
        torch.nn.utils.clip_grad_norm_(dropped_in.parameters(), 1.0)
        plain.step()
        plain.zero_grad()

    def without_optimizer() -> None:
        forward_and_backward()
        plain.zero_grad()

    def optimizer() -> None:
        for p in ours.parameters():
            p.grad = p.detach()
        step.optimizer.step()
        step.optimizer.zero_grad()

    def checks() -> None:
        with torch.autocast(device.type, dtype):
            fused = fused_model(dropped_in, x)
        assert fused is not None  # else it is not our path that was timed
        for block in dropped_in.transformer.h:
            assert block_weights(block, fused.settings, fused.weight.shape[1]) is not None

    return {
        "train.py's step": drop_in,
        "its forward and backward": without_optimizer,
        "TrainStep": lambda: step([(x, y)]),
        "its optimizer": optimizer,
        "whether the model is as built": checks,
    }


def measure(device: torch.device, layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every part, one sample a round."""
    timed = parts(device, layers)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 3):
        for name, call in timed.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            sample = host_sample(call)
            if number >= 3:  # kernels have been compiled
                samples[name].append(sample)
    return samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # in what no kernel wrote: slow
    warnings.filterwarnings("ignore", message="fastgpt: .* steps in a row were skipped")
    if device.type != "cuda":
        stub_launches()
    gc.disable()
    with use_backend("triton"):
        found = measure(device, args.layers, args.rounds)
    facts = {"launches": "real" if device.type == "cuda" else "stubbed", **versions()}
    for name, seconds in found.items():
        times = {"median_ms": 1e3 * statistics.median(seconds), "least_ms": 1e3 * min(seconds)}
        print(json.dumps({"part": name, "layers": args.layers, **times, **facts}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
