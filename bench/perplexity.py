"""What reading the weights in fewer bits costs: a checkpoint's perplexity in each dtype.

    python -m bench.perplexity --out out --data data

The text is the data's validation split, `windows` stretches of block_size tokens at even distances.
Every token's loss is that of the logits sampling would draw it from, step by step through the
cache; the first token of a window has none.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import GPT, checkpoint, devices
from fastgpt.commands.sample import WEIGHTS
from fastgpt.data import load_split
from fastgpt.sampling import NextLogits


@torch.no_grad()
def mean_loss(model: GPT, windows: Tensor, dtype: torch.dtype) -> float:
    """Of each token but the first in windows (B, T), in nats."""
    B, T = windows.shape
    next_logits, losses = NextLogits(model, [0] * B, T, dtype), []
    for t in range(1, T):
        logits = next_logits(windows[:, :t]).float()
        losses.append(F.cross_entropy(logits, windows[:, t]))
    return torch.stack(losses).double().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.perplexity", description=__doc__)
    parser.add_argument("--out", type=Path, default="out", help="folder of ckpt.pt (%(default)s)")
    parser.add_argument("--data", type=Path, default="data", help="folder of val.bin (%(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--windows", type=int, default=8, help="at most 8 are fast (%(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args(argv)
    try:
        device = devices.pick_device(args.device)
        model = checkpoint.load_model(checkpoint.load_checkpoint(args.out / "ckpt.pt"))
        tokens = load_split(args.data, "val")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    length = model.config.block_size
    if args.windows < 1 or args.windows * length > len(tokens):
        parser.error(f"--windows {args.windows} of {length} tokens are not in {len(tokens)}")
    starts = [i * (len(tokens) // args.windows) for i in range(args.windows)]
    windows = torch.stack([tokens[start : start + length] for start in starts]).long().to(device)
    model.to(device).eval()
    first = math.nan
    for name in args.dtype:
        start = time.perf_counter()
        loss = mean_loss(model, windows, WEIGHTS[name])
        seconds = time.perf_counter() - start
        first = loss if math.isnan(first) else first
        print(
            f"{name:9} perplexity {math.exp(loss):.4f} ({math.exp(loss - first) - 1:+.3%} of "
            f"{args.dtype[0]}'s), {windows.numel() / seconds:.0f} tokens/s"
        )
        print(json.dumps({"dtype": name, "loss": loss, "tokens": windows.numel() - len(windows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
