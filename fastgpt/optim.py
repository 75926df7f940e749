"""AdamW as fastgpt's own training step takes it: unscaled, clipped, updated and copied in one go.

    norm = |grads| / loss_scale         coef = min(1, max_norm / (norm + 1e-6))
    torch.optim.AdamW's update by coef * grads / loss_scale, unless norm is not finite

Groups and state are torch.optim.AdamW's, and load from and into it. Where kernels run, one launch
reads the gradients for their norm and another does all the rest (kernels/adamw.py); elsewhere it is
PyTorch's fused AdamW, which takes the scale along. A step whose gradients are not all finite
changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, reference

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class AdamW(torch.optim.AdamW):
    """`max_norm` 0 clips nothing. `copies` maps parameters to tensors of another dtype that every
    step leaves equal to them: what the next forward's matmuls read.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        max_norm: float = 0.0,
        copies: Mapping[Any, Tensor] | None = None,  # its keys are parameters
    ):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.max_norm, self.copies = max_norm, dict(copies or {})
        self._made: dict[str, tuple[Any, Tensor]] = {}  # name -> what it was made from, and it
        self.copy_weights()

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Bring the copies up to date, after something else has changed the parameters."""
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("this AdamW takes no closure; torch.optim.AdamW does")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            p.grad = p.grad.contiguous()
        kernels = backend.choose("adamw", *params)
        alike = {(g["lr"], tuple(g["betas"]), g["eps"]) for g in self.param_groups}
        if kernels is not reference and len(alike) == 1:  # one launch for all groups
            self._step_in_kernels(kernels, params)
        else:
            self._step_in_pytorch(params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of a torch.optim.AdamW that is not fused."""
        groups = [dict(group, fused=True, foreach=None) for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def _divisor(self, norm: Tensor) -> Tensor:
        """What to divide the gradients of this (scaled) norm by: the loss scale, and more to clip.
        NaN where the norm is not finite.
        """
        given = getattr(self, "grad_scale", None)  # set by a GradScaler, and taken away again
        scale = norm.new_ones(()) if given is None else given.to(norm.device)
        if self.max_norm > 0:
            scale = scale * ((norm / scale + CLIP_EPS) / self.max_norm).clamp(min=1)
        return scale.where(norm.isfinite(), float("nan"))

    def _step_in_pytorch(self, params: list[Tensor]) -> None:
        grads: list[Any] = [p.grad for p in params]
        divisor = self._divisor(torch.nn.utils.get_total_norm(grads))
        before = {name: vars(self).pop(name, None) for name in ("grad_scale", "found_inf")}
        self.grad_scale, self.found_inf = divisor.nan_to_num(1.0), divisor.isnan().float()
        try:
            super().step()
        finally:
            del self.grad_scale, self.found_inf
            vars(self).update({name: t for name, t in before.items() if t is not None})
        self.copy_weights()

    def _step_in_kernels(self, adamw: Any, params: list[Tensor]) -> None:
        table, chunks, decay = self._tables(adamw, params)
        divisor = self._divisor(adamw.sum_of_squares(table, chunks).sqrt())
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, (~divisor.isnan()).float())
        group = self.param_groups[0]
        taken = torch.stack(steps).double()
        corrections = torch.stack([1 - beta**taken for beta in group["betas"]], dim=1)
        dtype = next((c.dtype for c in self.copies.values()), torch.float32)
        adamw.update(table, chunks, 1 / divisor, corrections.float(), decay,
                     group["lr"], group["betas"], group["eps"], dtype)  # fmt: skip

    def _tables(self, adamw: Any, params: list[Tensor]) -> tuple[Tensor, ...]:
        """The kernels' view of the parameters and their state. Gradients move from step to step:
        what is sent then must be little, and must not wait for the device.
        """
        device = params[0].device
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] |= {m: torch.zeros_like(p) for m in ("exp_avg", "exp_avg_sq")}
        moments = [(self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]) for p in params]
        copies = [self.copies.get(p) for p in params]
        rows: list[Any] = [
            (p, *mv, copy, p.grad) for p, mv, copy in zip(params, moments, copies, strict=True)
        ]
        table, sizes = adamw.table(rows), [p.numel() for p in params]
        decay = {p: g["weight_decay"] for g in self.param_groups for p in g["params"]}
        decays = [float(decay[p]) for p in params]
        return (
            self._latest("table", table, lambda: _sent(table, torch.int64, device).view(-1, 6)),
            self._latest("chunks", sizes, lambda: adamw.chunks(params)),
            self._latest("decays", decays, lambda: _sent(decays, torch.float32, device)),
        )

    def _latest(self, name: str, facts: Any, make: Callable[[], Tensor]) -> Tensor:
        """make(), called again only when `facts` changed."""
        if name not in self._made or self._made[name][0] != facts:
            self._made[name] = facts, make()
        return self._made[name][1]


def _sent(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    t = torch.tensor(numbers, dtype=dtype)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
