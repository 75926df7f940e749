"""Training tokens/s on this device: PyTorch, its compiler, nanoGPT, its peers and fastgpt.

Every variant starts from the same weights, sees the same batches and takes the same number of
steps. Short rounds of the variants alternate, so that a machine that slows down slows all of them;
what is compared are the ratios within a round. A variant whose losses are not eager's keeps its
time, with a flag. Where the variants' weights and optimizer states do not fit in memory together,
each is built, timed and let go in turn, then once more in the opposite order (A B C, C B A). One
record per size, batch size and dtype, written whenever a variant has more to show.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness import fit, machine, nvidia_smi, record
from bench.harness.ceilings import matmul_ceiling
from bench.harness.trainee import Trainee, empty_caches
from bench.peers import models
from bench.peers.models import SIZES
from bench.peers.training import DTYPES, VARIANTS, Run, batches, matmul_dtype, set_precision
from fastgpt import GPT, GPTConfig, devices
from fastgpt.environment import backend_report

# Of what the loss fell by, or of 1 where that is more: two summation orders drift apart slowly, a
# wrong gradient shows within a few steps.
MAX_LOSS_GAP = {"float32": 0.002, "tf32": 0.01, "bfloat16": 0.01, "float16": 0.01}
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


class Progress:
    """The record of a run under way. It is written whenever a variant has more to show, so that
    whatever ends the process leaves what was measured until then."""

    def __init__(self, settings: Settings, device: torch.device, variants: list[str], out: Path):
        self.settings, self.variants = settings, variants
        self.before = nvidia_smi.reading()
        quiet = machine.check()
        say(machine.warning(quiet))
        set_precision(settings.dtype)
        self.ceiling = matmul_ceiling(device, matmul_dtype(settings.dtype))
        self.config = models.config_of(settings.size, settings.T)
        self.flops = _flops(self.config, settings.B)
        self.peak = devices.peak_flops(device)
        self.record = record.new(
            "train",
            {**dataclasses.asdict(settings), "order": IN_TURNS},
            [{"variant": variant, "problem": UNTIMED} for variant in variants],
            {"before": self.before} if self.before else {},
            machine=quiet,
            peers=models.versions(),
            backend={op: choice.implementation for op, choice in backend_report().items()},
            matmul_ceiling=self.ceiling,
        )
        self.path = record.save(self.record, out)

    def write(self, order: str, trainees: list[Trainee]) -> None:
        """A trainee that has nothing to show yet leaves the row of an earlier attempt as it is."""
        self.record["settings"]["order"] = order
        for i, trainee in enumerate(trainees):
            if trainee.samples or trainee.problem:
                self.record["rows"][i] = self._row(trainee, trainees)
        record.write(self.record, self.path)

    def end(self) -> None:
        self.record["gpu"] = nvidia_smi.since(self.before)
        record.write(self.record, self.path)

    def _row(self, trainee: Trainee, all_of_them: list[Trainee]) -> Row:
        if not trainee.samples:
            return {"variant": trainee.variant, "problem": trainee.problem}
        settings, samples = self.settings, list(trainee.timed().values())
        seconds, flops = statistics.median(samples), self.flops
        is_16_bit = settings.dtype in ("bfloat16", "float16")  # what the datasheet's peak is for
        gap, doubts = _compare_losses(trainee, all_of_them, settings.dtype)
        if trainee.EARLY in trainee.timed():
            doubts.append("timed in one round only, right after its first steps")
        if trainee.problem:
            doubts.append(f"it stopped early: {trainee.problem}")
        row = {
            "variant": trainee.variant,
            "seconds": samples,
            "tokens_per_second": settings.B * settings.T / seconds,
            "ms": {name: 1e3 * _quantile(samples, q) for name, q in _QUANTILES.items()},
            "over_eager": _ratio(all_of_them[0], trainee),
            "mfu": flops / seconds / self.peak if is_16_bit and self.peak == self.peak else None,
            "of_matmul_ceiling": flops / seconds / self.ceiling,
            "peak_bytes": trainee.peak_bytes,
            "first_step_seconds": trainee.first_step,
            "attention": trainee.attention,
            "final_loss": trainee.losses[-1] if math.isfinite(trainee.losses[-1]) else None,
            "loss_gap": gap,
        }
        return row | ({"flag": "; ".join(doubts)} if doubts else {})


def measure(
    settings: Settings, device: torch.device, variants: list[str], out: Path
) -> tuple[Progress, list[str]]:
    """The finished record, and the variants that a lost device left without a turn."""
    progress = Progress(settings, device, variants, out)
    config = progress.config
    untried: list[str] = []
    needed = fit.step_bytes(config, settings.B, settings.dtype)
    if problem := fit.missing(needed, device):
        rows = [{"variant": variant, "problem": problem} for variant in variants]
        progress.record["rows"] = rows
    else:
        trainees = _train(config, settings, device, progress)
        if any(t.device_lost for t in trainees) and not trainees[0].problem:
            untried = [t.variant for t in trainees if not t.samples and not t.problem]
    progress.end()
    return progress, untried


def _train(
    config: GPTConfig, settings: Settings, device: torch.device, progress: Progress
) -> list[Trainee]:
    run = Run(config, models.initial_weights(config, device), device, settings.dtype)
    data = batches(config, settings.B, settings.steps, device)
    with empty_caches() as caches:

        def trainees() -> list[Trainee]:
            return [Trainee(variant, run, data, caches) for variant in progress.variants]

        if fit.all_at_once(config, settings.B, settings.dtype, device, len(progress.variants)):
            done = _in_turns(trainees(), settings.rounds, progress)
            if not any(trainee.out_of_memory for trainee in done):
                return done
        return _one_at_a_time(trainees(), settings.rounds, progress)


def _in_turns(trainees: list[Trainee], rounds: int, progress: Progress) -> list[Trainee]:
    def all_try(action: Callable[..., None], *args: Any) -> None:
        for trainee in trainees:
            trainee.attempt(action, *args)

    for trainee in trainees:
        say(f"first steps of {trainee.variant}")
        trainee.attempt(Trainee.build)
        trainee.attempt(Trainee.round, Trainee.EARLY)
        progress.write(IN_TURNS, trainees)
        if any(t.device_lost for t in trainees):
            return trainees
    crowded = any(trainee.out_of_memory for trainee in trainees)
    for i in range(0 if crowded else rounds):
        say(f"round {i + 1} of {rounds}")
        all_try(Trainee.round, i)
        progress.write(IN_TURNS, trainees)
    all_try(Trainee.look)
    progress.write(IN_TURNS, trainees)
    for trainee in trainees:
        if not trainee.device_lost:
            trainee.release()
    return trainees


def _one_at_a_time(trainees: list[Trainee], rounds: int, progress: Progress) -> list[Trainee]:
    """A machine that slows down steadily costs each the same: the passes' middles coincide."""
    half = -(-rounds // 2)
    passes = [(t, 0) for t in trainees] + [(t, half) for t in reversed(trainees)]
    for trainee, first in passes:
        say(f"{trainee.variant}, alone")
        trainee.attempt(Trainee.build)
        for i in range(half):
            trainee.attempt(Trainee.round, first + i)
        trainee.attempt(Trainee.look)
        progress.write(ALONE, trainees)
        if trainee.device_lost:
            break
        trainee.release()
    return trainees


def _flops(config: GPTConfig, batch_size: int) -> float:
    """Of one step, as estimate_mfu counts them."""
    with models.quietly(), torch.device("meta"):
        return GPT(config).estimate_mfu(batch_size, dt=1.0, peak_flops=1.0)


def _compare_losses(
    trainee: Trainee, all_of_them: list[Trainee], dtype: str
) -> tuple[float | None, list[str]]:
    """The largest distance from eager's losses, step by step, and why it is too large, if it is.
    Where eager could not run, the first that could stands in."""
    ran = [t for t in all_of_them if t.losses]
    if len(ran) < 2:
        return None, ["no other variant ran to compare its losses with"]
    pairs = list(zip(trainee.losses, ran[0].losses, strict=False))  # one may be steps ahead
    if not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        return None, [f"its losses or those of {ran[0].variant} are not finite"]
    gap = max(abs(a - b) for a, b in pairs)
    wanted = [b for _, b in pairs]
    if gap < MAX_LOSS_GAP[dtype] * max(1.0, wanted[0] - min(wanted)):
        return gap, []
    return gap, [f"losses are up to {gap:.3g} from those of {ran[0].variant}"]


_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


def _quantile(samples: list[float], q: float) -> float:
    """With few samples p10 and p90 are the extremes; nothing is interpolated beyond them."""
    if q == 0.5:
        return statistics.median(samples)
    return sorted(samples)[round(q * (len(samples) - 1))]


def _ratio(eager: Trainee, other: Trainee) -> float | None:
    """How many times as fast as eager, turn by turn."""
    ours = other.timed()
    ratios = [eager.samples[turn] / ours[turn] for turn in ours if turn in eager.samples]
    return statistics.median(ratios) if ratios else None


def table(found: record.Record) -> str:
    settings, rows = found["settings"], found["rows"]
    lines = [
        f"{found['environment']['device']}: training, "
        f"{settings['size']} B={settings['B']} T={settings['T']} {settings['dtype']}, "
        f"{settings['order']}; matmul ceiling {found['matmul_ceiling'] / 1e12:.3g} TFLOP/s",
        f"{'variant':20}{'tokens/s':>10}{'x eager':>9}{'ms/step (p10 to p90)':>30}{'MFU':>6}"
        f"{'ceiling':>9}{'peak GB':>9}{'1st step s':>12}{'loss':>9}  attention",
    ]
    for row in rows:
        if "problem" in row:
            lines.append(f"{row['variant']:20}{row['problem']}")
            continue
        ms = row["ms"]
        spread = f"{ms['median']:.2f} ({ms['p10']:.2f} to {ms['p90']:.2f})"
        lines.append(
            f"{row['variant']:20}{row['tokens_per_second']:10,.0f}{_shown(row['over_eager'], 9)}"
            f"{spread:>30}{_shown(row['mfu'], 6, '.0%')}{row['of_matmul_ceiling']:9.0%}"
            f"{_shown(row['peak_bytes'] and row['peak_bytes'] / 1e9, 9, '.1f')}"
            f"{row['first_step_seconds']:12.1f}{_shown(row['final_loss'], 9, '.4f')}"
            f"  {row['attention']}"
        )
        if "flag" in row:
            lines.append(f"{'':20}! {row['flag']}")
    return "\n".join([*lines, *filter(None, [machine.warning(found["machine"])])])


def _shown(value: float | None, width: int, form: str = ".2f") -> str:
    return f"{'' if value is None else format(value, form):>{width}}"


def say(what: str) -> None:
    """On the one line of progress, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What bench.memory asks for too."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["124M" if on_gpu else "char"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[16], metavar="B")
    parser.add_argument("--block-size", type=int, metavar="T", help="default: the size's own")
    low = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[low])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the records")


def checked(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, torch.device]:
    """What argparse alone cannot see, found before anything runs."""
    args = parser.parse_args(argv)
    try:
        device = devices.pick_device(args.device)
        for size in args.size:
            models.config_of(size, args.block_size)
        if any("nanogpt" in v or "liger" in v for v in args.variants):
            models.check_nanogpt()
    except (ValueError, RuntimeError) as error:  # RuntimeError: no such device
        parser.error(str(error))
    if min(args.batch_size) < 1:
        parser.error(f"--batch-size {min(args.batch_size)} must be at least 1")
    if "tf32" in args.dtype and device.type != "cuda":
        parser.error(f"--dtype tf32 is for CUDA; on {device} use float32 or bfloat16")
    if args.variants[0] != "eager":
        parser.error(f"--variants starts with {args.variants[0]}; ratios need eager first")
    return args, device


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="per round and variant (%(default)s)")
    args, device = checked(parser, argv)
    if min(args.rounds, args.steps) < 1:
        parser.error(f"--rounds {args.rounds} and --steps {args.steps} must be at least 1")

    for size, B, dtype in itertools.product(args.size, args.batch_size, args.dtype):
        T = models.config_of(size, args.block_size).block_size
        settings = Settings(size, B, T, dtype, args.rounds, args.steps)
        done, untried = measure(settings, device, args.variants, args.out)
        say("")
        print(f"\n{table(done.record)}\nrecord: {done.path}", flush=True)
        if untried:
            print(f"the device was lost; a new process runs {', '.join(untried)}", flush=True)
            _in_a_new_process(settings, args, ["eager", *untried])
    return 0


def _in_a_new_process(settings: Settings, args: argparse.Namespace, variants: list[str]) -> None:
    """Where a fault has made this one's device useless. It takes a record of its own."""
    options = {"size": settings.size, "batch-size": settings.B, "block-size": settings.T}
    options |= {"dtype": settings.dtype, "rounds": settings.rounds, "steps": settings.steps}
    options |= {"device": args.device, "out": args.out}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.train", *words, "--variants", *variants]
    subprocess.run(command, cwd=Path(__file__).parents[1])


if __name__ == "__main__":
    sys.exit(main())
