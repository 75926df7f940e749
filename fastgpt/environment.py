"""What runs here and why: `fastgpt.backend_report()`, and the versions behind it."""

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from fastgpt import backend, examples

CPUINFO = Path("/proc/cpuinfo")


def backend_report() -> dict[str, backend.Choice]:
    """For every op: (implementation, reason) for GPT-2's shapes on this machine's first device.

    "block" is the fused path of a whole model, "adamw" the optimizer of TrainStep.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    report = {}
    for op in backend.OPS:
        call = examples.outline(op, examples.Sizes(B=1, T=16), device, dtype)
        tensors = tuple(t for t in call.inputs if t is not None)
        try:
            report[op] = backend.explain(op, tensors, call.facts)
        except RuntimeError as error:  # mode "triton" where it cannot run
            report[op] = backend.Choice("none", str(error))
    return report


def versions() -> dict[str, str]:
    """Device and versions, as every report and benchmark record carries them."""
    on_gpu = torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({_cpu()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "flash-attn", "tiktoken", "transformers"):
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "not installed"
    return report


def _cpu() -> str:
    """Model, instruction set and threads: what two CPUs' times can be compared by."""
    model = platform.processor() or platform.machine()
    if CPUINFO.exists():  # Linux
        match = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
        model = match[1].strip() if match else model
    threads = torch.get_num_threads()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
