"""The record of a training benchmark under way, and what it says of every variant.

over_eager   median over the turns of eager's seconds over the variant's
mfu          FLOPs as estimate_mfu counts them, over the datasheet's dense peak in 16 bits
loss_gap     the largest distance from eager's losses, step by step
kernels      what the device ran in one profiled step: name, launches, microseconds; [] on a CPU
span_us      from the first of them to the end of the last
flag         why the figures are to be doubted: losses that differ, an early end
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine, nvidia_smi, record
from bench.harness.training_variant import Variant
from bench.peers import models
from fastgpt import GPT, GPTConfig, devices
from fastgpt.environment import backend_report

# Of what the loss fell by, or of 1 where that is more: two summation orders drift apart slowly, a
# wrong gradient shows within a few steps. In 16 bits nanoGPT under torch.compile came 0.023 away
# from eager in 50 steps of 124M.
MAX_LOSS_GAP = {"float32": 0.002, "tf32": 0.01, "bfloat16": 0.03, "float16": 0.03}
IN_TURNS, ALONE = "in turns", "one at a time, in two passes of opposite order"
UNTIMED = "the run ended before it was timed"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one record is about; its fields are the record's `settings`."""

    size: str
    B: int
    T: int
    dtype: str
    rounds: int
    steps: int  # a round


class TrainingRecord:
    """The record of a run under way. It is written whenever a variant has more to show, so that
    whatever ends the process leaves what was measured until then."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        names: list[str],
        gpu_before: nvidia_smi.Reading,
        host: machine.Machine,
        matmul_ceiling: float,
    ):
        self.settings, self.gpu_before, self.ceiling = settings, gpu_before, matmul_ceiling
        self.config = models.config_of(settings.size, settings.T)
        self.flops = _flops(self.config, settings.B)
        self.peak = devices.peak_flops(device)
        self.path = Path()
        self.record = record.new(
            "train",
            {**dataclasses.asdict(settings), "order": IN_TURNS},
            [{"variant": name, "problem": UNTIMED} for name in names],
            {"before": gpu_before} if gpu_before else {},
            machine=host,
            peers=models.versions(),
            backend={op: choice.implementation for op, choice in backend_report().items()},
            matmul_ceiling=matmul_ceiling,
        )

    def save(self, results: Path) -> None:
        self.path = record.save(self.record, results)

    def update(self, order: str, variants: list[Variant]) -> None:
        """A variant that has nothing to show yet keeps the row of an earlier attempt."""
        self.record["settings"]["order"] = order
        for i, variant in enumerate(variants):
            if variant.samples or variant.problem:
                self.record["rows"][i] = self._row(variant, variants)
        record.write(self.record, self.path)

    def refuse_all(self, problem: str) -> None:
        for row in self.record["rows"]:
            row["problem"] = problem

    def end(self) -> None:
        self.record["gpu"] = nvidia_smi.since(self.gpu_before)
        record.write(self.record, self.path)

    def _row(self, variant: Variant, all_of_them: list[Variant]) -> Row:
        if not variant.samples:
            return {"variant": variant.name, "problem": variant.problem}
        settings, samples = self.settings, list(variant.timed().values())
        seconds, flops = statistics.median(samples), self.flops
        is_16_bit = settings.dtype in ("bfloat16", "float16")  # what the datasheet's peak is for
        gap, doubts = _compare_losses(variant, all_of_them, settings.dtype)
        if variant.EARLY in variant.timed():
            doubts.append("timed in one round only, right after its first steps")
        if variant.problem:
            doubts.append(f"it stopped early: {variant.problem}")
        row = {
            "variant": variant.name,
            "seconds": samples,
            "tokens_per_second": settings.B * settings.T / seconds,
            "ms": {name: 1e3 * _quantile(samples, q) for name, q in _QUANTILES.items()},
            "over_eager": _ratio(all_of_them[0], variant),
            "mfu": flops / seconds / self.peak if is_16_bit and self.peak == self.peak else None,
            "of_matmul_ceiling": flops / seconds / self.ceiling,
            "peak_bytes": variant.peak_bytes,
            "first_step_seconds": variant.first_step,
            "attention": variant.attention,
            "kernels": variant.kernels,
            "span_us": variant.span,
            "final_loss": variant.losses[-1] if math.isfinite(variant.losses[-1]) else None,
            "loss_gap": gap,
        }
        return row | ({"flag": "; ".join(doubts)} if doubts else {})


def _flops(config: GPTConfig, batch_size: int) -> float:
    """Of one step, as estimate_mfu counts them."""
    with models.quietly(), torch.device("meta"):
        return GPT(config).estimate_mfu(batch_size, dt=1.0, peak_flops=1.0)


def _compare_losses(
    variant: Variant, all_of_them: list[Variant], dtype: str
) -> tuple[float | None, list[str]]:
    """The largest distance from eager's losses, step by step, and why it is too large, if it is.
    Where eager could not run, the first that could stands in."""
    ran = [v for v in all_of_them if v.losses]
    if len(ran) < 2:
        return None, ["no other variant ran to compare its losses with"]
    pairs = list(zip(variant.losses, ran[0].losses, strict=False))  # one may be steps ahead
    if not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        return None, [f"its losses or those of {ran[0].name} are not finite"]
    gap = max(abs(a - b) for a, b in pairs)
    wanted = [b for _, b in pairs]
    if gap < MAX_LOSS_GAP[dtype] * max(1.0, wanted[0] - min(wanted)):
        return gap, []
    return gap, [f"losses are up to {gap:.3g} from those of {ran[0].name}"]


_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


def _quantile(samples: list[float], q: float) -> float:
    """With few samples p10 and p90 are the extremes; nothing is interpolated beyond them."""
    if q == 0.5:
        return statistics.median(samples)
    return sorted(samples)[round(q * (len(samples) - 1))]


def _ratio(eager: Variant, other: Variant) -> float | None:
    """How many times as fast as eager, turn by turn."""
    times = other.timed()
    ratios = [eager.samples[turn] / times[turn] for turn in times if turn in eager.samples]
    return statistics.median(ratios) if ratios else None
