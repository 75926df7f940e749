"""Checkpoints of a sharded run: folders out/sharded-STEP, whole as soon as they have that name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt import checkpoint
from fastgpt.model import GPT
from fastgpt.storage import files, shards
from fastgpt.training.folder import LATEST, RunFolder
from fastgpt.training.sharded import ShardedStep, set_steps, tensors_of
from fastgpt.training.trainer import Trainer

_NAME = re.compile(r"sharded-(\d+)")


def save(trainer: Trainer, folder: RunFolder | None, best: bool) -> None:
    """By all processes together. The best so far is kept besides the latest."""
    assert isinstance(trainer.step, ShardedStep)
    tensors, world, out = trainer.step.tensors(), trainer.world, Path(trainer.config.out)
    if folder is None:
        shards.write(tensors, Path(world.told(None)))
        world.wait()
        return
    path, state = out / f"sharded-{trainer.steps_done:06}", trainer.state()
    size = checkpoint.size_of(tensors) * world.size
    with files.replacing_folder(path, size) as made:
        shards.write(tensors, Path(world.told(str(made))))
        world.wait()
        info = {**state, "files": shards.checksums(made), "best": best}
        checkpoint.save_checkpoint(info, made / shards.INFO)
    _prune(out, trainer.config.keep, trainer.steps_done, best)


def _prune(out: Path, keep: int, step: int, best: bool) -> None:
    there = steps(out)
    outlived = [n for n in there if n > step]
    before = [n for n in there if n < step][: -max(keep - 1, 0) or None]
    for number in outlived + before:
        info = checkpoint.read(there[number] / shards.INFO)
        if number > step or best or not info.get("best"):
            files.remove(there[number])


def steps(out: Path) -> dict[int, Path]:
    found = ((_NAME.fullmatch(path.name), path) for path in out.glob("sharded-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def load(out: Path, shard: bool) -> dict[str, Any]:
    """The checkpoint to resume from: ckpt.pt, or of a sharded run all but its tensors."""
    there = steps(out)
    if not shard:
        if there and not (out / LATEST).exists():
            last = list(there.values())[-1]
            raise ValueError(
                f"{last} is sharded: --shard goes on with it, or `fastgpt convert {last} "
                f"{out}/{LATEST}` makes one file of it"
            )
        saved = checkpoint.load_checkpoint(out / LATEST)
        if there:
            _check_latest(saved, out / LATEST, list(there.values())[-1])
        return saved
    if not there:
        raise FileNotFoundError(f"no sharded checkpoint in {out}; leave out --shard")
    return info_of(list(there.values())[-1])


def _check_latest(saved: Mapping[str, Any], path: Path, sharded: Path) -> None:
    """ValueError where a sharded checkpoint may be what is meant: by --force two runs may meet."""
    info = checkpoint.read(sharded / shards.INFO)
    one, other = (found.get("fastgpt", {}).get("run") for found in (saved, info))
    if one != other or info.get("iter_num", 0) > saved.get("iter_num", 0):
        raise ValueError(
            f"{path} is of another run than {sharded}, or older: --shard goes on with the latter; "
            "to go on with the former, move the latter away"
        )


def info_of(path: Path) -> dict[str, Any]:
    """What is no tensor in a sharded checkpoint, whose files are as they were written."""
    info = checkpoint.read(path / shards.INFO)
    if not isinstance(info, dict) or not isinstance(info.get("files"), dict):
        raise ValueError(f"{path / shards.INFO} is not of a sharded checkpoint")
    shards.check(path, info["files"])
    return info


def restore(trainer: Trainer) -> None:
    """The tensors of the checkpoint that `load` has read the rest of."""
    assert isinstance(trainer.step, ShardedStep)
    path = Path(trainer.config.out) / f"sharded-{trainer.steps_done:06}"
    tensors = trainer.step.tensors()
    shards.read(tensors, path, alone=False)
    set_steps(trainer.optimizer, tensors["steps"])


def whole(path: Path) -> dict[str, Any]:
    """The checkpoint that one process would have written."""
    info = info_of(path)
    config = checkpoint.config_of(info["model_args"])
    expected, found = dict(checkpoint.shapes(config)), shards.sizes(path)
    for name, (shape, _) in found.items():
        kind, _, weight = name.partition(".")
        if kind == "model" and tuple(shape) != expected.get(weight):
            raise ValueError(
                f"{path}: {weight} is {tuple(shape)}, which `model_args` do not make it"
            )
    if sum(name.startswith("model.") for name in found) != len(expected) - 1:  # two are tied
        raise ValueError(f"{path}: its weights are not those of a GPT of its `model_args`")
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    tensors = tensors_of(model, optimizer)
    shards.read(tensors, path, alone=True)
    set_steps(optimizer, tensors["steps"])
    kept = {
        name: value for name, value in info.items() if name not in ("files", "best", "checksum")
    }
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **kept}
