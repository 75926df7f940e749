"""What torch.compile generates for an H200 on a machine without one.

Tensors that say they are on CUDA and hold no data (fake tensors) go through Dynamo, AOTAutograd and
inductor, which stops where it has written the code. `pretend` answers for torch.cuda and for
Triton's driver; autograd asks the driver besides, which no_gpu.c answers, preloaded (`run`).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

HERE = Path(__file__).parent
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)


def problem() -> str | None:
    """Why this machine cannot generate such code, or None."""
    if torch.version.cuda is None or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return "this PyTorch knows no CUDA, or cannot pretend to have a device"
    if torch.cuda.is_available():
        return "there is a GPU, which nobody need pretend"
    if sys.platform != "linux" or shutil.which("cc") is None:
        return "no C compiler, or no Linux to preload what it makes"
    return None


def run(*command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """A module with its words, in a process for which there is a driver."""
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", driver, HERE / "no_gpu.c"], check=True)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"LD_PRELOAD": str(driver), "LD_LIBRARY_PATH": folder}
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=HERE.parents[1], env=environment, capture_output=True, text=True, **options,
        )  # fmt: skip


def pretend() -> None:
    """Answer for torch.cuda, in this process for good."""
    from torch._subclasses import fake_tensor

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (H200.major, H200.minor),
        "get_device_name": H200.name,
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
        "_get_device_properties": H200,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, as there is no device
    torch.accelerator.is_available = lambda: False  # of streams
    _silence(fake_tensor, "init_gpu_context")  # it would allocate there


def pretend_to_inductor() -> None:
    """The same, for what inductor asks besides."""
    import torch._functorch.config
    import torch._inductor.config
    import triton
    from torch._inductor.fx_passes import fuse_attention, pad_mm

    pretend()
    triton.runtime.driver.set_active(_Driver())
    # patterns of attention and padded products are tried on tensors made for that
    _silence(fuse_attention, "_sfdp_init")
    _silence(pad_mm, "_pad_mm_init")
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False


def _silence(module: Any, function: str) -> None:
    setattr(module, function, lambda *_, **__: None)


class _Driver:
    """Triton's, as far as it is asked while code is written."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * H200.major + H200.minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def is_active() -> bool:
        return True


class _Stop(Exception):
    """The code is written, and would be compiled next."""


def inductor(look: Callable[[Any, str], None]) -> Callable[[Any, Any], Any]:
    """A backend for torch.compile that shows `look` inductor's lowered graph and its code, forward
    and backward, and runs neither.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    codegen = GraphLowering.codegen

    def look_and_stop(lowered: GraphLowering) -> None:
        code: Any = codegen(lowered)[0]
        look(lowered, getattr(code, "value", code))  # text alone in older versions
        raise _Stop

    def up_to_the_code(graph: Any, inputs: Any, **options: Any) -> Any:
        with patch.object(GraphLowering, "codegen", look_and_stop):
            try:
                compile_fx.compile_fx_inner(graph, inputs, **options)
            except Exception as error:
                if _Stop.__name__ not in repr(error):
                    raise
        return make_boxed_func(graph.forward)

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=up_to_the_code)


def on_cuda(model: torch.nn.Module) -> torch.nn.Module:
    """With fake parameters for its meta ones; tied ones stay tied."""
    moved = {p: torch.nn.Parameter(torch.empty(p.shape, device="cuda")) for p in model.parameters()}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, moved[p])
    return model
