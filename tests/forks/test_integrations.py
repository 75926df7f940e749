"""Libraries that put themselves around a model: what they make of nanoGPT, they make of fastgpt."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fastgpt
from tests.forks.test_changes import THEIRS, batch, built

IDX, TARGETS = batch()


def agree(function: Any, **tolerance: float) -> None:
    """`function` of either model gives the same tensors."""
    ours, theirs = (function(built(library, (), ExitStack())) for library in (fastgpt, THEIRS))
    torch.testing.assert_close(ours, theirs, **(tolerance or dict(rtol=1e-3, atol=1e-4)))


def losses(model: Any, parameters: Any, steps: int = 3) -> list[torch.Tensor]:
    optimizer, found = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(steps):
        loss = model(IDX, TARGETS)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def sampled(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model.eval().generate(IDX[:, :3], 9, top_k=5)


@pytest.mark.parametrize("merged", [False, True])
def test_peft_lora(merged):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    modules = ["c_attn", "c_fc", "mlp.c_proj"]
    lora = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)

    def run(model):
        torch.manual_seed(2)
        model = peft.inject_adapter_in_model(lora, model)
        if merged:
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.merge()
        model.train()
        found = [] if merged else losses(model, [p for p in model.parameters() if p.requires_grad])
        return [*found, model(IDX, TARGETS)[0].detach(), sampled(model)]

    agree(run)


def test_peft_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)

    def run(model):
        torch.manual_seed(2)
        wrapped = peft.PeftModel(model, lora)
        found = losses(wrapped, [p for p in wrapped.parameters() if p.requires_grad])
        with wrapped.disable_adapter():
            found.append(wrapped(IDX, TARGETS)[1].detach())
        return [*found, wrapped(IDX, TARGETS)[1].detach(), sampled(wrapped.merge_and_unload())]

    agree(run)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def run(model):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        prepared, optimizer = accelerator.prepare(model, optimizer)
        found = []
        for _ in range(3):
            with accelerator.accumulate(prepared):
                loss = prepared(IDX, TARGETS)[1]
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.detach())
        state = accelerator.unwrap_model(prepared).state_dict()
        return [*found, len(state)]

    agree(run, **(dict(rtol=2e-2, atol=1e-2) if precision == "bf16" else {}))


@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averaged_weights(multi_avg_fn):
    def run(model):
        average = AveragedModel(model, multi_avg_fn=multi_avg_fn)
        for _ in range(3):
            losses(model, model.parameters(), steps=1)
            average.update_parameters(model)
        again = AveragedModel(model, multi_avg_fn=multi_avg_fn)
        again.load_state_dict(average.state_dict())
        return [*again(IDX, TARGETS), sampled(again.module)]

    agree(run)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_callers_own_checkpointing(use_reentrant):
    """Of the whole model, and of single blocks in a forward of the caller's."""

    def run(model):
        x = model.transformer.wte(IDX) + model.transformer.wpe(torch.arange(8))
        for block in model.transformer.h:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        x.sum().backward()
        _, loss = checkpoint(model, IDX, TARGETS, use_reentrant=False)
        loss.backward()
        return [loss.detach(), x.detach(), *(p.grad for p in model.parameters())]

    agree(run)


def replica_of(module: torch.nn.Module, copies: dict[Any, Any]) -> Any:
    """What DataParallel runs on each device: modules without parameters, their copies as tensors,
    as torch.nn.parallel.replicate makes them.
    """
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child, copies)
    for name, p in module._parameters.items():
        copy = None if p is None else copies.setdefault(p, p * 1.0)
        setattr(replica, name, copy)
    for name, buffer in module._buffers.items():
        setattr(replica, name, buffer)
    return replica


@pytest.mark.parametrize("return_logits", [True, False])
def test_data_parallels_replicas(return_logits):
    def run(model):
        model.config.return_logits = return_logits
        replicas = [replica_of(model, {}) for _ in range(2)]
        shares = zip(replicas, (IDX[:1], IDX[1:]), (TARGETS[:1], TARGETS[1:]), strict=True)
        found = [replica(idx, targets)[1] for replica, idx, targets in shares]
        sum(found).backward()
        return [*(loss.detach() for loss in found), *(p.grad for p in model.parameters())]

    agree(run)
