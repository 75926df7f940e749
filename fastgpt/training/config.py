"""Every setting of a training run, what values it may have, and what a resumed run starts from."""

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from fastgpt.checkpoint import LARGEST_COUNT
from fastgpt.devices import DTYPES

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias")
SCHEDULES = ("cosine", "constant-then-decay", "constant")


def _setting(default: Any, help: str, **more: Any) -> Any:
    """`least` and `most` are allowed, `above` and `below` are not."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """Each field is also the command-line option of its name."""

    data: str = _setting(MISSING, "folder that `fastgpt prepare` wrote")
    out: str = _setting("out", "folder of ckpt.pt, best.pt, log.jsonl and loss.png")
    init_from: str | None = _setting(
        None, "gpt2, gpt2-medium, ..., a Hugging Face folder or a ckpt.pt: weights to start from"
    )
    resume: bool = _setting(False, "go on from --out's checkpoint, with its settings")
    force: bool = _setting(False, "write over a run that is in --out")
    n_layer: int = _setting(6, "blocks", least=1)
    n_head: int = _setting(6, "attention heads per block", least=1)
    n_embd: int = _setting(384, "model width", least=1)
    block_size: int = _setting(256, "tokens of context", least=1)
    dropout: float = _setting(0.0, "dropout probability", least=0, below=1)
    bias: bool = _setting(False, "biases in linears and LayerNorms")
    batch_size: int = _setting(32, "sequences per forward", least=1)
    grad_accum: int = _setting(1, "forwards per optimizer step, of all processes", least=1)
    steps: int = _setting(5000, "optimizer steps in all", least=1)
    minutes: float | None = _setting(None, "train for so long instead of --steps", above=0)
    lr: float = _setting(1e-3, "highest learning rate", above=0)
    min_lr: float = _setting(1e-4, "learning rate at the end of the decay", least=0)
    warmup: int = _setting(100, "steps of rising learning rate", least=0)
    schedule: str = _setting("cosine", "of the learning rate after that", choices=SCHEDULES)
    lr_decay_steps: int | None = _setting(None, "step of --min-lr (--steps)", least=1)
    decay_fraction: float = _setting(
        0.2, "of the steps that constant-then-decay decays in", above=0, most=1
    )
    weight_decay: float = _setting(0.1, "AdamW's, for matrices only", least=0)
    beta1: float = _setting(0.9, "AdamW's", least=0, below=1)
    beta2: float = _setting(0.95, "AdamW's", least=0, below=1)
    grad_clip: float = _setting(1.0, "largest gradient norm, 0 for any", least=0)
    eval_every: int = _setting(250, "steps between validations; each saves a checkpoint", least=1)
    eval_iters: int = _setting(20, "batches per validation", least=1)
    eval_only: bool = _setting(False, "validate once and end")
    keep: int = _setting(0, "numbered checkpoints to keep besides", least=0)
    sample_tokens: int = _setting(0, "tokens to sample at each validation", least=0)
    log_every: int = _setting(1, "steps between lines of log.jsonl", least=1)
    tensorboard: bool = _setting(False, "log to TensorBoard too, in --out")
    wandb: str | None = _setting(
        None, "log to Weights & Biases too", choices=("online", "offline", "disabled")
    )
    wandb_project: str = _setting("fastgpt", "W&B's project")
    wandb_name: str | None = _setting(None, "W&B's name of the run")
    dtype: str | None = _setting(
        None, "of autocast; default: what suits the device", choices=tuple(DTYPES)
    )
    device: str | None = _setting(None, "cuda, cuda:1, cpu, ...; default: a GPU if there is one")
    seed: int = _setting(1337, "of weights, batches and dropout", least=0, below=2**63)
    compile: bool = _setting(False, "torch.compile the model")
    capture: bool | None = _setting(
        None, "replay a CUDA graph; default: on one GPU, where nothing else speaks against it"
    )
    checkpoint_blocks: bool = _setting(False, "save memory: compute blocks again in the backward")
    shard: bool = _setting(False, "FSDP2: split weights and optimizer among the processes")

    def __post_init__(self) -> None:
        check_each({setting.name: getattr(self, setting.name) for setting in fields(TrainConfig)})
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"try n_embd={math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )
        if self.resume and self.force:
            raise ValueError("resume and force contradict each other: go on, or begin anew")
        if self.resume and self.init_from:
            raise ValueError("resume and init_from contradict each other: each names the weights")


def check_each(settings: Mapping[str, Any]) -> None:
    """ValueError names a setting whose value no run can have, whatever the others are."""
    kinds, known = typing.get_type_hints(TrainConfig), {s.name: s for s in fields(TrainConfig)}
    for name, value in settings.items():
        _check_kind(name, value, kinds[name])
        if value is not None:
            _check_range(name, value, known[name].metadata)


def _check_kind(name: str, value: Any, kind: Any) -> None:
    allowed = typing.get_args(kind) or (kind,)
    if float in allowed:
        allowed = (*allowed, int)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join(k.__name__ for k in allowed if k is not type(None))
        raise ValueError(f"{name}={value!r:.60} must be of type {wanted}")
    if isinstance(value, str) and ("\0" in value or not value):
        what = "holds a byte of 0" if value else "is empty"
        raise ValueError(f"{name}={value!r:.60} {what}, which is no name")


def _check_range(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    if isinstance(value, float) and 0 < abs(value) < 1e-30:
        raise ValueError(f"{name}={value} is too small to count for anything; use 0 or more")
    if isinstance(value, int) and value > (most := limits.get("below", LARGEST_COUNT + 1) - 1):
        raise ValueError(f"{name} is a number of {len(str(value))} digits; it can be {most}")
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"{name}={value!r:.60}; use one of {', '.join(limits['choices'])}")
    if "least" in limits and value < limits["least"]:
        raise ValueError(f"{name}={value} must be at least {limits['least']}")
    if "above" in limits and value <= limits["above"]:
        raise ValueError(f"{name}={value} must be above {limits['above']}")
    if "below" in limits and value >= limits["below"]:
        raise ValueError(f"{name}={value} must be below {limits['below']}")
    if "most" in limits and value > limits["most"]:
        raise ValueError(f"{name}={value} must be at most {limits['most']}")


# what belongs to an invocation, not to the run
_NOT_KEPT = ("out", "resume", "force", "init_from", "eval_only")


def kept_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings in a checkpoint those that a resumed run goes on with."""
    names = {setting.name for setting in fields(TrainConfig)} - set(_NOT_KEPT)
    return {name: value for name, value in settings.items() if name in names}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting of `now` that is not as `before`. ValueError for a shape."""
    changed = [n for n in now if n in before and before[n] != now[n] and n not in _NOT_KEPT]
    for name in changed:
        if name in SHAPE:
            raise ValueError(
                f"{name}={now[name]}, but the checkpoint's model has {name}={before[name]}; leave "
                "the option out, or train a new model in another --out"
            )
    return [f"{option(n)}: {before[n]} before, {now[n]} from now on" for n in changed]


def option(name: str) -> str:
    return "--" + name.replace("_", "-")
