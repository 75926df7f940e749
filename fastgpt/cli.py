"""The `fastgpt` command: all but `bench` are a module's `add_arguments(parser)` and `main(args)`.

What a user can put right ends as `fastgpt: <message>` with exit code 2 and no traceback;
`python -X dev -m fastgpt ...` shows that too.
"""

import argparse
import importlib
import io
import os
import sys
import textwrap
from pathlib import Path

import fastgpt
from fastgpt.commands import run
from fastgpt.commands.options import Parser, normalised
from fastgpt.storage.printable import printable
from fastgpt.training.output import discard

MODULES = {
    "prepare": ("fastgpt.commands.prepare", "turn a text into train.bin, val.bin and meta.pkl"),
    "train": ("fastgpt.commands.train", "train a GPT on prepared data"),
    "sample": ("fastgpt.commands.sample", "write text with a trained GPT"),
    "convert": (
        "fastgpt.commands.convert",
        "turn a checkpoint into a Hugging Face folder, or back",
    ),
    "run": ("fastgpt.commands.run", "run an unmodified nanoGPT script on fastgpt's model"),
    "info": ("fastgpt.commands.info", "say what each op would run on this machine, and why"),
    "init-report": (
        "fastgpt.commands.init_report",
        "compare the initial weights with their specification",
    ),
    "tune": ("fastgpt.commands.tune", "measure this GPU, so that dispatch and launches follow it"),
    "inspect": (
        "fastgpt.commands.inspect",
        "compile every kernel for a GPU and read what came out",
    ),
}

EXAMPLES = {  # for `fastgpt` alone, to be pasted one below another
    "prepare": "fastgpt prepare text.txt --out data",
    "train": "fastgpt train --data data --out out",
    "sample": "fastgpt sample --out out --prompt 'The '",
    "convert": "fastgpt convert out/ckpt.pt hf",
    "run": "fastgpt run train.py --compile=False",
    "info": "fastgpt info --json",
    "init-report": "fastgpt init-report --steps 0 --no-plots",
    "tune": "fastgpt tune",
    "inspect": "fastgpt inspect --arch sm_90 --kernel gelu",
}

_USER_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    OSError,
    ImportError,
    RuntimeError,  # a backend that cannot run here, a GPU without memory left
    ArithmeticError,  # a loss that is not finite, a number beyond what PyTorch counts with
    MemoryError,
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a name or a text that the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if not argv:
            print(overview(), flush=True)
            return 0
        args = _arguments(argv)
        return args.main(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fastgpt sample | head`; the exit must not flush into the pipe again
        discard(sys.stdout)
        return 1
    except _USER_ERRORS as error:
        if sys.flags.dev_mode:
            raise
        print(f"fastgpt: {one_line(error)}", file=sys.stderr)
        return 2


def overview() -> str:
    """Every command with an example, in at most 60 columns."""
    lines = [*textwrap.wrap(fastgpt.__doc__ or "", 60), ""]
    for name, (_, line) in MODULES.items():
        lines += textwrap.wrap(f"{name}: {line}", 60, subsequent_indent="  ")
        lines += [f"    {EXAMPLES[name]}"]
    lines += ["bench: time training (in a checkout of fastgpt)", "    fastgpt bench --size char"]
    lines += ["", "`fastgpt COMMAND --help` lists a command's options,", "`--version` the version."]
    return "\n".join(lines)


def one_line(error: Exception) -> str:
    """What went wrong, without a file's control characters."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"cannot open {error.filename}: {error.strerror}"
    text = printable(" ".join(text.split()) or type(error).__name__)
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"


def _arguments(argv: list[str]) -> argparse.Namespace:
    """Only the module of the command that was asked for is imported."""
    if argv[:1] == ["bench"]:  # every argument is bench/train.py's, --help too
        return argparse.Namespace(main=_bench, args=argv[1:])
    if not argv or argv[0] not in MODULES:
        return _listing().parse_args(argv)
    name, rest = argv[0], argv[1:]
    module_name, line = MODULES[name]
    module = importlib.import_module(module_name)
    parser = Parser(prog=f"fastgpt {name}", description=line)
    module.add_arguments(parser)
    parser.set_defaults(main=module.main)
    if name == "run":  # all that follow are the script's
        return parser.parse_args(rest)
    return parser.parse_intermixed_args(normalised(rest))


def _listing() -> argparse.ArgumentParser:
    """For --help, and for what is no command."""
    parser = Parser(prog="fastgpt", description=fastgpt.__doc__)
    parser.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    lines = {name: line for name, (_, line) in MODULES.items()}
    lines["bench"] = "time training against nanoGPT's (in a checkout of fastgpt)"
    for name, line in lines.items():
        commands.add_parser(name, help=line, description=line)
    return parser


def _bench(args: argparse.Namespace) -> int:
    """Run the checkout's bench/train.py, by its path: a nanoGPT folder has a `bench` of its own."""
    root = Path(fastgpt.__file__).resolve().parent.parent
    script = root / "bench" / "train.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"no {script}: the benchmarks are not installed, only a checkout of fastgpt has them; "
            "clone it and run `make bench` there"
        )
    return run.execute(script, args.args, folder=root)
