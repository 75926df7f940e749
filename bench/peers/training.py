"""One training step of every variant: forward, backward, clipping, AdamW, as nanoGPT's train.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import models
from fastgpt import GPTConfig, devices, use_backend
from fastgpt.train_step import Forward, TrainStep

DTYPES = ("float32", "tf32", "bfloat16", "float16")
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0  # nanoGPT's

# One step on ids (B, T) and targets (B, T): it updates the weights and returns the loss.
Step = Callable[[Tensor, Tensor], Tensor]
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """What all variants of one comparison share."""

    config: GPTConfig
    weights: models.Weights
    device: torch.device
    dtype: str  # of DTYPES

    def autocast(self) -> torch.autocast:
        return devices.autocast(self.device, matmul_dtype(self.dtype))


# "nologits" variants and liger-fused return no logits, as a training loop needs none. "compile" is
# eager under torch.compile, "fastgpt-compile" what is measured to win there (backend.OPS). What has
# the name of a peer alone runs as that peer's users run it.
VARIANTS: dict[str, Callable[[Run], Step]] = {
    "eager": lambda run: _step(run, _gpt(run), plain_adamw),
    "compile": lambda run: _step(run, _gpt(run), plain_adamw, compiled=True),
    "nanogpt": lambda run: _step(run, _nanogpt(run), own_adamw),
    "nanogpt-compile": lambda run: _step(run, _nanogpt(run), own_adamw, compiled=True),
    "hf": lambda run: _step(run, _hugging_face(run), plain_adamw),
    "liger": lambda run: _step(run, _liger(run, fused=False), plain_adamw),
    "liger-fused": lambda run: _step(run, _liger(run, fused=True), plain_adamw),
    "fastgpt": lambda run: _step(run, _gpt(run), own_adamw, "auto"),
    "fastgpt-nologits": lambda run: _step(run, _gpt(run, return_logits=False), own_adamw, "auto"),
    "fastgpt-compile": lambda run: _step(run, _gpt(run), own_adamw, "auto", compiled=True),
    "fastgpt-compile-nologits": lambda run: _step(
        run, _gpt(run, return_logits=False), own_adamw, "auto", compiled=True
    ),
    "fastgpt-compile-eager-logits": lambda run: _step(
        run, _gpt(run, return_logits="eager"), own_adamw, "auto", compiled=True
    ),
    "fastgpt-compile-ops": lambda run: _compiled_around_kernels(run),
    "fastgpt-step": lambda run: _own_step(run),
    "fastgpt-step-graph": lambda run: _own_step(run, capture=True, overlap=False),
    "fastgpt-step-overlap": lambda run: _own_step(run, capture=True, overlap=True),
}


def _gpt(run: Run, **changes: Any) -> nn.Module:
    return models.gpt(run.config, run.weights, run.device, **changes)


def _nanogpt(run: Run) -> nn.Module:
    return models.nanogpt(run.config, run.weights, run.device)


def _hugging_face(run: Run) -> nn.Module:
    return models.HuggingFaceLoss(models.hugging_face(run.config, run.weights, run.device))


def _liger(run: Run, fused: bool) -> nn.Module:
    if run.device.type != "cuda":
        raise models.Absent("Liger's kernels need a GPU")
    return models.Liger(run.config, run.weights, run.device, fused)


def _step(
    run: Run,
    model: nn.Module,
    make_optimizer: Callable[[Any, str], torch.optim.Optimizer],
    backend: str = "torch",
    compiled: bool = False,
    chosen: dict[str, str] | None = None,  # op -> implementation
) -> Step:
    """The step that autograd and an optimizer make of a model called as nanoGPT's."""
    with models.quietly():
        optimizer = make_optimizer(model, run.device.type)
    params = list(model.parameters())
    # a scale at which nothing overflows: a skipped step would be faster, and no step
    scaler = torch.amp.GradScaler(
        run.device.type, init_scale=1024.0, enabled=run.dtype == "float16"
    )
    forward: Forward = torch.compile(model) if compiled else model
    autocast = run.autocast()  # not `run` itself: it holds another copy of the weights

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        with use_backend(backend, **(chosen or {})):
            with autocast:
                _, loss = forward(idx, targets)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _compiled_around_kernels(run: Run) -> Step:
    if run.device.type != "cuda":
        raise models.Absent("our kernels need a GPU")
    chosen = dict.fromkeys(("layer_norm", "add_layer_norm", "cross_entropy"), "triton")
    chosen["compiled"] = "torch"  # op by op, where the fused path would be traced
    return _step(run, _gpt(run), own_adamw, "auto", compiled=True, chosen=chosen)


def _own_step(run: Run, **how: bool) -> Step:
    """fastgpt's: weights kept in the matmuls' dtype, one pass of its optimizer, a CUDA graph."""
    model = models.gpt(run.config, run.weights, run.device, return_logits=False)
    dtype = matmul_dtype(run.dtype)
    with models.quietly():
        own = TrainStep(model, WEIGHT_DECAY, LEARNING_RATE, BETAS, CLIP, dtype, **how)

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        with use_backend("auto"):
            return own([(idx, targets)])

    return step


def own_adamw(model: Any, device_type: str) -> torch.optim.Optimizer:
    """What the model itself would train with."""
    return model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, device_type)


def plain_adamw(model: nn.Module, device_type: str) -> torch.optim.Optimizer:
    """nanoGPT's groups: it decays what is two-dimensional, and is fused on a GPU only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type == "cuda"
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=fused)


def batches(config: GPTConfig, B: int, n: int, device: torch.device) -> Batches:
    """The same n pairs of random ids and targets (B, T), contiguous, at every call."""
    draw = torch.Generator().manual_seed(0)
    shape = (B, config.block_size + 1)
    ids = [torch.randint(config.vocab_size, shape, generator=draw) for _ in range(n)]
    return [(x[:, :-1].contiguous().to(device), x[:, 1:].contiguous().to(device)) for x in ids]


def matmul_dtype(dtype: str) -> torch.dtype:
    """What matrices are multiplied in; tf32 is a way to multiply float32's."""
    return devices.DTYPES["float32" if dtype == "tf32" else dtype]


def set_precision(dtype: str) -> None:
    """nanoGPT's train.py allows TF32 in every dtype; float32 here means that it is not."""
    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
