"""Peak memory of a training step, a variant at a time, each in a process of its own.

What counts is what came on top of a process that has only imported things: weights, optimizer
state, gradients, activations. On a CPU it is the growth of the peak resident size, which is what a
machine must have; on a GPU the peak of what PyTorch allocated there.

    python -m bench.memory --size 124M --batch-size 4 --variants eager nanogpt fastgpt-nologits
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from bench.harness import memory_budget, nvidia_smi, record, training_variant
from bench.peers import models
from bench.peers.training import VARIANTS, Run, batches, set_precision
from bench.reports import terminal
from bench.train import add_arguments, checked

STATUS = Path("/proc/self/status")
Row = dict[str, Any]


def peak_bytes(variant: str, size: str, B: int, T: int, dtype: str, device: torch.device) -> int:
    """Of two steps. To be called once in a process, before anything else took memory."""
    before = _peak(device)
    set_precision(dtype)
    config = models.config_of(size, T)
    step = VARIANTS[variant](Run(config, models.initial_weights(config, device), device, dtype))
    for x, y in batches(config, B, 2, device):
        step(x, y).item()
    return _peak(device) - before


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # ru_maxrss begins at that of the process which started this one
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(settings: dict[str, Any], device: torch.device, variants: list[str]) -> record.Record:
    before = nvidia_smi.reading()
    rows = [_row(variant, settings, device) for variant in variants]
    eager = rows[0].get("peak_bytes")
    for row in rows:
        if eager and "peak_bytes" in row:
            row["over_eager"] = row["peak_bytes"] / eager
    gpu = nvidia_smi.since(before)
    return record.new("memory", settings, rows, gpu, peers=models.versions())


def _row(variant: str, settings: dict[str, Any], device: torch.device) -> Row:
    config = models.config_of(settings["size"], settings["T"])
    needed = memory_budget.step_bytes(config, settings["B"], settings["dtype"])
    if problem := memory_budget.missing(needed, device):
        return {"variant": variant, "problem": problem}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            peak = process.submit(peak_bytes, variant, device=device, **settings).result()
        except BrokenProcessPool:
            return {"variant": variant, "problem": "its process was ended, for want of memory?"}
        except Exception as error:
            return {"variant": variant, "problem": training_variant.describe(error)}
    return {"variant": variant, "peak_bytes": peak}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    add_arguments(parser)
    args, device = checked(parser, argv)
    for size, B, dtype in itertools.product(args.size, args.batch_size, args.dtype):
        T = models.config_of(size, args.block_size).block_size
        run = measure({"size": size, "B": B, "T": T, "dtype": dtype}, device, args.variants)
        path = record.save(run, args.out)
        print(f"\n{terminal.text(run)}\nrecord: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
