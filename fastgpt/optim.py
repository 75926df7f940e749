"""AdamW: torch.optim's, with the checks that its fused kernel lacks, and fastgpt's own step.

    norm = |grads| / loss_scale         coef = min(1, max_norm / (norm + 1e-6))
    torch.optim.AdamW's update by coef * grads / loss_scale, unless norm is not finite

Groups and state are torch.optim.AdamW's, and load from and into it. Where kernels run, one launch
reads the gradients for their norm and another does all the rest (kernels/adamw.py); elsewhere it is
PyTorch's fused AdamW, which takes the scale along, or its plain one. A step whose gradients are not
all finite changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, reference

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
MOMENTS = ("exp_avg", "exp_avg_sq")
PYTORCHS = torch.optim.AdamW  # as of import: a fork may put another there
_ALL_MOMENTS = (*MOMENTS, "max_exp_avg_sq")  # the last with amsgrad only


class CheckedAdamW(PYTORCHS):
    """torch.optim.AdamW, refusing state that does not fit, by the names of the parameters.

    PyTorch's fused kernel takes tensors for flat memory of the parameter's size: moments of another
    shape are written out of bounds, those and gradients in other strides are mixed up.
    """

    def __init__(
        self, groups: Iterable[Any], names: Mapping[Any, str] | None = None, **options: Any
    ):
        super().__init__(groups, **options)
        self.names = dict(names or {})  # its keys are parameters

    def __getstate__(self) -> dict[str, Any]:
        """What deep copies and pickles keep: PyTorch keeps no attribute of a subclass."""
        return super().__getstate__() | {"names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies, and the end of load_state_dict. ValueError before anything is replaced."""
        vars(self).setdefault("names", state.get("names", {}))
        for number, group in enumerate(state["param_groups"]):
            for i, p in enumerate(group["params"]):
                self._check_state(f"parameter {i} of group {number}", p, state["state"].get(p, {}))
        super().__setstate__(state)
        self._step_supports_amp_scaling = all(g.get("fused") for g in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check()
        _without_hooks(PYTORCHS.step)(self)
        return loss

    def check(self) -> None:
        """Refuse what does not fit the parameters, and lay out the rest in memory as they are."""
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                position, state = f"parameter {i} of group {number}", self.state.get(p, {})
                if p.grad.layout != torch.strided:
                    name = self._name(position, p)
                    raise RuntimeError(f"{name} has a sparse gradient, which AdamW cannot take")
                if not _alike(p.grad, p):
                    p.grad = torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)
                if group["fused"] and not _dense(p):  # taken for one piece of memory
                    group["fused"] = None
                self._check_state(position, p, state)
                for moment in _ALL_MOMENTS:
                    if moment in state and not _alike(state[moment], p):
                        state[moment] = torch.empty_like(p).copy_(state[moment])

    def _check_state(self, position: str, p: Tensor, state: Mapping[str, Any]) -> None:
        if not state:
            return  # made at the first step
        for key in ("step", *MOMENTS):
            if key not in state:
                raise ValueError(f"the optimizer state of {self._name(position, p)} lacks {key!r}")
        for moment in _ALL_MOMENTS:
            m = state.get(moment, p)
            if not isinstance(m, Tensor) or _kind(m) != _kind(p):
                found = _described(m) if isinstance(m, Tensor) else type(m).__name__
                raise ValueError(
                    f"the optimizer's {moment} of {self._name(position, p)} is {found}, it must be "
                    f"like the parameter, {_described(p)}; is it the state of another model?"
                )
        if isinstance(state["step"], Tensor) and state["step"].numel() != 1:
            found, name = _described(state["step"]), self._name(position, p)
            raise ValueError(f"the optimizer's step of {name} is {found}, it must be one number")

    def _name(self, position: str, p: Tensor) -> str:
        return self.names.get(p, position)


class AdamW(CheckedAdamW):
    """`max_norm` 0 clips nothing. `copies` maps parameters to tensors of another dtype that every
    step leaves equal to them: what the next forward's matmuls read. `skipped` counts the steps
    since the last one whose gradients were finite, on the device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        max_norm: float = 0.0,
        copies: Mapping[Any, Tensor] | None = None,  # its keys are parameters
        names: Mapping[Any, str] | None = None,
    ):
        super().__init__(groups, names, lr=lr, betas=betas, fused=True)
        self.max_norm, self.copies = max_norm, dict(copies or {})
        self.skipped: Tensor | None = None
        self._forget()
        self.copy_weights()

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(max_norm=self.max_norm, copies=self.copies, skipped=self.skipped)
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True  # fused or not
        self._forget()

    def _forget(self) -> None:
        """What follows from where tensors are in memory, which a copy of this object must not keep:
        name -> what it was made from, and it; parameter -> its state when it was last copied.
        """
        self._made: dict[str, tuple[Any, Tensor]] = {}
        self._copied: dict[Tensor, tuple[int, int]] = {}

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Bring copies up to date where something else has changed the parameters.

        PyTorch counts the changes of a tensor, but not those through `p.data`: only another tensor
        put there is noticed. After `p.data.clamp_()` and the like call `forget_copies` first.
        """
        stale = [p for p in self.copies if self._copied.get(p) != _state_of(p)]
        if stale:
            torch._foreach_copy_([self.copies[p] for p in stale], stale)
            self._note_copied(stale)

    def forget_copies(self) -> None:
        """Take every copy for out of date."""
        self._copied.clear()

    def _after_update(self) -> None:
        self.forget_copies()  # the fused update does not count as a change
        self.copy_weights()

    def _note_copied(self, params: Iterable[Tensor]) -> None:
        self._copied.update((p, _state_of(p)) for p in params if p in self.copies)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("this AdamW takes no closure; torch.optim.AdamW does")
        self.check()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        kernels = self._one_launch(params)
        if kernels is not reference:
            self._step_in_kernels(kernels, params)
        elif all(p.dtype == torch.float32 for p in params) and self._all_groups("fused"):
            self._step_in_pytorch(params)
        else:
            self._step_like_nanogpt(params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of a torch.optim.AdamW that is not fused."""
        groups = [dict(group, fused=True, foreach=None) for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def _all_groups(self, option: str) -> bool:
        return all(group[option] for group in self.param_groups)

    def _one_launch(self, params: list[Tensor]) -> Any:
        """The kernels, if they know all that the groups ask for, and these ask for the same."""
        ways = [(g["lr"], *g["betas"], g["eps"]) for g in self.param_groups]
        unknown = ("amsgrad", "maximize", "capturable", "differentiable")
        if not all(isinstance(number, (int, float)) for way in ways for number in way):
            return reference
        if len(set(ways)) > 1 or any(g.get(name) for g in self.param_groups for name in unknown):
            return reference
        if not self._all_groups("fused") or not all(p.is_contiguous() for p in params):
            return reference
        if any(p.grad.dtype != p.dtype for p in params if p.grad is not None):
            return reference
        copies = ((p, self.copies[p]) for p in params if p in self.copies)
        if not all(_alike(copy, p) for p, copy in copies):
            return reference
        return backend.choose("adamw", *params)

    def _divisor(self, norm: Tensor) -> Tensor:
        """What to divide the gradients of this (scaled) norm by: the loss scale, and more to clip.
        NaN where the norm is not finite.
        """
        given = getattr(self, "grad_scale", None)  # set by a GradScaler, and taken away again
        scale = norm.new_ones(()) if given is None else given.to(norm.device)
        if self.max_norm > 0:
            scale = scale * ((norm / scale + CLIP_EPS) / self.max_norm).clamp(min=1)
        return scale.where(self._counted(norm.isfinite()), float("nan"))

    def _counted(self, finite: Tensor) -> Tensor:
        before = 0 if self.skipped is None else self.skipped
        self.skipped = (before + 1) * ~finite
        return finite

    def _step_in_pytorch(self, params: list[Tensor]) -> None:
        grads: list[Any] = [p.grad for p in params]
        divisor = self._divisor(torch.nn.utils.get_total_norm(grads))
        before = {name: vars(self).pop(name, None) for name in ("grad_scale", "found_inf")}
        self.grad_scale, self.found_inf = divisor.nan_to_num(1.0), divisor.isnan().float()
        try:
            _without_hooks(PYTORCHS.step)(self)
        finally:
            del self.grad_scale, self.found_inf
            vars(self).update({name: t for name, t in before.items() if t is not None})
        self._after_update()

    def _step_like_nanogpt(self, params: list[Tensor]) -> None:
        """In as many passes as there, whatever the dtypes and options. Waits for the device."""
        grads: list[Any] = [p.grad for p in params]
        before = {name: vars(self).pop(name, None) for name in ("grad_scale", "found_inf")}
        if before["grad_scale"] is not None:
            for grad in grads:
                grad.div_(before["grad_scale"].to(grad.device))
        norm = torch.nn.utils.get_total_norm(grads)
        try:
            if self._counted(norm.isfinite()):
                if self.max_norm > 0:
                    torch.nn.utils.clip_grads_with_norm_(params, self.max_norm, norm)
                _without_hooks(PYTORCHS.step)(self)
        finally:
            vars(self).update({name: t for name, t in before.items() if t is not None})
        self._after_update()

    def _step_in_kernels(self, adamw: Any, params: list[Tensor]) -> None:
        table, chunks, decay = self._tables(adamw, params)
        divisor = self._divisor(adamw.sum_of_squares(table, chunks).sqrt())
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, (~divisor.isnan()).float())
        group = self.param_groups[0]
        taken = torch.stack(steps).double()
        corrections = torch.stack([1 - beta**taken for beta in group["betas"]], dim=1)
        dtype = next((c.dtype for c in self.copies.values()), torch.float32)
        adamw.launch_update(
            table, chunks, 1 / divisor, corrections.float(), decay,
            group["lr"], group["betas"], group["eps"], dtype,
        )  # fmt: skip
        self._note_copied(params)

    def _tables(self, adamw: Any, params: list[Tensor]) -> tuple[Tensor, ...]:
        """The kernels' view of the parameters and their state. Gradients move from step to step:
        what is sent then must be little, and must not wait for the device.
        """
        device = params[0].device
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state |= {m: torch.zeros_like(p) for m in MOMENTS}
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


def _without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without what PyTorch wraps around it, which our own step already has."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape have their elements in one order in memory."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _dense(t: Tensor) -> bool:
    """Whether t fills one piece of memory, in whatever order of its dimensions."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device, t.layout


def _described(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _state_of(p: Tensor) -> tuple[int, int]:
    return p._version, p.data_ptr()
