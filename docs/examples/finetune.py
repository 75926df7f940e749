"""A GPT-2 from a Hugging Face folder: trained on, and written back as a folder.

    python docs/examples/finetune.py --folder gpt2 --text my.txt --out tuned

The folder is one that `save_pretrained` wrote. Without one a small GPT-2 is made, with random
weights and a byte for a token: enough to see it work, on a CPU, in seconds. Needs transformers.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fastgpt import GPT, TrainStep, checkpoint, data
from fastgpt.commands import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a Hugging Face GPT-2 (a small random one)")
    parser.add_argument("--text", type=Path, help="UTF-8 text (Python's documentation)")
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="folder to write")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.folder or small_gpt2(Path(tempfile.mkdtemp()))

    # the GELU is the folder's: OpenAI's weights have the tanh form
    model = GPT.from_pretrained(str(folder), dict(dropout=0.1, return_logits=False)).to(device)
    ids = torch.tensor(tokenizer(folder)(data.read_text(args.text)), device=device)
    T = min(model.config.block_size, 256)
    print(f"{len(ids):,} tokens, {model.config.n_layer} layers, GELU {model.config.gelu}")

    held_out = ids[: 8 * (T + 1)].view(8, T + 1)
    before = loss_of(model, held_out)
    step = TrainStep(  # a tenth of a learning rate to start from scratch with
        model, weight_decay=0.1, lr=3e-4, betas=(0.9, 0.95), max_norm=1.0,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )  # fmt: skip
    for _ in range(args.steps):
        starts = torch.randint(held_out.numel(), len(ids) - T, (args.batch_size, 1), device=device)
        windows = ids[starts + torch.arange(T + 1, device=device)]
        step([(windows[:, :-1], windows[:, 1:])])
    after = loss_of(model, held_out)
    print(f"loss of text that was held out: {before:.3f} before, {after:.3f} after")
    assert after < before

    path = args.out.with_suffix(".pt")
    saved = {"model": model.state_dict(), "model_args": checkpoint.model_args(model.config)}
    checkpoint.save_checkpoint(saved, path)
    convert.to_hugging_face(path, args.out)
    theirs = GPT2LMHeadModel.from_pretrained(args.out).eval().to(device)
    with torch.no_grad():
        logits = theirs(held_out[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    print(f"{args.out}: transformers has a loss of {loss.item():.3f} with it")
    assert abs(loss.item() - after) < 1e-3


def small_gpt2(folder: Path) -> Path:
    sizes = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    sizes.bos_token_id = sizes.eos_token_id = None
    GPT2LMHeadModel(sizes).save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> Callable[[str], list[int]]:
    if any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists():
        return AutoTokenizer.from_pretrained(folder).encode
    return lambda text: list(text.encode()[:1_000_000])


@torch.no_grad()
def loss_of(model: GPT, windows: torch.Tensor) -> float:
    model.eval()
    loss = model(windows[:, :-1], windows[:, 1:])[1]
    model.train()
    return loss.item()


if __name__ == "__main__":
    main()
