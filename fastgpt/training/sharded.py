"""FSDP2: each process keeps its part of every weight, gradient and moment.

A step is nanoGPT's under autocast. The optimizer is PyTorch's fused AdamW, on each process's parts:
the copies and the one pass of optim.py are for whole tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.devices import autocast
from fastgpt.model import GPT
from fastgpt.optim import CLIP_EPS, MOMENTS
from fastgpt.train_step import Batch, Forward, SkippedSteps
from fastgpt.training.world import World


def problem(device_type: str) -> str | None:
    """Why this PyTorch can shard no model on such devices, or None."""
    if device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        return f"FSDP2 of PyTorch {torch.__version__} needs GPUs: use a later one, or no --shard"
    return None


class ShardedStep:
    """Called like TrainStep, for a model that it shards in place among the processes of `world`."""

    def __init__(
        self,
        model: GPT,
        weight_decay: float,
        lr: float,
        betas: tuple[float, float],
        max_norm: float,
        dtype: torch.dtype,
        world: World,
        compile: bool,
        capture: bool,
    ):
        if not world.launched:
            raise ValueError("--shard shares a model among processes: start them with torchrun")
        if capture or dtype == torch.float16:
            raise ValueError("--shard runs without --capture, in float32 or bfloat16")
        self.model, self.dtype, self.max_norm = model, dtype, max_norm
        self.device = model.lm_head.weight.device
        if reason := problem(self.device.type):
            raise ValueError(reason)
        _shard(model, self.device.type, world.size)
        self.forward: Forward = torch.compile(model) if compile else model
        how = (weight_decay, lr, betas, self.device.type)
        self.optimizer = model.configure_optimizers(*how)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.skipped, self.skipped_steps = 0, SkippedSteps()

    def __call__(self, batches: Sequence[Batch], seeds: Sequence[int] | None = None) -> Tensor:
        losses = []
        for number, (x, y) in enumerate(batches):
            if seeds is not None:
                torch.manual_seed(seeds[number])
            self.model.set_requires_gradient_sync(number == len(batches) - 1)  # type: ignore
            with autocast(self.device, self.dtype):
                loss = self.forward(x, y)[1] / len(batches)
            loss.backward()
            losses.append(loss.detach())
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).full_tensor()  # type: ignore[attr-defined]
        finite = bool(norm.isfinite())
        self.skipped = 0 if finite else self.skipped + 1
        self.skipped_steps.judge(self.skipped)
        if finite:
            if self.max_norm > 0:
                scale = (self.max_norm / (norm + CLIP_EPS)).clamp(max=1)
                for grad in grads:
                    grad.to_local().mul_(scale)  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def tensors(self) -> dict[str, Tensor]:
        """This process's parts of everything that training changes."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # a validation leaves some weights whole
                module.reshard()
        return tensors_of(self.model, self.optimizer)

    def parts(self) -> dict[str, Tensor]:
        """The same as plain tensors, for what is no business of the other processes."""
        tensors = self.tensors().items()
        return {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors}


def tensors_of(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, to be written or filled, and the optimizer's "steps" (1,)."""
    tensors: dict[str, Tensor] = {}
    steps = torch.zeros(1)
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:  # before the first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {moment: torch.zeros_like(p) for moment in MOMENTS}
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
        steps[0] = state["step"]  # every parameter's are the same
    return tensors | {"steps": steps}


def set_steps(optimizer: torch.optim.Optimizer, steps: Tensor) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(steps.item())


def _shard(model: GPT, device_type: str, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    # tied: one weight must be in one group
    fully_shard([model.transformer.wte, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
