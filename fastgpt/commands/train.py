"""`fastgpt train`: a GPT on any number of devices, with nanoGPT's data, checkpoints and settings.

On several: `torchrun --nproc-per-node 8 -m fastgpt train ...` (docs/scaling.md).
"""

import argparse
import contextlib
import os
import sys
import time
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from fastgpt.commands.options import true_or_false
from fastgpt.storage.printable import printable
from fastgpt.training import nanogpt, sharded_folder, world
from fastgpt.training.config import TrainConfig, changes, check_each, kept_settings, option
from fastgpt.training.folder import LATEST, sharded
from fastgpt.training.log import NAME, read
from fastgpt.training.loop import train
from fastgpt.training.output import Output
from fastgpt.training.watch import LostProcess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="*", type=Path, help="a nanoGPT config file to begin with")
    hints = typing.get_type_hints(TrainConfig)
    for setting in fields(TrainConfig):
        hint = hints[setting.name]
        kind = next(iter(typing.get_args(hint)), hint)  # T | None -> T
        text = setting.metadata["help"]
        if setting.default not in (MISSING, None, False):
            text += f" ({setting.default})"
        how: dict[str, Any] = dict(default=argparse.SUPPRESS, dest=setting.name, help=text)
        name = option(setting.name)
        if kind is bool:
            flag: dict[str, Any] = dict(nargs="?", const=True, type=true_or_false, metavar="BOOL")
            parser.add_argument(name, **flag, **how)
            how["help"] = argparse.SUPPRESS
            parser.add_argument(f"--no-{name[2:]}", action="store_false", **how)
        else:
            choices = setting.metadata.get("choices")
            if setting.name == "wandb":  # alone, as a flag
                how |= dict(nargs="?", const="online")
            parser.add_argument(name, type=kind, choices=choices, **how)
    for name in (*nanogpt.SAME, *nanogpt.OTHER):
        if name not in hints:
            kind = _kind_of(name, hints)
            how = dict(default=argparse.SUPPRESS, dest=f"nanogpt_{name}", help=argparse.SUPPRESS)
            parser.add_argument(option(name), type=kind, **how)


def _kind_of(name: str, hints: Mapping[str, Any]) -> Any:
    """The type of a setting by nanoGPT's name."""
    hint = hints[nanogpt.SAME[name]] if name in nanogpt.SAME else nanogpt.OTHER[name]
    kind = next(iter(typing.get_args(hint)), hint)
    return true_or_false if kind is bool else kind


def main(args: argparse.Namespace) -> int:
    process = world.rank()
    if process:  # only process 0 prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    output = Output(sys.stdout, _told_of_lost_output)
    try:
        with contextlib.redirect_stdout(output):
            return _main(args)
    except Exception as error:
        if process and not sys.flags.dev_mode:
            # process 0 is likely to report the same soon, which ends them all
            time.sleep(5)
            error.args = (f"process {process}: {error}",)
        if isinstance(error, LostProcess):  # the group is beyond an orderly end
            print(f"fastgpt: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        raise


def _told_of_lost_output(error: OSError) -> None:
    reason = f"what is printed can no longer be written ({error.strerror})"
    print(f"fastgpt: {reason}; training goes on, its log too", file=sys.stderr, flush=True)


def _main(args: argparse.Namespace) -> int:
    config, saved, options = settings(vars(args))
    print(printable(f"training on {config.data} into {config.out}"), flush=True)
    result = train(config, saved, frozenset(options))
    if result.step and not config.eval_only:
        print(printable(f"saved {config.out}, {result.step:,} steps"))
    if result.interrupted:
        again = f"`fastgpt train --out {config.out} --resume`"
        print(printable(f"interrupted; {again} goes on from there"))
        return 128 + result.interrupted
    return 0


def settings(
    options: Mapping[str, Any],
) -> tuple[TrainConfig, dict[str, Any] | None, dict[str, Any]]:
    """The run's settings, the checkpoint that it resumes, if any, and the options' settings.

    An option goes before the saved run's, or else the config file's, and these before defaults.
    """
    known = {setting.name for setting in fields(TrainConfig)}
    from_file: dict[str, Any] = {}
    for path in options["config"]:
        with _from(str(path)):
            from_file |= nanogpt.read_config(path, known)
            check_each(from_file)
    if from_file:
        print(printable(f"what {options['config'][-1]} leaves out is as in nanoGPT's train.py"))
    from_options: dict[str, Any] = {}
    for name, value in options.items():
        if name in known or name.startswith("nanogpt_"):
            from_options |= nanogpt.translated(name.removeprefix("nanogpt_"), value)
    values = from_file | from_options
    check_each(values)
    out = Path(values.get("out", "out"))
    restarted = _restarted_run(out)
    if restarted or values.get("resume"):
        given = {} if restarted else from_options  # a restart repeats the command as it was
        values |= {"resume": True, "force": given.get("force", False)}
        values["init_from"] = given.get("init_from")
        values.setdefault("shard", _is_sharded(out))
        saved = restarted or sharded_folder.load(out, values["shard"])
        with _from(f"the checkpoint in {out}"):
            before = _saved_settings(saved)
            check_each(before)
        if "steps" in from_options and "minutes" not in from_options:
            values["minutes"] = None
        for line in changes(before, {**from_file, **values}):
            print(printable(line))
        values = before | values
    else:
        saved = None
    if "data" not in values:
        raise ValueError("--data names the folder that `fastgpt prepare` wrote; it is missing")
    return TrainConfig(**values), saved, from_options


@contextlib.contextmanager
def _from(source: str) -> Iterator[None]:
    """A block whose ValueError is raised again with the source of the bad setting."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _is_sharded(out: Path) -> bool:
    """Whether the checkpoint to resume from is sharded, where no option says so."""
    return not (out / LATEST).exists() and bool(sharded(out))


def _saved_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    config = saved.get("config", {})
    if "fastgpt" in saved and "out" in config:
        return kept_settings(config)
    known = {setting.name for setting in fields(TrainConfig)}
    translated: dict[str, Any] = {}
    for name, value in config.items():
        if name not in ("device", "dtype", "compile", "init_from"):  # of another machine
            translated |= nanogpt.translated(name, value)
    model = {k: v for k, v in saved["model_args"].items() if k in known}
    return kept_settings({k: v for k, v in translated.items() if k in known}) | model


def _restarted_run(out: Path) -> dict[str, Any] | None:
    """Where torchrun has started a job's processes again: the checkpoint that this job wrote."""
    if not world.restarts():
        return None
    lines = read(out / NAME)
    run = lines[0].get("run") if lines else None
    if run is None or not ((out / LATEST).exists() or sharded(out)):
        return None
    saved = sharded_folder.load(out, _is_sharded(out))
    return saved if saved.get("fastgpt", {}).get("run") == run else None
