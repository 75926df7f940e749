"""Checkpoints of a sharded run: folders out/sharded-STEP, whole as soon as they have that name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt import checkpoint
from fastgpt.model import GPT
from fastgpt.storage import files, shards
from fastgpt.training import optimizer_state
from fastgpt.training.folder import LATEST, RunFolder, sharded, superseded
from fastgpt.training.sharded import ShardedStep, set_steps, tensors_of
from fastgpt.training.trainer import Trainer


def save(trainer: Trainer, folder: RunFolder | None, best: bool) -> None:
    """Called by all processes together. The best so far is kept besides the latest."""
    assert isinstance(trainer.step, ShardedStep)
    tensors, world, out = trainer.step.tensors(), trainer.world, Path(trainer.config.out)
    if folder is None:
        shards.write(tensors, Path(world.told(None)))
        world.wait()
        return
    folder.check()
    path, state = out / f"sharded-{trainer.steps_done:06}", trainer.state()
    size = checkpoint.size_of(tensors) * world.size
    with files.replacing_folder(path, size) as temporary:
        shards.write(tensors, Path(world.told(str(temporary))))
        world.wait()
        info = {**state, "files": shards.checksums(temporary), "best": best}
        checkpoint.save_checkpoint(info, temporary / shards.INFO)
    folder.saved(path)
    checkpoints = sharded(out)
    for number in superseded(checkpoints, trainer.steps_done, max(folder.keep, 1)):
        if number > trainer.steps_done or best or not _is_best(checkpoints[number]):
            files.remove(checkpoints[number])


def _is_best(path: Path) -> bool:
    try:
        return bool(info_of(path).get("best"))
    except (OSError, ValueError):  # a damaged one is for its owner to look at
        return True


def latest(out: Path) -> Path:
    checkpoints = sharded(out)
    if not checkpoints:
        raise FileNotFoundError(f"no sharded checkpoint in {out}; leave out --shard")
    return list(checkpoints.values())[-1]


def best(out: Path) -> Path:
    """The checkpoint of the lowest validation loss."""
    paths = [path for path in sharded(out).values() if _is_best(path)]
    return paths[-1] if paths else latest(out)


def load(out: Path, shard: bool) -> dict[str, Any]:
    """The checkpoint to resume from: ckpt.pt, or of a sharded run all but its tensors."""
    if shard:
        last = latest(out)
        info = info_of(last)
        shards.check(last, info["files"])
        if (out / LATEST).exists():
            _check_newest(info, last, checkpoint.load_checkpoint(out / LATEST), out / LATEST)
        return info
    if not sharded(out):
        return checkpoint.load_checkpoint(out / LATEST)
    last = latest(out)
    if not (out / LATEST).exists():
        raise ValueError(
            f"{last} is sharded: --shard goes on with it, or `fastgpt convert {out} "
            f"{out}/{LATEST}` makes one file of it"
        )
    saved = checkpoint.load_checkpoint(out / LATEST)
    _check_newest(saved, out / LATEST, info_of(last), last)
    return saved


def _check_newest(
    saved: Mapping[str, Any], path: Path, other: Mapping[str, Any], other_path: Path
) -> None:
    """ValueError where the `other` kind of checkpoint may be what is meant."""
    one, two = (each.get("fastgpt", {}).get("run") for each in (saved, other))
    if one != two or other.get("iter_num", 0) > saved.get("iter_num", 0):
        flag = "--shard" if other_path.name != LATEST else "--no-shard"
        raise ValueError(
            f"{path} is of another run than {other_path}, or older: {flag} goes on with "
            f"{other_path}; to go on with {path}, move {other_path} away"
        )


def info_of(path: Path) -> dict[str, Any]:
    """What is no tensor in a sharded checkpoint; the files of those are not looked at here."""
    name = path / shards.INFO
    info = checkpoint.checked(checkpoint.read(name), name, weights=False)
    if not isinstance(info.get("files"), dict):
        raise ValueError(f"{name} lists no `files`: it is not of a sharded checkpoint")
    return info


def restore(trainer: Trainer) -> None:
    """Read the tensors of the checkpoint, whose other content `load` has read."""
    assert isinstance(trainer.step, ShardedStep)
    path, tensors = latest(Path(trainer.config.out)), trainer.step.tensors()
    shards.read(tensors, path, alone=False)
    set_steps(trainer.optimizer, tensors["steps"])
    mine = trainer.step.parts()
    bad = not all(optimizer_state.in_range(name.partition(".")[0], t) for name, t in mine.items())
    if trainer.world.largest([float(bad)])[0]:
        raise ValueError(f"{path} has weights or moments that are out of range")


def whole(path: Path) -> dict[str, Any]:
    """The checkpoint that one process would have written."""
    info = info_of(path)
    shards.check(path, info["files"])
    config = checkpoint.config_of(info["model_args"])
    expected, sizes = dict(checkpoint.shapes(config)), shards.sizes(path)
    for name, (shape, _) in sizes.items():
        kind, _, weight = name.partition(".")
        if kind == "model" and tuple(shape) != expected.get(weight):
            raise ValueError(
                f"{path}: {weight} is {tuple(shape)}, which does not fit its `model_args`"
            )
    if sum(name.startswith("model.") for name in sizes) != len(expected) - 1:  # two are tied
        raise ValueError(f"{path}: its weights are not those of a GPT of its `model_args`")
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    tensors = tensors_of(model, optimizer)
    shards.read(tensors, path, alone=True)
    set_steps(optimizer, tensors["steps"])
    entries = {
        name: value for name, value in info.items() if name not in ("files", "best", "checksum")
    }
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **entries}
