"""Training tokens/s on this device: PyTorch, its compiler, nanoGPT, its peers and fastgpt.

Every variant starts from the same weights, sees the same batches and takes the same number of
steps. Short rounds of the variants alternate, so that a machine that slows down slows all of them;
what is compared are the ratios within a round. A variant whose losses are not eager's keeps its
time, with a flag. Where the variants' weights and optimizer states do not fit in memory together,
each is built, timed and let go in turn, then once more in the opposite order (A B C, C B A). One
record per size, batch size and dtype, written whenever a variant has more to show.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine, memory_budget, nvidia_smi, record
from bench.harness.ceilings import matmul_ceiling
from bench.harness.training_record import ALONE, IN_TURNS, Settings, TrainingRecord
from bench.harness.training_variant import Variant, empty_caches
from bench.peers import models
from bench.peers.models import SIZES
from bench.peers.training import DTYPES, VARIANTS, Run, batches, matmul_dtype, set_precision
from bench.reports import terminal
from fastgpt import devices


def measure(
    settings: Settings, device: torch.device, names: list[str], out: Path
) -> tuple[TrainingRecord, list[str]]:
    """The finished record, and the variants that a lost device left without a turn."""
    before, host = nvidia_smi.reading(), machine.check(device=device)
    say(machine.warning(host))
    set_precision(settings.dtype)
    ceiling = matmul_ceiling(device, matmul_dtype(settings.dtype))
    growing = TrainingRecord(settings, device, names, before, host, ceiling)
    growing.save(out)
    needed = memory_budget.step_bytes(growing.config, settings.B, settings.dtype)
    untried: list[str] = []
    if problem := memory_budget.missing(needed, device):
        growing.refuse_all(problem)
    else:
        variants = _train(growing, device, names)
        if any(variant.device_lost for variant in variants) and not variants[0].problem:
            untried = [v.name for v in variants if not v.samples and not v.problem]
    growing.end()
    return growing, untried


def _train(growing: TrainingRecord, device: torch.device, names: list[str]) -> list[Variant]:
    config, settings = growing.config, growing.settings
    run = Run(config, models.initial_weights(config, device), device, settings.dtype)
    data = batches(config, settings.B, settings.steps, device)
    size = config, settings.B, settings.dtype
    with empty_caches() as caches:

        def variants() -> list[Variant]:
            return [Variant(name, run, data, caches) for name in names]

        if memory_budget.all_at_once(*size, device, len(names)):
            done = _in_turns(variants(), settings.rounds, growing)
            if not any(variant.out_of_memory for variant in done):
                return done
        return _one_at_a_time(variants(), settings.rounds, growing)


def _in_turns(variants: list[Variant], rounds: int, growing: TrainingRecord) -> list[Variant]:
    def all_try(action: Callable[..., None], *args: Any) -> None:
        for variant in variants:
            variant.attempt(action, *args)

    for variant in variants:
        say(f"first steps of {variant.name}")
        variant.attempt(Variant.build)
        variant.attempt(Variant.round, Variant.EARLY)
        growing.update(IN_TURNS, variants)
        if variant.device_lost:
            return variants
    crowded = any(variant.out_of_memory for variant in variants)
    for i in range(0 if crowded else rounds):
        say(f"round {i + 1} of {rounds}")
        all_try(Variant.round, i)
        growing.update(IN_TURNS, variants)
    all_try(Variant.look)
    growing.update(IN_TURNS, variants)
    for variant in variants:
        if not variant.device_lost:
            variant.release()
    return variants


def _one_at_a_time(variants: list[Variant], rounds: int, growing: TrainingRecord) -> list[Variant]:
    """A machine that slows down steadily costs each the same: the passes' middles coincide."""
    half = -(-rounds // 2)
    passes = [(v, 0) for v in variants] + [(v, half) for v in reversed(variants)]
    for variant, first in passes:
        say(f"{variant.name}, alone")
        variant.attempt(Variant.build)
        for i in range(half):
            variant.attempt(Variant.round, first + i)
        variant.attempt(Variant.look)
        growing.update(ALONE, variants)
        if variant.device_lost:
            break
        variant.release()
    return variants


def say(what: str) -> None:
    """Rewrite the one line of progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """bench.memory has them too."""
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
    """Check, before anything runs, what argparse cannot."""
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
        print(f"\n{terminal.text(done.record)}\nrecord: {done.path}", flush=True)
        if untried:
            print(f"the device was lost; a new process runs {', '.join(untried)}", flush=True)
            _in_a_new_process(settings, args, ["eager", *untried])
    return 0


def _in_a_new_process(settings: Settings, args: argparse.Namespace, variants: list[str]) -> None:
    """Called where a fault made this process's device useless. The new one has its own record."""
    options = {"size": settings.size, "batch-size": settings.B, "block-size": settings.T}
    options |= {"dtype": settings.dtype, "rounds": settings.rounds, "steps": settings.steps}
    options |= {"device": args.device, "out": args.out}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.train", *words, "--variants", *variants]
    subprocess.run(command, cwd=Path(__file__).parents[1])


if __name__ == "__main__":
    sys.exit(main())
