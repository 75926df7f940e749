"""Training tokens/s on this device: eager PyTorch, compiled PyTorch, fastgpt, side by side.

Every variant has its own copy of the same initial model, sees the same batches and takes the same
number of steps. Short rounds of the variants alternate, so that a machine that slows down slows all
of them; the medians over rounds are compared, and only after the losses agreed. `python -m
bench.train --help`.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.report import backend_report, versions

SIZES = {  # n_layer, n_head, n_embd, vocab_size, block_size, batch size
    "char": (4, 4, 128, 65, 128, 16),
    "124M": (12, 12, 768, 50304, 1024, 16),
    "350M": (24, 16, 1024, 50304, 1024, 16),
}
VARIANTS = ("eager", "compile", "fastgpt")


class Trainee:
    """One variant in training."""

    def __init__(self, variant: str, config: GPTConfig, device: str, dtype: torch.dtype):
        torch.manual_seed(1337)
        self.variant = variant
        self.backend = "auto" if variant == "fastgpt" else "torch"
        raw = GPT(config).to(device)
        self.optimizer = raw.configure_optimizers(0.1, 6e-4, (0.9, 0.95), torch.device(device).type)
        self.model: Callable[..., Any] = torch.compile(raw) if variant == "compile" else raw
        self.params = list(raw.parameters())
        low = dtype != torch.float32
        self.context = lambda: (
            torch.autocast(torch.device(device).type, dtype) if low else nullcontext()
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []  # per step, one entry a round
        self.first_step = math.nan
        self.problem = ""

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with use_backend(self.backend):
            with self.context():
                _, loss = self.model(x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def round(self, batches: list[torch.Tensor]) -> None:
        """Train on all batches; the very first step is timed apart, as the wait before training."""
        for x in batches[:1] if not self.losses else []:
            start = time.perf_counter()
            self.losses.append(self.step(x[:, :-1], x[:, 1:]).item())
            self.first_step = time.perf_counter() - start
        start = time.perf_counter()
        losses = [self.step(x[:, :-1], x[:, 1:]) for x in batches]
        self.losses += [loss.item() for loss in losses]  # waits for the device
        self.seconds.append((time.perf_counter() - start) / len(batches))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    n_layer, n_head, n_embd, vocab_size, block_size, batch_size = SIZES[args.size]
    B, T = args.batch_size or batch_size, block_size
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False)
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(vocab_size, (B, T + 1), generator=generator) for _ in range(args.steps)
    ]
    batches = [x.to(args.device) for x in batches]
    trainees = [Trainee(variant, config, args.device, dtype) for variant in args.variants]
    for i in range(args.rounds + 1):
        print(f"\rround {i}/{args.rounds} ", end="", file=sys.stderr, flush=True)
        for trainee in trainees:
            try:
                if not trainee.problem:
                    trainee.round(batches)
            except Exception as error:  # a variant that cannot run here is a row that says so
                trainee.problem = (
                    f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
                )
    print(file=sys.stderr)
    return {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": versions(),
        "settings": {"size": args.size, "B": B, "T": T, "dtype": args.dtype, "steps": args.steps},
        "backend": {op: choice.implementation for op, choice in backend_report().items()},
        "rows": [_row(trainee, trainees[0], B * T) for trainee in trainees],
    }


def _row(trainee: Trainee, eager: Trainee, tokens: int) -> dict[str, Any]:
    if problem := trainee.problem or (eager.problem and "eager, its yardstick, failed"):
        return {"variant": trainee.variant, "problem": problem}
    # two summation orders drift apart slowly; a wrong gradient shows within a few steps
    gap = max(abs(a - b) for a, b in zip(trainee.losses, eager.losses, strict=True))
    if not gap < 0.02:
        problem = f"losses are up to {gap:.3g} from eager's: not timed"
        return {"variant": trainee.variant, "problem": problem}
    timed = trainee.seconds[1:]  # the first round warms up
    return {
        "variant": trainee.variant,
        "tokens_per_second": tokens / statistics.median(timed),
        "over_eager": statistics.median(
            e / t for e, t in zip(eager.seconds[1:], timed, strict=True)
        ),
        "first_step_seconds": trainee.first_step,
        "final_loss": trainee.losses[-1],
        "samples_seconds": timed,
    }


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.train", description="training tokens/s")
    parser.add_argument("--size", choices=SIZES, default="124M" if on_gpu else "char")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    low = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=low)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="per round and variant")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the record")
    args = parser.parse_args()
    if args.variants[0] != "eager":
        parser.error(f"--variants starts with {args.variants[0]}; ratios need eager first")

    record = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"train-{args.size}-{record['date'].replace(':', '')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['environment']['device']}, {record['settings']}")
    print(f"{'variant':10} {'tokens/s':>10} {'x eager':>8} {'first step s':>13} {'final loss':>11}")
    for row in record["rows"]:
        if "problem" in row:
            print(f"{row['variant']:10} {row['problem']}")
            continue
        print(
            f"{row['variant']:10} {row['tokens_per_second']:10,.0f} {row['over_eager']:8.2f} "
            f"{row['first_step_seconds']:13.2f} {row['final_loss']:11.4f}"
        )
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
