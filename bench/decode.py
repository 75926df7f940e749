"""Decoding tokens/s and time to the first token, greedy, against what users would run.

    eager    nanoGPT's loop on fastgpt's model in PyTorch: each token a forward of all before it
    nanogpt  the checkout's own generate; in 16 bits under autocast, as its sample.py
    hf       transformers' generate with its key-value cache
    hf-static  the same with its static cache, which it compiles on a GPU
    fastgpt  its generate, with its cache

A variant is timed once its tokens are found to be the best ones, or as good as rounding can tell,
by eager's float32 logits. On a CPU fastgpt decodes for 20 seconds before that, in which it moves
weights to larger pages. The floor is what must be read for one token, every weight and the cached
keys and values, at the rate at which this device reads a large tensor, measured in every round.
"""

import argparse
import dataclasses
import functools
import itertools
import operator
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import machine, memory_budget, nvidia_smi, record
from bench.harness.ceilings import read_ceiling
from bench.harness.training_variant import describe
from bench.peers import models
from bench.peers.training import Run, matmul_dtype, set_precision
from bench.prediction import token
from bench.reports import terminal
from fastgpt import GPTConfig, devices, use_backend

# How far below the best a greedy token's logit may lie, in standard deviations of all logits.
# A lost context costs about 4, bf16's rounding 0.03 at 124M.
MAX_REGRET = {"float32": 0.001, "bfloat16": 0.2, "float16": 0.05}
WARM_UP = 20.0  # seconds, on a CPU
Generate = Callable[[Tensor, int], Tensor]  # ids (B, T) and n -> (B, T + n)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one record is about; its fields are the record's `settings`."""

    size: str
    prompt: int  # tokens
    new_tokens: int
    dtype: str
    rounds: int
    batch: int = 1

    def recorded(self) -> dict[str, Any]:
        """Without a batch of 1, which older records do not name."""
        fields = dataclasses.asdict(self)
        return fields if self.batch > 1 else {k: v for k, v in fields.items() if k != "batch"}


class Decoder:
    """One variant, and what it gave."""

    def __init__(self, variant: str, run: Run):
        self.variant = variant
        self.regret = 0.0
        self.first: list[float] = []  # seconds to the first token, one entry a round
        self.seconds: list[float] = []  # per token after the first
        self.problem = ""
        try:
            self.generate = VARIANTS[variant](run)
        except Exception as error:  # one that cannot run here becomes a row that says so
            self.problem = describe(error)

    def check(self, judge: torch.nn.Module, prompt: Tensor, n: int, limit: float) -> None:
        """Find a problem if the tokens are not the greedy ones."""
        try:
            self.regret = regret(judge, self.generate(prompt, n), prompt.size(1))
        except Exception as error:
            self.problem = describe(error)
        if not self.regret <= limit:
            self.problem = (
                f"its tokens are not the greedy ones: up to {self.regret:.3g} deviations below "
                "the best logit; not timed"
            )

    def round(self, prompt: Tensor, n: int) -> None:
        self.first.append(self._timed(prompt, 1))
        self.seconds.append((self._timed(prompt, n) - self.first[-1]) / (n - 1))

    def _timed(self, prompt: Tensor, n: int) -> float:
        _wait_for(prompt.device)
        start = time.perf_counter()
        self.generate(prompt, n)
        _wait_for(prompt.device)
        return time.perf_counter() - start


def _whole_context(run: Run) -> Generate:
    model = models.gpt(run.config, run.weights, run.device).eval()

    def generate(idx: Tensor, n: int) -> Tensor:
        with torch.no_grad(), use_backend("torch"), run.autocast():
            for _ in range(n):
                logits, _ = model(idx)
                idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return idx

    return generate


def _nanogpt(run: Run) -> Generate:
    model = models.nanogpt(run.config, run.weights, run.device).eval()

    def generate(idx: Tensor, n: int) -> Tensor:
        with run.autocast():
            return model.generate(idx, n, top_k=1)

    return generate


def _hugging_face(run: Run, **more: Any) -> Generate:
    model = models.hugging_face(run.config, run.weights, run.device).eval()
    model.to(matmul_dtype(run.dtype))

    def generate(idx: Tensor, n: int) -> Tensor:
        mask = torch.ones_like(idx)  # else transformers guesses at padding
        return model.generate(idx, attention_mask=mask, max_new_tokens=n, do_sample=False, **more)

    return generate


def _fastgpt(run: Run) -> Generate:
    model = models.gpt(run.config, run.weights, run.device).eval().to(matmul_dtype(run.dtype))
    if run.device.type == "cpu":
        _decode_for(model, WARM_UP)
    return lambda idx, n: model.generate(idx, n, temperature=0)


def _decode_for(model: Any, seconds: float) -> None:
    """Meanwhile weights move to pages of 2 MB (fastgpt/decoding/huge_pages.py)."""
    end = time.perf_counter() + seconds
    first = torch.zeros(1, 1, dtype=torch.int64)
    while time.perf_counter() < end:
        for _ in model.generate_stream(first, model.config.block_size - 1, temperature=0):
            if time.perf_counter() >= end:
                return


VARIANTS: dict[str, Callable[[Run], Generate]] = {
    "eager": _whole_context,
    "nanogpt": _nanogpt,
    "hf": _hugging_face,
    "hf-static": functools.partial(_hugging_face, cache_implementation="static"),
    "fastgpt": _fastgpt,
}


def measure(settings: Settings, device: torch.device, variants: list[str]) -> record.Record:
    host, before = machine.check(device=device), nvidia_smi.reading()
    set_precision(settings.dtype)
    config = models.config_of(settings.size)
    read = bytes_per_token(config, settings)
    needed = (
        4 * memory_budget.parameters(config) * (len(variants) + 3)
    )  # with judge, weights and a spare
    if problem := memory_budget.missing(needed, device):
        rows = [{"variant": variant, "problem": problem} for variant in variants]
        rates = [read_ceiling(device)]
    else:
        decoders, rates = _decode(config, settings, device, variants)
        floors = [read / rate for rate in rates]
        rows = [_row(decoder, decoders, floors, settings.batch) for decoder in decoders]
    return record.new(
        "decode",
        settings.recorded(),
        rows,
        nvidia_smi.since(before),
        machine=host,
        peers=models.versions(),
        read_ceiling=(rate := statistics.median(rates)),
        floor_seconds=read / rate,
    )


def _decode(
    config: GPTConfig, settings: Settings, device: torch.device, variants: list[str]
) -> tuple[list[Decoder], list[float]]:
    """What each variant took, and at how many bytes/s this device read, in the same rounds."""
    run = Run(config, _attentive(models.initial_weights(config, device)), device, settings.dtype)
    decoders = [Decoder(variant, run) for variant in variants]
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (settings.batch, settings.prompt), generator=draw).to(
        device
    )
    judge = models.gpt(config, run.weights, device).eval()
    for decoder in decoders:
        if not decoder.problem:
            decoder.check(judge, prompt, settings.new_tokens, MAX_REGRET[settings.dtype])
    rates = []
    for _ in range(settings.rounds):
        for decoder in decoders:
            if not decoder.problem:
                decoder.round(prompt, settings.new_tokens)
        rates.append(read_ceiling(device))
    return decoders, rates


def _attentive(weights: models.Weights) -> models.Weights:
    """A new GPT repeats its last token whatever came before; with three times the weights it does
    not, so that a wrong cache shows in the tokens."""
    return {
        name: 3 * w if name.startswith("transformer.h.") and w.dim() == 2 else w
        for name, w in weights.items()
    }


@torch.no_grad()
def regret(judge: torch.nn.Module, tokens: Tensor, prompt: int) -> float:
    """The furthest that a token after the prompt lies below the best one of its place, in standard
    deviations of the logits there."""
    with use_backend("torch"):
        logits, _ = judge(tokens, tokens)  # with targets: of every position
    before, chosen = logits[:, prompt - 1 : -1], tokens[:, prompt:, None]
    below = before.amax(-1) - before.gather(-1, chosen)[..., 0]
    return (below / before.std(-1)).max().item()


def bytes_per_token(config: GPTConfig, settings: Settings) -> int:
    """Read for one new token of every text, at the middle of the run."""
    context = settings.prompt + settings.new_tokens // 2
    return token.least_bytes(config, context * settings.batch, matmul_dtype(settings.dtype))


def _row(decoder: Decoder, decoders: list[Decoder], floors: list[float], batch: int) -> Row:
    """`floors`: seconds for a token at the rate of each round."""
    peers = {peer.variant: peer for peer in decoders if not peer.problem}
    row: Row = {"variant": decoder.variant}
    if decoder.problem:
        return row | {"problem": decoder.problem}
    seconds = statistics.median(decoder.seconds)
    return row | {
        "seconds": decoder.seconds,
        "tokens_per_second": batch / seconds,
        "over_eager": _ratio(peers.get("eager"), decoder),
        "over_nanogpt": _ratio(peers.get("nanogpt"), decoder),
        "of_floor": statistics.median(map(operator.truediv, floors, decoder.seconds)),
        "first_token_seconds": decoder.first,
        "regret": decoder.regret,
    }


def _ratio(peer: Decoder | None, decoder: Decoder) -> float | None:
    """How many times as fast, turn by turn; None where the peer has no times."""
    if peer is None:
        return None
    return statistics.median(a / b for a, b in zip(peer.seconds, decoder.seconds, strict=True))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--size", nargs="+", choices=models.SIZES, default=["124M"])
    low = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", nargs="+", choices=MAX_REGRET, default=[low])
    usual = [name for name in VARIANTS if on_gpu or name != "hf-static"]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=usual)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="TEXTS")
    parser.add_argument("--prompt", type=int, default=224, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=256 if on_gpu else 16, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=5 if on_gpu else 3)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the records")
    args = parser.parse_args(argv)
    try:
        device = devices.pick_device(args.device)
        models.check_nanogpt()
    except (ValueError, RuntimeError) as error:  # RuntimeError: no such device
        parser.error(str(error))
    if args.variants[0] != "eager":
        parser.error(f"--variants starts with {args.variants[0]}; ratios need eager first")
    if min(args.prompt, args.rounds, *args.batch) < 1 or args.new_tokens < 2:
        parser.error("--prompt, --rounds, --batch must be at least 1, --new-tokens at least 2")
    for size in args.size:
        if args.prompt + args.new_tokens > (longest := models.config_of(size).block_size):
            parser.error(
                f"--prompt {args.prompt} and --new-tokens {args.new_tokens} add up to more than "
                f"{longest}, the block size of {size}"
            )
    for size, dtype, batch in itertools.product(args.size, args.dtype, args.batch):
        settings = Settings(size, args.prompt, args.new_tokens, dtype, args.rounds, batch)
        run = measure(settings, device, args.variants)
        path = record.save(run, args.out)
        print(f"\n{terminal.text(run)}\nrecord: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
