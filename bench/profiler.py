"""Where a training step's time goes, against the time it must take: `make profile`.

A few steps run under torch.profiler. The table has a row per group of roofline.py: its time per
step, the floor of that group at this device's measured ceilings, and the difference. "the rest" is
what a fused step would not have: casts, copies, additions. Gaps are times when the device (on a
CPU: PyTorch) had nothing to do, because the host was late. Tensors that stay in a cache, as a small
model's do on a CPU, may go below a floor of memory. The trace is for chrome://tracing or
perfetto.dev.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.harness import roofline, timeline
from bench.peers import models, training
from fastgpt import devices


def trace(step: training.Step, run: training.Run, B: int, count: int, path: Path) -> None:
    """Write the trace of `count` steps after as many to warm up."""
    T, V = run.config.block_size, run.config.vocab_size
    tokens = torch.randint(V, (B, T + 1)).to(run.device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(count):
        step(idx, targets)
    _wait(run.device)
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(count):
            step(idx, targets)
        _wait(run.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(path))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(
    spans: list[timeline.Span],
    shape: roofline.Shape,
    ceilings: roofline.Ceilings,
    count: int,
    names: int = 15,
) -> str:
    """The tables of `count` profiled steps."""
    floors = roofline.by_group(list(roofline.training_step(shape)), ceilings)
    by_group = {group: seconds / count for group, seconds in timeline.by_group(spans).items()}
    wall = (max(span.end for span in spans) - spans[0].start) / count
    lines = [f"{'ms per step':<16}{'time':>10}{'floor':>10}{'above':>10}{'x floor':>9}"]
    for group in [*by_group, *(g for g in floors if g not in by_group)]:
        time, floor = 1e3 * by_group.get(group, 0.0), 1e3 * floors.get(group, 0.0)
        times = f"{time / floor:9.1f}" if floor else " " * 9
        lines.append(f"{group:<16}{time:10.3f}{floor:10.3f}{time - floor:10.3f}{times}")
    idle = timeline.gaps(spans)
    waited = sum(gap.seconds for gap in idle) / count
    total = sum(floors.values())
    lines.append(f"{'gaps':<16}{1e3 * waited:10.3f}{0:10.3f}{1e3 * waited:10.3f}")
    lines.append(f"{'step':<16}{1e3 * wall:10.3f}{1e3 * total:10.3f}{1e3 * (wall - total):10.3f}"
                 f"{wall / total:9.1f}")  # fmt: skip
    lines += ["", f"{'longest of':<11}{'ms/step':>10}{'calls':>8}  {'group':<14}name"]
    for (name, group), calls in itertools.islice(timeline.by_name(spans).items(), names):
        per_step = 1e3 * sum(calls) / count
        lines.append(f"{'':<11}{per_step:10.3f}{len(calls) / count:8.1f}  {group:<14}{name[:80]}")
    lines += ["", f"{len(idle) / count:.0f} gaps per step; the longest, us:"]
    lines += [f"{1e6 * gap.seconds:10.1f}  after {_short(gap.before)}, before {_short(gap.after)}"
              for gap in idle[:5]]  # fmt: skip
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.removeprefix("autograd::engine::evaluate_function: ")[:50]


def main() -> int:
    device = devices.pick_device(None)
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(prog="python -m bench.profiler", description=__doc__)
    parser.add_argument("--size", choices=models.SIZES, default="124M" if on_gpu else "char")
    parser.add_argument("--batch-size", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--variant", choices=training.VARIANTS, default="fastgpt")
    dtype = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", choices=training.DTYPES, default=dtype)
    parser.add_argument("--steps", type=int, default=3, help="profiled, after as many to warm up")
    parser.add_argument("--out", type=Path, default=Path("out/profile"), help="folder of the trace")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} profiles nothing; use at least 1")

    training.set_precision(args.dtype)
    config = models.config_of(args.size)
    run = training.Run(config, models.initial_weights(config, device), device, args.dtype)
    path = args.out / f"{args.variant}-{args.size}-B{args.batch_size}.json"
    ceilings = roofline.measure(device, training.matmul_dtype(args.dtype), 2.0)
    trace(training.VARIANTS[args.variant](run), run, args.batch_size, args.steps, path)
    shape = roofline.shape_of(args.size, args.batch_size, config.block_size, args.dtype)
    spans = timeline.spans(json.loads(path.read_text()), shape)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    print(f"{args.variant}, {args.size}, B={args.batch_size}, {args.dtype}, on {name}")
    print(f"floor from {ceilings.flops / 1e12:.3g} TFLOP/s and {ceilings.bandwidth / 1e9:.4g} GB/s"
          f" ({ceilings.source})\n")  # fmt: skip
    print(report(spans, shape, ceilings, args.steps))
    print(f"trace: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
