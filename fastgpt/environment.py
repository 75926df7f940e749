"""What runs here and why: `fastgpt.backend_report()`, the versions behind it, `fastgpt info`."""

import argparse
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from fastgpt import backend, ops
from fastgpt.fused import whole

CPUINFO = Path("/proc/cpuinfo")
# a shape to ask about: GPT-2's
_TYPICAL: dict[str, dict[str, float]] = {
    "layer_norm": dict(width=768),
    "add_layer_norm": dict(width=768),
    "linear_gelu": {},
    "mlp": {},
    "causal_attention": dict(head_dim=64, dropout_p=0.0),
    "packed_causal_attention": dict(head_dim=64, dropout_p=0.0),
    "cross_entropy": {},
    "linear_cross_entropy": {},
    "adamw": {},
    "block": dict(n_head=12, dropout_p=0.0),
}


def backend_report() -> dict[str, backend.Choice]:
    """For every op: (implementation, reason) for GPT-2's shapes on this machine's first device.

    "block" is the fused path of a whole model, "adamw" the optimizer of fastgpt's own step.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    qkv = torch.empty(1, 16, 3 * 768, device=device, dtype=dtype)
    report = {}
    for op, facts in _TYPICAL.items():
        try:
            probe = qkv.float() if op == "adamw" else qkv
            why_not = whole.Maker() if op == "block" else ops.why_not
            report[op] = backend.explain(op, why_not, (probe,), facts)
        except RuntimeError as error:  # mode "triton" where it cannot run
            report[op] = backend.Choice("none", str(error))
    return report


def versions() -> dict[str, str]:
    """Device and versions, as every report and benchmark record carries them."""
    on_gpu = torch.cuda.is_available()
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({_cpu()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "flash-attn", "tiktoken", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> str:
    """Model, instruction set and threads: what two CPUs' times can be compared by."""
    model = platform.processor() or platform.machine()
    if CPUINFO.exists():  # Linux
        found = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    threads = torch.get_num_threads()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: `fastgpt info` takes no arguments."""


def main(args: argparse.Namespace) -> int:
    for name, version in versions().items():
        print(f"{name:<14}{version}")
    print()
    for op, choice in backend_report().items():
        print(f"{op:<26}{choice.implementation:<12}{choice.reason}")
    return 0
