"""What runs here and why: `fastgpt.backend_report()`, the versions behind it, `fastgpt info`."""

import argparse
import importlib.metadata
import platform

import torch

from fastgpt import backend, ops

# a shape to ask about: GPT-2's
_TYPICAL: dict[str, dict[str, float]] = {
    "layer_norm": dict(width=768),
    "add_layer_norm": dict(width=768),
    "linear_gelu": {},
    "mlp": {},
    "causal_attention": dict(head_dim=64, dropout_p=0.0),
    "packed_causal_attention": dict(head_dim=64, dropout_p=0.0),
    "cross_entropy": {},
}


def backend_report() -> dict[str, backend.Choice]:
    """For every op: (implementation, reason) for GPT-2's shapes on this machine's first device.

    linear_cross_entropy has no entry of its own: it is a linear followed by cross_entropy.
    """
    on_gpu = torch.cuda.is_available()
    probe = torch.empty(1, device="cuda", dtype=torch.bfloat16) if on_gpu else torch.empty(1)
    report = {}
    for op, facts in _TYPICAL.items():
        try:
            report[op] = backend.explain(op, ops.why_not, (probe,), facts)
        except RuntimeError as error:  # mode "triton" where it cannot run
            report[op] = backend.Choice("none", str(error))
    report["linear_cross_entropy"] = report["cross_entropy"]
    return report


def versions() -> dict[str, str]:
    """Device and versions, as every report and benchmark record carries them."""
    on_gpu = torch.cuda.is_available()
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "flash-attn", "tiktoken", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: `fastgpt info` takes no arguments."""


def main(args: argparse.Namespace) -> int:
    for name, version in versions().items():
        print(f"{name:<14}{version}")
    print()
    for op, choice in backend_report().items():
        print(f"{op:<26}{choice.implementation:<12}{choice.reason}")
    return 0
