"""`fastgpt tune`: measure this device once, so that dispatch and launches follow the measurement.

First launch_search.py, then implementation_race.py between kernels as they will be launched. What
wins is written to the user's cache folder (kernels/_tuned.py), where every process of the machine
reads it.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from fastgpt.commands import implementation_race, launch_search
from fastgpt.commands.options import number
from fastgpt.commands.searches import Sizes
from fastgpt.kernels import _tuned
from fastgpt.storage import files


def choose(races: list[dict[str, Any]], searched: list[dict[str, Any]]) -> dict[str, Any]:
    """What won by more than noise, as _tuned.entry reads it."""
    return {
        "date": datetime.date.today().isoformat(),
        "implementations": implementation_race.winners(races),
        "configs": launch_search.winners(searched),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = number(int, 1, 2**31)
    parser.add_argument(
        "--seconds", type=number(float, 1), default=600, help="of measuring (%(default)g)"
    )
    parser.add_argument("--n-embd", type=size, default=768, help="model width (%(default)s)")
    parser.add_argument("--n-head", type=size, default=12, help="attention heads (%(default)s)")
    parser.add_argument("--vocab-size", type=size, default=50304, help="(%(default)s)")
    parser.add_argument("--tokens", type=size, default=16384, help="in a batch (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", default=[],
                        help="search these kernels' configurations, and race nothing")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise RuntimeError("fastgpt tune measures kernels on a CUDA GPU, and PyTorch sees none")
    if args.n_embd % args.n_head:
        raise ValueError(f"--n-embd {args.n_embd} is not divisible by --n-head {args.n_head}")
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    sizes = Sizes(args.tokens, args.n_embd, args.n_embd // args.n_head, args.vocab_size)
    path = _tuned.path(name)
    entry = _tuned.of_user(name)  # stays where nothing new wins: candidates were held against it
    seconds = args.seconds if args.only else 0.7 * args.seconds
    searched = launch_search.search(device, sizes, seconds, args.only)
    _write(path, _tuned.joined(entry, choose([], searched)))
    races = [] if args.only else implementation_race.race(device, sizes, 0.3 * args.seconds)
    chosen = _tuned.joined(entry, choose(races, searched))
    _write(path, chosen)
    for row in (*races, *searched):
        result = row.get("problem") or f"{row['microseconds']:.1f} us"
        print(f"{row.get('op') or row['kernel']:28} {row['variant']:12} {result}")
    print(f"\n{json.dumps(chosen, indent=1)}\nwritten to {path}; read at every start")
    return 0


def _write(path: Path, entry: dict[str, Any]) -> None:
    """In one step, so that no process reads half of it. This process reads it anew."""
    files.write_bytes(path, (json.dumps(entry, indent=1) + "\n").encode())
    _tuned.forget()
