"""`fastgpt init-report`: is every parameter drawn as specified, and what does each scheme do?

init_audit.py answers the first. What a scheme does is measured on small models: the scale of the
residual stream and of the gradients against depth, and the loss of short trainings without warm-up,
beside one that starts from PyTorch's own initialisation.
"""

import argparse
import contextlib
import datetime
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import data, environment, init
from fastgpt.commands import init_audit
from fastgpt.commands.options import count, number, seed
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

SCAN = GPTConfig(block_size=32, vocab_size=256, n_head=4, n_embd=128)
RUN = GPTConfig(block_size=32, n_layer=24, n_head=2, n_embd=64)  # deep and narrow
LEARNING_RATE = 1e-3  # of the short runs, from the first step on
SMOOTH = 20  # losses to average: single batches differ by more than schemes do
SCHEMES = [(linear, residual) for linear in init.LINEAR_INIT for residual in init.RESIDUAL_INIT]
_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_LINEAR = list(init.LINEAR_INIT)  # a row or column of panels each
_COLOURS = {name: f"C{i}" for i, name in enumerate(init.RESIDUAL_INIT)}  # in every picture
_CURVES = {  # a field of Scan: what it is, and the block at the far end of the signal's way
    "stream": ("rms of the residual stream", "after the last block", -1),
    "gradient": ("rms of the parameter gradients", "in the first block", 0),
}
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"


Scheme = tuple[str, str]  # linear_init, residual_init
CONTROL: Scheme = ("PyTorch's own", "PyTorch's own")
Runs = dict[Scheme, list[list[float]]]  # the losses of each seed


class Scan(NamedTuple):
    """Root mean squares at initialisation, one per block."""

    stream: list[float]  # the residual stream after the block
    gradient: list[float]  # the loss's gradient with respect to the block's parameters


def depth_scan(config: GPTConfig, seed: int) -> Scan:
    """One forward and backward of a fresh model on random tokens, watched block by block."""
    model = _model(config, seed)
    stream: list[float] = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, args, x: stream.append(_rms(x)))
    idx, targets = torch.randint(config.vocab_size, (2, 4, config.block_size))
    model(idx, targets)[1].backward()
    gradients = ([p.grad.flatten() for p in block.parameters()] for block in model.transformer.h)
    return Scan(stream, [_rms(torch.cat(each)) for each in gradients])


def short_run(model: GPT, ids: Tensor, steps: int, seed: int) -> list[float]:
    """The loss of every step of a training at the full learning rate from the first step on."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), "cpu")
    generator = torch.Generator().manual_seed(seed)  # the same batches for every scheme
    losses = []
    for _ in range(steps):
        x, y = data.random_batch(ids, 8, model.config.block_size, generator, ids.device)
        loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as nanoGPT clips
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def entropy(ids: Tensor) -> float:
    """Of the letters' frequencies, in nats: the least loss without looking at the context."""
    p = torch.bincount(ids.long()).double() / len(ids)
    return torch.special.entr(p).sum().item()


def _model(config: GPTConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):  # the model introduces itself
        return GPT(config)


def _undrawn(config: GPTConfig, seed: int) -> GPT:
    """The model as PyTorch's constructors leave it: linear layers and the head, which is the token
    embedding, uniform within 1/sqrt(inputs), positions N(0, 1).
    """
    model = _model(config, seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()
    return model


def _rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def _with_scheme(config: GPTConfig, scheme: Scheme, **changes: Any) -> GPTConfig:
    return replace(config, linear_init=scheme[0], residual_init=scheme[1], **changes)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown whose columns also line up in a terminal."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def parameter_section(config: GPTConfig, seed: int) -> tuple[str, bool]:
    """The audit of one model as text, and whether all of it passed."""
    rows = init_audit.audit(_model(config, seed))
    drawn = sum(row.specified[1] > 0 for row in rows)
    z, _, ks = init_audit.limits(drawn)
    passed = sum(row.ok for row in rows)
    header = ["parameter", "shape", "specified mean, std", "measured mean, std"]
    header += ["z mean", "z std", "√n·D", ""]
    lines = []
    for row in rows:
        line = [row.name, "x".join(map(str, row.shape))]
        line += ["{:g}, {:.7f}".format(*row.specified), "{:+.7f}, {:.7f}".format(*row.measured)]
        line += [f"{far:+.2f}" if row.specified[1] else "exact" for far in row.deviations]
        lines.append([*line, "ok" if row.ok else "FAIL"])
    verdict = (
        f"{passed} of {len(rows)} parameters are as specified: {drawn} drawn, the others constant. "
        f"At {init_audit.CONFIDENCE:.1%} confidence for all together, |z| may reach {z:.2f} and "
        f"√n·D {ks:.2f}."
    )
    return f"{_table(header, lines)}\n\n{verdict}", passed == len(rows)


def scan_section(scans: dict[Scheme, dict[int, Scan]]) -> str:
    """Per scheme and depth: the stream after the last block, the gradient of the first one."""
    depths = next(iter(scans.values()))
    header = ["linear_init", "residual_init", *(f"{depth} layers" for depth in depths)]
    parts = []
    for field, (what, where, block) in _CURVES.items():
        rows = [
            [*scheme, *(f"{getattr(scan, field)[block]:.2e}" for scan in by_depth.values())]
            for scheme, by_depth in scans.items()
        ]
        parts.append(f"{what} {where}:\n\n{_table(header, rows)}")
    return "\n\n".join(parts)


def run_section(runs: Runs) -> str:
    """Per scheme and seed: where a short run starts and where it ends."""
    seeds = range(1, 1 + len(runs[CONTROL]))
    header = ["linear_init", "residual_init"]
    header += [f"{when}, run {n}" for n in seeds for when in ("first", f"last {SMOOTH}")]
    rows = []
    for scheme, curves in runs.items():
        ends = [[losses[0], _mean(losses[-SMOOTH:])] for losses in curves]
        rows.append([*scheme, *(f"{loss:.3f}" for pair in ends for loss in pair)])
    return _table(header, rows)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def draw_scans(scans: dict[Scheme, dict[int, Scan]], out: Path) -> None:
    """residual.png and gradient.png: over all depths, and block by block in the deepest model."""
    for field, (what, where, block) in _CURVES.items():
        figure, axes = _figure(2, (9, 7))
        for (linear, residual), by_depth in scans.items():
            left, right = axes[_LINEAR.index(linear)]
            depths, deepest = list(by_depth), max(by_depth)
            ends = [getattr(scan, field)[block] for scan in by_depth.values()]
            left.loglog(depths, ends, marker="o", color=_COLOURS[residual], label=residual)
            title = f"linear_init {linear}"
            left.set(xlabel="layers of the model", ylabel=f"{what}\n{where}", title=title)
            left.set_xticks(depths, depths)
            left.tick_params(axis="x", which="minor", labelbottom=False)
            profile = getattr(by_depth[deepest], field)
            right.semilogy(range(1, deepest + 1), profile, color=_COLOURS[residual])
            right.set(xlabel=f"block of {deepest}", ylabel=f"{what}\nblock by block", title=title)
        _save(figure, out / ("residual.png" if field == "stream" else "gradient.png"))


def draw_runs(runs: Runs, letters: float, out: Path) -> None:
    """loss.png: the losses of the short runs, smoothed, the mean over the seeds."""
    figure, axes = _figure(1, (9, 5))
    for (linear, residual), curves in runs.items():
        mean = torch.tensor(curves).mean(0)
        smooth = mean.unfold(0, min(SMOOTH, len(mean)), 1).mean(-1).tolist()
        for panel, name in zip(axes[0], _LINEAR, strict=True):
            if linear in (name, CONTROL[0]):
                panel.plot(smooth, color=_COLOURS.get(residual, "black"), label=residual)
    for panel, name in zip(axes[0], _LINEAR, strict=True):
        panel.axhline(letters, color="grey", linestyle=":", label="letters' frequencies")
        panel.set(xlabel="optimizer step", title=f"linear_init {name}")
    axes[0][0].set_ylabel(f"training loss, nats per character, mean of {SMOOTH} steps")
    _save(figure, out / "loss.png")


def _figure(rows: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    layout = dict(squeeze=False, sharey=True, layout="constrained")
    return _pyplot().subplots(rows, 2, figsize=inches, **layout)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="residual_init", loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"the pictures need matplotlib ({error}); pip install 'fastgpt[plot]', or --no-plots"
        ) from None
    matplotlib.use("Agg")  # files only, no display
    import matplotlib.pyplot as plt

    return plt


def _insert(text: str, path: Path) -> None:
    """Put `text` between a document's two markers."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{path} has no lines {_BEGIN} and {_END} to write between")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape, size = GPTConfig(), number(int, 1, 2**31)
    for field in _SHAPE:
        option, default = "--" + field.replace("_", "-"), getattr(shape, field)
        parser.add_argument(option, type=size, default=default, help="of the model (%(default)s)")
    parser.add_argument("--no-bias", action="store_true", help="a model without biases")
    for field in ("residual_init", "linear_init"):
        option, default = "--" + field.replace("_", "-"), str(getattr(shape, field))
        parser.add_argument(option, default=default, help="scheme of the model (%(default)s)")
    parser.add_argument(
        "--seed", type=seed, default=1337, help="of all that is drawn (%(default)s)"
    )
    depths = [2, 4, 8, 12, 24, 48]
    parser.add_argument("--depths", type=size, nargs="+", default=depths, help="to scan (2 ... 48)")
    parser.add_argument("--steps", type=count, default=240, help="of each short run (%(default)s)")
    out = Path("out/init-report")
    parser.add_argument("--out", type=Path, default=out, help="of the pictures (%(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="text only")
    parser.add_argument("--docs", type=Path, help="document to write the measured part of")


def main(args: argparse.Namespace) -> int:
    """0 if every parameter is as specified, else 1."""
    config = GPTConfig(**{name: getattr(args, name) for name in _SHAPE}, bias=not args.no_bias)
    config = _with_scheme(config, (args.linear_init, args.residual_init))
    if not args.no_plots:
        _pyplot()  # refuses now, not after minutes
    parts = []

    def show(part: str) -> None:
        parts.append(part)
        print(part + "\n", flush=True)

    installed, today = environment.versions(), datetime.date.today().isoformat()
    show(f"Measured {today}, seed {args.seed}: {installed['device']}, torch {installed['torch']}.")
    table, passed = parameter_section(config, args.seed)
    chosen = f"linear_init {config.linear_init}, residual_init {config.residual_init}"
    show(f"### Every parameter ({chosen})\n\n{table}")

    scans = {scheme: _scan_depths(scheme, args.depths, args.seed) for scheme in SCHEMES}
    show(f"### Scale against depth ({SCAN.n_embd} wide)\n\n{scan_section(scans)}")
    if not args.no_plots:
        draw_scans(scans, args.out)

    if args.steps > 0:
        runs, letters = _short_runs(args.steps, args.seed)
        shape = f"{RUN.n_layer} layers, {RUN.n_embd} wide, learning rate {LEARNING_RATE:g}"
        show(f"### {args.steps} steps without warm-up ({shape})\n\n{run_section(runs)}")
        show(f"The letters' frequencies alone give {letters:.3f}.")
        if not args.no_plots:
            draw_runs(runs, letters, args.out)
    if args.docs is not None:
        _insert("\n\n".join(parts), args.docs)
    return 0 if passed else 1


def _scan_depths(scheme: Scheme, depths: Sequence[int], seed: int) -> dict[int, Scan]:
    configs = (_with_scheme(SCAN, scheme, n_layer=depth) for depth in sorted(set(depths)))
    return {config.n_layer: depth_scan(config, seed) for config in configs}


def _short_runs(steps: int, seed: int) -> tuple[Runs, float]:
    text = data.read_text(None)
    characters = data.Characters(sorted(set(text)))
    ids = torch.tensor(characters.encode(text), dtype=torch.int16)
    sizes = replace(RUN, vocab_size=characters.vocab_size)
    runs: Runs = {scheme: [] for scheme in (*SCHEMES, CONTROL)}
    for n in (seed, seed + 1):
        for scheme in SCHEMES:
            model = _model(_with_scheme(sizes, scheme), n)
            runs[scheme].append(short_run(model, ids, steps, n))
        runs[CONTROL].append(short_run(_undrawn(sizes, n), ids, steps, n))
    return runs, entropy(ids)
