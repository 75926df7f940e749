"""Does fastgpt learn what nanoGPT learns? Loss curves on real text, held against another seed's.

Every variant takes the same steps from the same initial weights on the same batches; the first one
does so once more from the weights of another seed. Rounding drives two such runs apart slowly, as
it does two runs of one program on two GPUs; a seed is a difference nobody would worry about.

    gap         mean over the steps of |loss - the first variant's loss|, both averaged over the
                last SMOOTH steps
    of a seed   gap over the gap between the two seeds: far below 1 is no difference

    NANOGPT_DIR=... python -m bench.curves --data FOLDER --steps 1000

FOLDER is one that `fastgpt prepare` or nanoGPT's prepare.py wrote.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import memory_budget, nvidia_smi, record, training_variant
from bench.peers import models
from bench.peers.training import DTYPES, VARIANTS, Run, set_precision
from bench.reports import terminal
from bench.train import say
from fastgpt import devices
from fastgpt.data import load_split, random_batch

SEEDS = 1337, 1338
SMOOTH = 20
Row = dict[str, Any]


def measure(
    settings: dict[str, Any], tokens: Tensor, variants: list[str], device: torch.device
) -> record.Record:
    """`settings`: size, B, T, dtype, steps."""
    before = nvidia_smi.reading()
    set_precision(settings["dtype"])
    first, *others = variants
    runs = [(first, SEEDS[0]), (first, SEEDS[1]), *((variant, SEEDS[0]) for variant in others)]
    rows = [_train(variant, seed, settings, tokens, device) for variant, seed in runs]
    rows[1]["variant"] += ", another seed"
    if "problem" not in rows[0]:
        _compare(rows)
    digest = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:12]
    settings = {**settings, "text": f"{len(tokens):,} tokens, sha256 {digest}"}
    gpu = nvidia_smi.since(before)
    return record.new("curves", settings, rows, gpu, peers=models.versions())


def _train(
    variant: str, seed: int, settings: dict[str, Any], tokens: Tensor, device: torch.device
) -> Row:
    """{"variant", "losses"}, one per step, or a row that says why not."""
    config = models.config_of(settings["size"], settings["T"])
    needed = memory_budget.step_bytes(config, settings["B"], settings["dtype"])
    if problem := memory_budget.missing(needed, device):
        return {"variant": variant, "problem": problem}
    try:
        weights = models.initial_weights(config, device, seed)
        step = VARIANTS[variant](Run(config, weights, device, settings["dtype"]))
        draw, losses = torch.Generator().manual_seed(0), []
        for i in range(settings["steps"]):
            losses.append(step(*random_batch(tokens, settings["B"], settings["T"], draw, device)))
            say(f"{variant}: step {i + 1}")
        return {"variant": variant, "losses": torch.stack(losses).float().tolist()}
    except Exception as error:
        return {"variant": variant, "problem": training_variant.describe(error)}


def _compare(rows: list[Row]) -> None:
    base = smooth(rows[0]["losses"])
    for row in rows:
        if "losses" in row:
            row["final_loss"] = smooth(row["losses"])[-1].item()
            row["gap"] = (smooth(row["losses"]) - base).abs().mean().item()
    for row in rows:
        if "gap" in row and rows[1].get("gap"):
            row["of_a_seed"] = row["gap"] / rows[1]["gap"]


def smooth(losses: list[float]) -> Tensor:
    """(steps - n + 1,) means over n = SMOOTH steps, or all if there are fewer."""
    return torch.tensor(losses).double().unfold(0, min(SMOOTH, len(losses)), 1).mean(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    on_gpu = torch.cuda.is_available()
    baseline = "nanogpt" if models.nanogpt_folder() else "eager"
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.bin")
    add("--size", choices=models.SIZES, default="124M" if on_gpu else "char")
    add("--batch-size", type=int, default=16, metavar="B")
    add("--block-size", type=int, metavar="T", help="default: the size's own")
    add("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    add("--steps", type=int, default=1000)
    add("--variants", nargs="+", choices=VARIANTS, default=[baseline, "fastgpt", "fastgpt-step"])
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--out", type=Path, default=record.RESULTS, help="folder of the records")
    args = parser.parse_args(argv)
    try:
        device, tokens = devices.pick_device(args.device), load_split(args.data, "train")
        config = models.config_of(args.size, args.block_size)
        models.check_nanogpt()
        if (largest := int((tokens.int() & 0xFFFF).max())) >= config.vocab_size:
            raise ValueError(
                f"{args.data} has id {largest}, {args.size} has a vocabulary of "
                f"{config.vocab_size}: prepare the text with another tokenizer, or change --size"
            )
        if min(args.batch_size, args.steps) < 1:
            raise ValueError(f"--batch-size {args.batch_size}, --steps {args.steps}: at least 1")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    settings = {"size": args.size, "B": args.batch_size, "T": config.block_size}
    settings |= {"dtype": args.dtype, "steps": args.steps}
    run = measure(settings, tokens, args.variants, device)
    print(f"\n{terminal.text(run)}\nrecord: {record.save(run, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
