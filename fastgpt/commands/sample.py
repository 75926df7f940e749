"""`fastgpt sample`: text from fastgpt's or nanoGPT's checkpoint or OpenAI's weights, streamed."""

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import checkpoint, data
from fastgpt.commands.options import count, number, seed
from fastgpt.decoding.lookup import MOST, PromptLookup
from fastgpt.devices import DTYPES, autocast, pick_device, pick_dtype
from fastgpt.model import GPT
from fastgpt.storage import hf_tokenizer
from fastgpt.storage.printable import printable
from fastgpt.weights import SIZES

WEIGHTS = DTYPES | {"int8": torch.int8}


class Timer:
    """Tokens a second and the time to the first token, over all samples; and what came of guessing
    tokens, where that was asked for.
    """

    def __init__(self, lookup: PromptLookup | None = None) -> None:
        self.lookup = lookup
        self.firsts: list[float] = []
        self.tokens, self.seconds = 0, 0.0

    def watch(self, columns: Iterable[Tensor]) -> Iterator[int]:
        start, tokens, before = time.perf_counter(), 0, 0.0
        for column in columns:
            token = int(column)  # waits for the device
            now = time.perf_counter() - start
            if tokens == 0:
                self.firsts.append(now)
            else:
                self.tokens, self.seconds = self.tokens + 1, self.seconds + now - before
            before, tokens = now, tokens + 1
            yield token

    def report(self) -> str:
        if not self.firsts:
            return "no token was sampled"
        first = f"{1000 * statistics.median(self.firsts):.0f} ms to the first token"
        if not self.seconds:
            return first
        rate = f"{self.tokens / self.seconds:.1f} tokens/s after it, {first}"
        return rate if self.lookup is None else f"{rate}; {self.lookup.report()}"


def write_sample(
    model: GPT,
    tokenizer: data.Tokenizer,
    prompt: str,
    max_new_tokens: int,
    stop: str | None = None,
    timer: Timer | None = None,
    **sampling: Any,
) -> None:
    """Print `prompt` and its continuation up to the text `stop`, each piece when it is sampled.

    `sampling`: temperature, top_k, top_p, dtype and prompt_lookup as GPT.generate takes them.
    """
    device = model.lm_head.weight.device
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; a model needs at least one token to go on from")
    print(printable(prompt), end="", flush=True)
    timer = timer or Timer()
    with autocast(device, pick_dtype(device, None)):
        idx = torch.tensor([ids], device=device)
        columns = model.generate_stream(idx, max_new_tokens, **sampling)
        text = ""
        for piece in tokenizer.stream(timer.watch(columns)):
            print(printable(piece), end="", flush=True)
            text += piece
            if stop and stop in text:
                break
    print()


def tokenizer_of(saved: Mapping[str, Any], out: Path) -> data.Tokenizer:
    """The tokenizer a checkpoint was trained with: in fastgpt's file, or in data/ for nanoGPT's."""
    if "characters" in saved.get("fastgpt", {}):
        characters = saved["fastgpt"]["characters"]
        return data.GPT2() if characters is None else data.Characters(characters)
    dataset = str(saved.get("config", {}).get("dataset", ""))
    for root in (Path(), out.resolve().parent):
        folder = root / "data" / dataset
        if (folder / "meta.pkl").exists():
            return data.load_tokenizer(folder)
    vocab_size = saved["model_args"]["vocab_size"]
    if vocab_size < data.GPT2_TOKENS:
        raise ValueError(
            f"the vocabulary of {vocab_size} is not GPT-2's, and data/{dataset}/meta.pkl is not "
            "here; --data names the folder it is in"
        )
    return data.GPT2()


def check_fits(tokenizer: data.Tokenizer, model: GPT, remedy: str) -> None:
    """ValueError for a vocabulary that is not the model's."""
    size, characters = model.config.vocab_size, tokenizer.characters
    known = data.GPT2_TOKENS if characters is None else len(characters)
    if size < known or (characters is not None and size != known):
        raise ValueError(f"the vocabulary has {known} tokens and the model {size}; {remedy}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--out", "--out-dir", "--out_dir"), type=Path, default="out",
        help="folder of ckpt.pt (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, help="folder of meta.pkl, where the checkpoint does not tell"
    )
    parser.add_argument(
        *("--pretrained", "--init-from", "--init_from"), default="resume", metavar="WEIGHTS",
        help=f"{', '.join(SIZES)} or a Hugging Face folder; resume, the default, is --out's",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", "--start", help="text to go on from (a new line); FILE:path is a file's text"
    )
    prompt.add_argument("--prompt-file", type=Path, help="the same, from a file")
    parser.add_argument(
        "--num-samples", "--num_samples", type=count, default=1, help="(%(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=count, default=500, help="(%(default)s)"
    )
    parser.add_argument(
        # less, and logits divided by it are no numbers
        "--temperature", type=number(float, 1e-30, or_zero=True), default=0.8,
        help="0 is argmax (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k",
        "--top_k",
        type=number(int, 1),
        default=200,
        help="likeliest tokens to keep (%(default)s)",
    )
    parser.add_argument(
        *("--top-p", "--top_p"),
        type=number(float, 1e-6, 1),
        help="probability that the tokens kept add up to",
    )
    parser.add_argument(
        "--prompt-lookup", "--prompt_lookup", type=int, metavar="TOKENS",
        help=f"guess up to so many (at most {MOST}) a step from what is repeated in the text: the "
        "same tokens, faster where it repeats itself",
    )  # fmt: skip
    parser.add_argument("--stop", help="text that ends a sample")
    parser.add_argument("--seed", type=seed, default=1337, help="(%(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--compile", nargs="?", const="True", choices=("True", "False"), default="False",
        help="nanoGPT's; changes nothing, as a decoding step is a graph already",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=WEIGHTS, help="of the weights as they are read (a GPU: 16 bits)"
    )


def _prompt(args: argparse.Namespace, tokenizer: data.Tokenizer) -> str:
    if args.prompt_file is not None:
        return data.read_text(args.prompt_file)
    if args.prompt is None:
        return tokenizer.start
    if args.prompt.startswith("FILE:"):
        return data.read_text(Path(args.prompt.removeprefix("FILE:")))
    return str(args.prompt)


def _loaded(args: argparse.Namespace) -> tuple[GPT, data.Tokenizer]:
    tokenizer: data.Tokenizer
    if args.pretrained != "resume":
        folder = Path(args.pretrained)
        model = GPT.from_pretrained(args.pretrained, {} if folder.is_dir() else {"gelu": "tanh"})
        characters = hf_tokenizer.read_characters(folder, model.config.vocab_size)
        tokenizer = data.GPT2() if characters is None else data.Characters(characters)
        remedy = f"{folder} lacks the tokenizer.json of its own"
    else:
        saved = checkpoint.load_checkpoint(args.out / "ckpt.pt")
        model = checkpoint.load_model(saved)
        tokenizer = data.load_tokenizer(args.data) if args.data else tokenizer_of(saved, args.out)
        known = saved.get("fastgpt", {})
        if "characters" in known and known["characters"] != tokenizer.characters:
            raise ValueError(
                f"{args.data} has another vocabulary than {args.out / 'ckpt.pt'}; leave out --data"
            )
        remedy = f"--data names the folder that {args.out} was trained on"
    check_fits(tokenizer, model, remedy)
    return model, tokenizer


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    torch.manual_seed(args.seed)  # as nanoGPT's sample.py: what a new model draws comes after it
    lookup = None if args.prompt_lookup is None else PromptLookup(args.prompt_lookup)
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for text alone
        model, tokenizer = _loaded(args)
    model.to(device).eval()

    prompt, timer = _prompt(args, tokenizer), Timer(lookup)
    if not prompt:
        raise ValueError(f"{args.prompt_file or args.prompt} is empty; name a text to go on from")
    for _ in range(args.num_samples):
        write_sample(
            model,
            tokenizer,
            prompt,
            args.max_new_tokens,
            args.stop,
            timer,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            dtype=None if args.dtype is None else WEIGHTS[args.dtype],
            prompt_lookup=lookup,
        )
        print("---------------")
    print(timer.report(), file=sys.stderr)
    return 0
