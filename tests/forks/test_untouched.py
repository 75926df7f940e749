"""What is found to be changed, question by question: each condition of untouched.py on its own.

test_changes.py shows that the numbers are nanoGPT's. Here it is shown why, in a second: the mutants
of tests/mutations/untouched.diff leave out one condition each.
"""

import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.fused import untouched
from fastgpt.fused.block import Settings
from fastgpt.fused.whole import fused_model
from fastgpt.implementations.interception import interception, sdpa_is_restricted
from tests.forks.changes.hooks import double_output, halve_gradient, halve_incoming, halve_input
from tests.forks.changes.patches import Doubling, DoublingBelow
from tests.forks.changes.sizes import SIZES, C
from tests.forks.changes.tensors import Subclass
from tests.forks.changes.wrappers import Doubled
from tests.marks import slow

IDX = torch.zeros(2, 8, dtype=torch.int64)
MATH = SDPBackend.MATH


def built(**changes) -> GPT:
    return GPT(GPTConfig(**SIZES | changes))


def block_of(model: GPT, p: float = 0.0):
    return untouched.block_weights(model.transformer.h[0], Settings(2, False, p), C)


def embeddings_of(model: GPT) -> bool:
    return untouched.embeddings_as_built(model, model.lm_head.weight, 8)


def everything(model: GPT) -> list[bool]:
    head = model.lm_head
    return [
        untouched.calls_untouched(), interception() is None, not sdpa_is_restricted(),
        block_of(model) is not None, embeddings_of(model), untouched.plain_matmul(head),
        untouched.decodable(model), fused_model(model, IDX) is not None,
    ]  # fmt: skip


@pytest.mark.parametrize("config", [{}, {"bias": False}, {"n_layer": 1}], ids=str)
def test_a_model_as_built(config):
    assert all(everything(built(**config)))


def test_a_model_that_was_changed_back():
    model = built()
    for module in model.modules():
        module.register_forward_hook(double_output).remove()
        module.register_forward_pre_hook(halve_input).remove()
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    parametrize.remove_parametrizations(model.lm_head, "weight", leave_parametrized=False)
    model.transformer.wte.weight = model.lm_head.weight
    with sdpa_kernel(MATH), mock.patch.object(F, "gelu", F.relu), Doubling(F.gelu):
        assert not any(everything(model)[1:3])
    model.train().eval().requires_grad_(False)
    with torch.device("cpu"), torch.no_grad():  # torch.set_default_device is a mode, too
        assert all(everything(model))


# Of a module (any of a block's): what calling it runs is no more what its class says.
CALLS = {
    "class": lambda m: setattr(m, "__class__", type("Other", (type(m),), {})),
    "forward": lambda m: setattr(m, "forward", m.forward),
    "_call_impl": lambda m: setattr(m, "_call_impl", m._call_impl),
    "_wrapped_call_impl": lambda m: setattr(m, "_wrapped_call_impl", m._wrapped_call_impl),
    "compile": lambda m: m.compile(backend="eager"),
    "hook": lambda m: m.register_forward_hook(double_output),
    "pre-hook": lambda m: m.register_forward_pre_hook(halve_input),
    "backward hook": lambda m: m.register_full_backward_hook(halve_gradient),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(halve_incoming),
}
PARTS = ("", "ln_1", "attn", "attn.c_attn", "attn.c_proj", "attn.resid_dropout", "ln_2", "mlp",
         "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "mlp.dropout")  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_part_that_is_called_otherwise(call):
    for part in PARTS:
        model = built()
        CALLS[call](model.transformer.h[0].get_submodule(part))
        assert block_of(model) is None and not untouched.decodable(model), part
    for name, question in {"transformer.wte": embeddings_of, "transformer.wpe": embeddings_of,
                           "lm_head": embeddings_of, "transformer.ln_f": untouched.decodable,
                           "transformer.drop": untouched.decodable,
                           "": untouched.decodable}.items():  # fmt: skip
        model = built()
        CALLS[call](model.get_submodule(name))
        assert not question(model) and not untouched.decodable(model), name


METHODS = ("forward", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
KINDS = {
    "GPT": "", "Block": "transformer.h.0", "CausalSelfAttention": "transformer.h.0.attn",
    "MLP": "transformer.h.0.mlp", "LayerNorm": "transformer.ln_f", "Linear": "lm_head",
    "GELU": "transformer.h.0.mlp.gelu", "Embedding": "transformer.wte",
    "Dropout": "transformer.drop",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_was_assigned_to(kind, method):
    model = built()
    kind = type(model.get_submodule(KINDS[kind]))
    other = lambda self, *args: None  # noqa: E731
    with mock.patch.object(kind, method, other):
        changed = not untouched.calls_untouched()
    assert changed and all(everything(model))


@pytest.mark.parametrize("method", METHODS[1:])
def test_all_modules_assigned_to(method):
    with mock.patch.object(nn.Module, method, lambda self, *args: None):
        changed = not untouched.calls_untouched()
    assert changed


def test_hooks_on_all_modules():
    model = built()
    for register, hook in (
        (global_hooks.register_module_forward_hook, lambda m, x, y: None),
        (global_hooks.register_module_forward_pre_hook, lambda m, x: None),
        (global_hooks.register_module_full_backward_hook, lambda m, x, y: None),
        (global_hooks.register_module_full_backward_pre_hook, lambda m, y: None),
    ):
        with register(hook):
            assert not untouched.calls_untouched() and not untouched.decodable(model)
            assert fused_model(model, IDX) is None and not untouched.plain_matmul(model.lm_head)


FUNCTIONS = (
    (F, "gelu"), (F, "layer_norm"), (F, "linear"), (F, "embedding"), (F, "dropout"), (F, "softmax"),
    (F, "cross_entropy"), (F, "scaled_dot_product_attention"), (torch, "layer_norm"),
    (torch, "embedding"), (torch, "dropout"), (torch._C._nn, "cross_entropy_loss"),
)  # fmt: skip
MODES = {
    **{f"{owner.__name__}.{name}": mock.patch.object(owner, name, lambda *args: None)
       for owner, name in FUNCTIONS},
    "TorchFunctionMode": Doubling(),
    "TorchDispatchMode": DoublingBelow(),
    "forward-mode": torch.autograd.forward_ad.dual_level(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_functions_assigned_and_modes_entered(name):
    model = built()
    with MODES[name]:
        assert name in interception().replace("forward-mode differentiation", "forward-mode")
        assert fused_model(model, IDX) is None and not untouched.decodable(model)
        with use_backend("triton"), pytest.raises(RuntimeError, match="cannot run block"):
            fused_model(model, IDX)


def test_transforms():
    seen = []
    torch.func.vmap(lambda x: seen.append(interception()) or x)(torch.ones(2))
    torch.jit.trace(
        lambda x: seen.append(interception()) or x + 1, torch.ones(2), check_trace=False
    )
    assert "torch.func" in seen[0] and "torch.jit.trace" in seen[1]


@pytest.mark.parametrize(
    "name", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"]
)
def test_sdpa_without_one_of_its_backends(name):
    left_out = SDPBackend.__members__[name]
    kept = [b for b in SDPBackend.__members__.values() if b.value >= 0 and b != left_out]
    with sdpa_kernel(kept):
        assert sdpa_is_restricted() and fused_model(built(), IDX) is None
    assert not sdpa_is_restricted()


@pytest.mark.parametrize(
    "assignment",
    ["F.gelu = torch.relu", slow("F.gelu = F.silu"), slow("F.gelu = lambda x: x")],
)
def test_what_was_assigned_before_fastgpt_was_imported(assignment):
    """As at the top of a training script: functions of its own, and others of PyTorch's."""
    code = (
        f"import torch, torch.nn.functional as F; {assignment}; "
        "torch.nn.Linear.forward = lambda self, x: x @ self.weight.T; "
        "from fastgpt.fused import untouched, whole; "
        "from fastgpt.implementations.interception import interception; "
        "print(untouched.calls_untouched(), interception())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("False torch.nn.functional.gelu"), done.stdout + done.stderr


# Of a block: its weights or attributes are not those that the unit computes with.
BLOCKS = {
    "flash": lambda m, b: setattr(b.attn, "flash", False),
    "n_head": lambda m, b: setattr(b.attn, "n_head", 4),
    "n_embd": lambda m, b: setattr(b.attn, "n_embd", 64),
    "gelu": lambda m, b: setattr(b.mlp.gelu, "approximate", "tanh"),
    "attention's dropout": lambda m, b: setattr(b.attn, "dropout", 0.1),
    "mlp's dropout": lambda m, b: setattr(b.mlp.dropout, "p", 0.1),
    "residual dropout": lambda m, b: setattr(b.attn.resid_dropout, "p", 0.1),
    "dropout in place": lambda m, b: setattr(b.mlp.dropout, "inplace", True),
    "rows": lambda m, b: setattr(b.attn.c_attn, "weight", nn.Parameter(torch.ones(2 * C, C))),
    "columns": lambda m, b: setattr(b.mlp.c_proj, "weight", nn.Parameter(torch.ones(C, C))),
    "one bias for all": lambda m, b: setattr(b.mlp.c_fc, "bias", nn.Parameter(torch.ones(1))),
    "norm of one": lambda m, b: setattr(b.ln_1, "weight", nn.Parameter(torch.ones(1))),
    "no weight": lambda m, b: setattr(b.ln_2, "weight", None),
}


@pytest.mark.parametrize("change", BLOCKS)
def test_a_block_of_other_values(change):
    model = built()
    BLOCKS[change](model, model.transformer.h[0])
    assert block_of(model) is None


def test_dropout_that_is_not_in_use():
    model = built(dropout=0.2)
    assert block_of(model, 0.2) is not None and block_of(model) is None
    assert not untouched.decodable(model)
    assert block_of(model.eval()) is not None and untouched.decodable(model)
    for name in ("drop", "h.0.attn", "h.0.attn.resid_dropout", "h.1.mlp.dropout"):
        model = built(dropout=0.2).eval()
        model.transformer.get_submodule(name).training = True
        assert not untouched.decodable(model), name
    model = built().eval()
    model.transformer.h[0].attn.flash = False
    assert not untouched.decodable(model)


LOOKUPS = {
    "padding_idx": lambda wte: setattr(wte, "padding_idx", 3),
    "max_norm": lambda wte: setattr(wte, "max_norm", 1.0),
    "scale_grad_by_freq": lambda wte: setattr(wte, "scale_grad_by_freq", True),
    "sparse": lambda wte: setattr(wte, "sparse", True),
}


@pytest.mark.parametrize("change", LOOKUPS)
def test_a_lookup_with_options(change):
    for name in ("wte", "wpe"):
        model = built()
        LOOKUPS[change](model.transformer[name])
        assert not embeddings_of(model) and not untouched.decodable(model)


ENDS = {
    "untied": lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(29, C))),
    "a bias": lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(29))),
    "one position": lambda m: setattr(m.transformer, "wpe", nn.Embedding(1, C)),
    "narrow positions": lambda m: setattr(m.transformer, "wpe", nn.Embedding(8, 1)),
    "no matrix": lambda m: setattr(m.transformer.wpe, "weight", nn.Parameter(torch.ones(8, 2, C))),
    "doubles": lambda m: m.transformer.wpe.double(),
}


@pytest.mark.parametrize("change", ENDS)
def test_other_ends(change):
    model = built()
    ENDS[change](model)
    assert not embeddings_of(model)


def test_tensors_alike():
    x, same = torch.ones(2), torch.ones(3)
    assert untouched.alike(x, same, None, nn.Parameter(same))
    others = (same.double(), same.to("meta"), same.as_subclass(Subclass))
    assert not any(untouched.alike(x, other) for other in others)
    assert not untouched.alike(others[2], same)
    seen = []
    torch.func.vmap(lambda y: seen.append(untouched.alike(x, y)) or y)(torch.ones(4, 2))
    assert seen == [False]
