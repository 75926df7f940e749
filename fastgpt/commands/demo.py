"""`make demo`: a small character GPT, trained for two minutes, and what came of it.

Its text is Python's own documentation unless --data names another; all it writes is in out/demo.
"""

import argparse
import contextlib
import importlib.util
import io
import math
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastgpt import backend_report, data, environment, use_backend
from fastgpt.backend import OPS
from fastgpt.checkpoint import NANOGPT_FIELDS
from fastgpt.commands.prepare import prepare
from fastgpt.commands.sample import write_sample
from fastgpt.devices import autocast
from fastgpt.train_step import Batch
from fastgpt.training.config import TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.trainer import Trainer

OUT = Path("out/demo")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastgpt.commands.demo", description=__doc__)
    parser.add_argument("--data", type=Path, help="UTF-8 text (Python's own documentation)")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training (%(default)s)")
    args = parser.parse_args()

    vocab_size = prepare(data.read_text(args.data), OUT / "data", force=True).vocab_size
    config = TrainConfig(
        data=str(OUT / "data"),
        out=str(OUT),
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=128,
        batch_size=8,
        lr=3e-3,
        min_lr=3e-4,
        warmup=20,
        minutes=args.minutes,
        force=True,
    )
    print(f"a character GPT, {args.minutes:g} minutes of training (Ctrl-C ends them early)\n")
    result = train(config)
    trained = result.val_loss
    if result.interrupted and result.step:  # it was saved at once, and not validated
        trained = _val_loss(_quiet_trainer(replace(config, resume=True, force=False)))

    print(f"\na sample from {OUT / 'ckpt.pt'}:\n")
    tokenizer = data.load_tokenizer(OUT / "data")
    prompt = "The " if set("The ") <= set(tokenizer.characters or "The ") else tokenizer.start
    write_sample(result.model.eval(), tokenizer, prompt, 400, temperature=0.8)

    uniform, untrained = math.log(vocab_size), _val_loss(_quiet_trainer(config))
    print("\nwhat was learned: validation loss, nats per character")
    print(f"  {uniform:.2f}  guessing blindly (ln {vocab_size})")
    print(f"  {untrained:.2f}  untrained")
    print(f"  {_unigram_loss(vocab_size):.2f}  guessing by how frequent each character is")
    print(f"  {trained:.2f}  after {result.step:,} steps\n")
    print(_speed(config))
    print(_elsewhere())
    return 0


def _val_loss(trainer: Trainer) -> float:
    losses = trainer.validate()
    return math.nan if losses is None else losses.val


def _unigram_loss(vocab_size: int) -> float:
    """Cross entropy of the validation text under the training text's character frequencies."""
    train_ids, val_ids = (data.load_split(OUT / "data", split).long() for split in ("train", "val"))
    counts = torch.bincount(train_ids, minlength=vocab_size) + 1  # none is impossible
    return -(counts / counts.sum()).log()[val_ids].mean().item()


def _speed(config: TrainConfig, seconds: float = 15, steps: int = 2) -> str:
    """Training steps of fastgpt and of nanoGPT's model in turns: a busy machine slows both."""
    fastgpt, eager = _quiet_trainer(config), _quiet_trainer(config)
    whose = _become_nanogpt(eager)
    eager.take_step = _nanogpts_step(eager)
    tokens = steps * config.batch_size * config.block_size
    rates: dict[str, list[float]] = {"auto": [], "torch": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates["torch"]) < 4:
        for mode, trainer in (("auto", fastgpt), ("torch", eager)):
            with use_backend(mode):
                start = time.perf_counter()
                for _ in range(steps):
                    loss = trainer.train_step()
                loss.item()  # waits for the device
                rates[mode].append(tokens / (time.perf_counter() - start))
    fast, plain = rates["auto"][1:], rates["torch"][1:]  # the first pair warms up
    ratios = sorted(a / b for a, b in zip(fast, plain, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return "\n".join(
        [
            "speed: tokens/s in training this model, in turns",
            f"  {statistics.median(fast):>9,.0f}  fastgpt",
            f"  {statistics.median(plain):>9,.0f}  {whose}",
            f"  {statistics.median(ratios):>8.2f}x  turn by turn; most between {low:.2f}x and "
            f"{high:.2f}x",
            *textwrap.wrap(f"on {environment.versions()['device']}", 60, subsequent_indent="  "),
        ]
    )


def _become_nanogpt(trainer: Trainer) -> str:
    """Give it the model of a checkout of nanoGPT, if one is named, with the same weights; else it
    is nanoGPT's shape already. -> what it is, for a reader.
    """
    folder = os.environ.get("NANOGPT_DIR", ".local/nanoGPT")
    path = Path(folder, "model.py")
    if not path.is_file():
        return "nanoGPT's model and step in eager PyTorch"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    sizes = {name: getattr(trainer.model.config, name) for name in NANOGPT_FIELDS}
    with contextlib.redirect_stdout(io.StringIO()):  # the model introduces itself
        model = nanogpt.GPT(nanogpt.GPTConfig(**sizes)).to(trainer.device)
    model.load_state_dict(trainer.model.state_dict())
    trainer.model = model
    return f"nanoGPT, {path}"


def _elsewhere() -> str:
    """Which implementations ran here; without a GPU, which one would run."""
    ran = ", ".join(sorted({choice.implementation for choice in backend_report().values()}))
    lines = textwrap.wrap(f"its ops ran: {ran} (`fastgpt info` says why)", 60)
    if not torch.cuda.is_available():
        lines.append("on a GPU of compute capability 8.0 or later they would run")
        for name, what in (
            ("triton", "our kernels"),
            ("cublas", "PyTorch's GEMMs, our GELU"),
            ("torch", "PyTorch's"),
        ):
            ops = ", ".join(op for op, entry in OPS.items() if entry.unmeasured == name)
            lines += textwrap.wrap(f"  {what}: {ops}", 60, subsequent_indent="    ")
        lines.append("README.md has what a GPU measured, and where.")
    return "\n".join(lines)


def _nanogpts_step(trainer: Trainer) -> Callable[..., Tensor]:
    """Its train.py's: AdamW as PyTorch has it, logits returned."""
    model, optimizer = trainer.model, torch.optim.AdamW(trainer.model.parameters())
    model.config.return_logits = True

    def step(batches: Sequence[Batch], _: Sequence[int] | None) -> Tensor:
        ((x, y),) = batches
        with autocast(trainer.device, trainer.dtype):
            _, loss = model(x, y.contiguous())  # nanoGPT views them
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _quiet_trainer(config: TrainConfig) -> Trainer:
    with contextlib.redirect_stdout(io.StringIO()):  # the model introduces itself
        return Trainer(config)


if __name__ == "__main__":
    raise SystemExit(main())
