"""Which implementation runs and why, and that the kernels compute what PyTorch computes."""

import inspect
import os
import subprocess
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig, backend, ops, reference, use_backend
from fastgpt.fused.whole import fused_model
from fastgpt.kernels import _launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = [name for name in vars(reference) if inspect.isfunction(getattr(ops, name, None))]


def implementation(op: str = "layer_norm") -> str:
    """What would run `op`, by the dispatcher's own account."""
    return fastgpt.backend_report()[op].implementation


def test_every_op_has_a_definition():
    assert OPS == [
        "layer_norm",
        "add_layer_norm",
        "linear_gelu",
        "mlp",
        "causal_attention",
        "packed_causal_attention",
        "cross_entropy",
        "linear_cross_entropy",
    ]


def test_modes_are_scoped_and_nest():
    auto = implementation()
    with use_backend("torch"):
        with use_backend("triton"):
            assert implementation() == "triton"
        assert implementation() == "torch"
    assert implementation() == auto


def test_a_call_sets_the_mode_for_good():
    use_backend("triton")
    assert implementation() == "triton"
    use_backend("torch")
    assert implementation() == "torch"


def test_a_scope_used_twice_sets_the_mode_twice():
    scope = use_backend("torch")
    for _ in range(2):
        with scope:
            assert backend._mode == "torch"
        assert backend._mode == "auto"


def test_a_scope_restores_what_was_chosen_after_it_was_made():
    scope = use_backend("torch")
    use_backend("auto", packed_causal_attention="torch")
    with scope:
        assert backend._mode == "torch"
    assert (backend._mode, backend._overrides) == ("auto", {"packed_causal_attention": "torch"})


def test_an_exception_restores_the_mode():
    use_backend("triton")
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert implementation() == "triton"


@pytest.mark.parametrize("wrong", [{"mode": "cuda"}, {"mlp": "flash-attn"}, {"conv": "triton"}])
def test_a_refused_mode_changes_nothing(wrong):
    use_backend("triton")
    with pytest.raises(ValueError):
        use_backend(**wrong)
    assert implementation() == "triton"


def test_an_override_takes_another_kernel_for_its_op_only():
    x, w = torch.randn(3, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    with use_backend("triton", linear_gelu="triton"):
        assert implementation("linear_gelu") == "triton"
        assert implementation("mlp") == "cublas"
        y = ops.linear_gelu(x, w)
    torch.testing.assert_close(y, reference.linear_gelu(x, w))
    with pytest.raises(ValueError, match="contradicts"):
        use_backend("torch", linear_gelu="triton")  # never a kernel


def test_the_report_covers_every_op():
    assert sorted(fastgpt.backend_report()) == sorted(backend.OPS)
    for mode in backend.MODES:
        with use_backend(mode):
            report = fastgpt.backend_report()
        for op, (name, reason) in report.items():
            assert name in (*backend.OPS[op].implementations, "torch") and len(reason) > 10, op
            assert (name == "torch") if mode == "torch" else True


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: the variables are read when fastgpt and triton are imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=root, env={**env, **environment}, capture_output=True, text=True
    )


def test_the_environment_sets_the_mode():
    code = "import fastgpt; print(fastgpt.backend_report()['mlp'].reason)"
    assert "set to torch" in run_python(code, FASTGPT_BACKEND="torch").stdout


def test_triton_on_a_cpu_without_the_interpreter_raises_the_reason():
    layer_norm = "fastgpt.ops.layer_norm(torch.ones(2, 16), torch.ones(16))"
    prelude = f"import torch, fastgpt; {layer_norm}; print('auto works');"
    run = run_python(f"{prelude} fastgpt.use_backend('triton'); {layer_norm}")
    assert run.stdout == "auto works\n"
    assert "RuntimeError: backend 'triton' cannot run layer_norm: tensors are on cpu" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter computes bfloat16 wrongly")
def test_bfloat16_is_refused_in_the_interpreter():
    x, w = torch.ones(2, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    with use_backend("triton"), pytest.raises(RuntimeError, match="bfloat16 wrongly; use float32"):
        ops.layer_norm(x, w)


@pytest.fixture
def on_old_gpu(monkeypatch):
    """A tensor that says it is on a GPU, and a dispatcher that has not warned of anything yet."""
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "_tensor_problem", lambda tensors: None)
    properties = SimpleNamespace(name="Some old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), numel=lambda: 1)


def too_old(op: str, implementation: str, tensors: Any, facts: Any) -> str:
    return "compute capability 7.0 is below 8.0"


def the_one_warning(t: torch.Tensor) -> str:
    """Of choosing every op twice for `t`, each time PyTorch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in 2 * list(backend.OPS):
            assert backend.choose(op, t) is reference
    (warning,) = caught
    return str(warning.message)


def test_an_old_gpu_is_one_warning_then_pytorch(on_old_gpu, monkeypatch):
    monkeypatch.setattr(backend, "why_not", too_old)
    assert "capability 7.0" in the_one_warning(on_old_gpu)


def test_a_missing_triton_is_one_warning_then_pytorch(on_old_gpu, monkeypatch):
    def no_triton(path):
        return ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(backend, "_loaded", {})
    monkeypatch.setattr(backend, "_imported", no_triton)
    assert "No module named 'triton'" in the_one_warning(on_old_gpu)


def test_asking_for_triton_on_an_old_gpu_raises_the_reason(on_old_gpu, monkeypatch):
    monkeypatch.setattr(backend, "why_not", too_old)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"run mlp: .*capability 7\.0"):
        backend.choose("mlp", on_old_gpu)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def ids(*shape: int) -> Tensor:
    return torch.randint(16, shape, device=DEVICE)


def heads() -> Tensor:
    return leaf(1, 2, 5, 16)


CALLS = {
    "layer_norm": lambda: ops.layer_norm(leaf(3, 16), leaf(16), leaf(16)),
    "add_layer_norm": lambda: ops.add_layer_norm(leaf(3, 16), leaf(3, 16), leaf(16))[0],
    "linear_gelu": lambda: ops.linear_gelu(leaf(3, 16), leaf(32, 16), leaf(32)),
    "mlp": lambda: ops.mlp(leaf(3, 16), leaf(32, 16), None, leaf(16, 32), None),
    "causal_attention": lambda: ops.causal_attention(heads(), heads(), heads()),
    "packed_causal_attention": lambda: ops.packed_causal_attention(leaf(1, 5, 96), 2),
    "cross_entropy": lambda: ops.cross_entropy(leaf(3, 16), ids(3)),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(leaf(3, 8), leaf(16, 8), ids(3)),
}


@pytest.mark.parametrize("op", CALLS)
def test_torch_never_launches_a_kernel(op):
    started = {}
    for mode in ("torch", "triton"):
        with use_backend(mode), _launch.record() as launches:  # notes kernels, starts none
            out = CALLS[op]()
            forward = len(launches)
            out.sum().backward()
        started[mode] = (forward, len(launches) - forward)
    assert started["torch"] == (0, 0)
    assert all(started["triton"][: 1 if op == "linear_cross_entropy" else 2])  # all at the forward


@pytest.mark.skipif(DEVICE == "cuda", reason="auto launches kernels on a GPU")
@pytest.mark.parametrize("op", CALLS)
def test_auto_on_a_cpu_is_pytorch(op):
    with _launch.record() as launches:
        CALLS[op]().sum().backward()
    assert launches == []


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_starts_on_the_device_of_its_first_tensor(monkeypatch, index):
    entered, started = [], []

    @contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.append(None)

    class On(Tensor):
        def get_device(self):
            return index

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: started.append((entered[-1:], grid, args))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x, y = torch.ones(2).as_subclass(On), torch.ones(3)
    _launch.launch(Kernel(), 7, x, y, BLOCK=8)
    ((where, grid, args),) = started
    assert args[0] is x and grid == (7,)
    assert where == ([index] if index else [])  # the current device is entered by nobody


@pytest.mark.parametrize("op", CALLS)
def test_every_kernel_starts_that_way(op, monkeypatch):
    torch.manual_seed(0)
    start, started = _launch._start, []

    def noted(index, kernel, grid, args, options):
        started.append(args[0])
        start(index, kernel, grid, args, options)

    monkeypatch.setattr(_launch, "_start", noted)
    with use_backend("triton"):
        CALLS[op]().sum().backward()
        with _launch.record() as launches:
            CALLS[op]().sum().backward()
    assert len(started) == len(launches) > 0 and all(isinstance(t, Tensor) for t in started)


def small_gpt(**changes) -> GPT:
    sizes: dict[str, Any] = {"block_size": 17, "vocab_size": 41, "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig(**{**sizes, "n_embd": 32, **changes}))
    with torch.no_grad():
        for p in model.parameters():  # wide enough to tell the two GELUs apart
            p.add_(0.2 * torch.randn_like(p))
    return model.to(DEVICE)


def run_model(model: GPT, mode: str, **implementations: str) -> dict[str, Any]:
    """Logits, loss and every gradient."""
    rows = torch.randint(41, (2, 18), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = rows[:, 1:].clone()
    targets[0, :5] = -1
    model.zero_grad(set_to_none=True)  # the gradients of the call before stay as they are
    with use_backend(mode, **implementations):
        logits, loss = model(rows[:, :-1], targets)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {"loss": loss} | ({} if logits is None else {"logits": logits})


MODELS: dict[str, tuple[dict, dict]] = {
    "bias": ({}, {}),
    "no bias": ({"bias": False}, {}),
    "tanh": ({"gelu": "tanh"}, {}),
    "no logits": ({"return_logits": False}, {}),
    "fused GEMM": ({}, {"mlp": "triton"}),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_model_computes_the_same_on_kernels(case):
    config, implementations = MODELS[case]
    model = small_gpt(**config)
    expected = run_model(model, "torch")
    ours = run_model(model, "triton", **implementations)
    # fp32 both ways, but sums are split differently: what cancels keeps a rounding of its terms
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("mode", backend.MODES)
def test_a_batch_of_nothing(mode, B, T):
    model, none = small_gpt(), ids(B, T)
    with use_backend(mode):
        logits, loss = model(none, none)
        loss.backward()
    assert logits.shape == (B, T, 41) and loss.isnan()
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())


def test_sampling_under_autocast_leaves_weights_to_pytorch(monkeypatch):
    """Which casts each of them once for all tokens; in training that is once per step anyway."""
    x, w = torch.randn(4, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE)
    casts = []
    monkeypatch.setattr(ops, "_autocast", lambda *tensors: casts.append(tensors) or tensors)

    def both() -> list[Tensor]:
        return [ops.linear_gelu(x, w), ops.mlp(x, w, None, w.t(), None)]

    with use_backend("auto"), torch.autocast(DEVICE, torch.bfloat16):
        with torch.no_grad():
            assert all(y.dtype == torch.bfloat16 for y in both()) and not casts
        both()
        assert [len(tensors) for tensors in casts] == [3, 5]


@pytest.mark.skipif(DEVICE == "cuda", reason="what a CPU's table chooses")
@pytest.mark.parametrize("op", ["layer_norm", "mlp", "linear_cross_entropy"])
def test_an_op_that_is_given_to_pytorch_is_left_to_it_in_a_fused_gpt_too(op):
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=32))
    idx = torch.zeros(1, 8, dtype=torch.int64)
    assert fused_model(model, idx) is not None
    with use_backend("auto", **{op: "torch"}):
        assert fused_model(model, idx) is None


def test_the_start_value_triton_loads_what_torch_compile_cannot_import():
    code = "import fastgpt; from fastgpt import backend; print(len(backend._loaded))"
    assert int(run_python(code, FASTGPT_BACKEND="triton", TRITON_INTERPRET="1").stdout) > 5


@pytest.mark.parametrize("measured", ["hybrid", "cudnn", "flash", "torch"])
def test_mode_triton_is_our_kernels_whatever_was_measured(measured, monkeypatch):
    """The fused MLP's "cublas" is ours: PyTorch's GEMM under our kernels."""
    fastest = {"packed_causal_attention": measured, "mlp": "cublas"}
    monkeypatch.setattr(backend, "_measured_on", lambda device, op: (fastest[op], "measured"))
    on_a_gpu = types.SimpleNamespace(is_cuda=True, device="cuda:0")

    def wanted(mode, op):
        with use_backend(mode):
            return backend._wanted(op, on_a_gpu)[0]

    assert wanted("auto", "packed_causal_attention") == measured
    assert wanted("triton", "packed_causal_attention") == "triton"
    assert wanted("auto", "mlp") == wanted("triton", "mlp") == "cublas"
