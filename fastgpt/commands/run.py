"""`fastgpt run SCRIPT [args]`: an unmodified nanoGPT script, with `from model import GPT` answered.

It runs as `python SCRIPT [args]` would run it: its own folder first on sys.path, the current folder
left alone. nanoGPT's scripts read configurator.py, data/ and out/ from the current folder, so the
usual call is `cd nanoGPT && fastgpt run train.py`; on several GPUs, `torchrun ... -m fastgpt run
train.py`.

nanoGPT's train.py throws the logits of a training step away. `--no-logits` saves computing a loss
that keeps them: forward(idx, targets) returns (None, loss), as under return_logits=False. A script
that uses them finds None. `--eager-logits` keeps them, and their head out of torch.compile's graph,
as under return_logits="eager".
"""

import argparse
import math
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgpt import devices, model
from fastgpt.commands import forked


class WithoutLogits(model.GPT):
    """A GPT under return_logits=False, of which a nanoGPT script's GPTConfig knows nothing."""

    returned: bool | str = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.config.return_logits = self.returned


class WithEagerLogits(WithoutLogits):
    """The same under return_logits="eager"."""

    returned = "eager"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    logits = parser.add_mutually_exclusive_group()
    logits.add_argument(
        "--no-logits",
        action="store_true",
        help="return None for logits beside a loss: faster, for scripts that ignore them",
    )
    logits.add_argument(
        "--eager-logits",
        action="store_true",
        help="compute logits and loss outside the graph of torch.compile",
    )
    parser.add_argument("script", type=Path, help="train.py, sample.py, bench.py or your own")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own, all that follow")


def main(args: argparse.Namespace) -> int:
    if not args.script.is_file():
        raise FileNotFoundError(f"no script {args.script}; call this in nanoGPT's folder")
    folder = args.script.resolve().parent
    if (fork := forked.differences(folder)) is not None:
        return _run_fork(args, folder, *fork)
    answer: ModuleType = model
    how = ""
    if args.no_logits:
        answer, how = _Answer(WithoutLogits), ", without logits beside a loss"
    elif args.eager_logits:
        answer, how = _Answer(WithEagerLogits), ", logits outside compiled graphs"
    print(f"fastgpt: {args.script} runs with `model` answered by fastgpt{how}", flush=True)
    if math.isnan(devices.peak_flops(devices.pick_device(None))):
        print("fastgpt: this device's peak is not known, so mfu is nan", flush=True)
    return execute(args.script, args.args, folder, model=answer)


def _run_fork(args: argparse.Namespace, folder: Path, path: Path, names: list[str]) -> int:
    """A fork's model is no other model's numbers: it runs as it is."""
    changed = f"{path} has {', '.join(names)} otherwise than nanoGPT"
    if args.no_logits or args.eager_logits:
        flag = "--no-logits" if args.no_logits else "--eager-logits"
        raise ValueError(f"{changed}, and {flag} is fastgpt's; leave it out, or move the file away")
    print(
        f"fastgpt: {changed}, so it runs as it is. To have fastgpt underneath, make its changes to "
        "fastgpt.model's classes, there or in the script (docs/training.md shows how)",
        flush=True,
    )
    return execute(args.script, args.args, folder)


class _Answer(ModuleType):
    """fastgpt.model with another GPT. What a script assigns to it is assigned there, too: the
    classes find each other by their names in that module.
    """

    def __init__(self, gpt: type[model.GPT]):
        super().__init__("model")
        vars(self).update({**vars(model), "GPT": gpt})

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(model, name, value)
        super().__setattr__(name, value)


def execute(script: Path, args: list[str], folder: Path, **modules: ModuleType) -> int:
    """Run `script` as __main__ with `folder` on sys.path and `modules` already imported.

    An error of the script is the script's: it ends in a traceback and exit code 1, as under python.
    """
    with _as_python_would([str(script), *args], folder, modules):
        try:
            runpy.run_path(os.path.abspath(script), run_name="__main__")
        except Exception as error:
            if (name := _only_beside_script(error, script)) is not None:
                raise FileNotFoundError(
                    f"{script.name} reads {name} from the current folder, but the file is beside "
                    f"the script; use `cd {script.parent} && fastgpt run {script.name}`"
                ) from error
            traceback.print_exc()
            return 1
    return 0


@contextmanager
def _as_python_would(
    argv: list[str], folder: Path, modules: dict[str, ModuleType]
) -> Iterator[None]:
    before = sys.argv, sys.path, {name: sys.modules.get(name) for name in modules}
    sys.argv, sys.path = argv, [str(folder), *sys.path[1:]]
    sys.modules.update(modules)
    try:
        yield
    finally:
        sys.argv, sys.path, replaced = before
        for name, module in replaced.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _only_beside_script(error: Exception, script: Path) -> str | None:
    """The file the script looked for in vain in the current folder, if its own folder has it."""
    if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, str):
        return None
    name = error.filename
    return name if not Path(name).is_absolute() and (script.parent / name).exists() else None
