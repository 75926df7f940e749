"""`fastgpt tune` on toy sizes, and that what it wrote is what runs."""

import functools

import pytest
import torch

from fastgpt import backend, ops, use_backend
from fastgpt.commands import tune
from fastgpt.kernels import _launch, _tuned, layer_norm
from tests.close import DEVICE

SMALL = tune.Sizes(M=32, C=32, D=16, V=40, dtype=torch.float32)


def test_every_search_finds_its_kernels_configuration():
    """A key nobody asks for would be a search without an effect."""
    for one in tune.searches(torch.device(DEVICE), SMALL):
        with _launch.record() as before:
            one.call()
        changed = False
        for candidate in one.candidates[:4]:
            with _tuned.trying(one.key, candidate), _launch.record() as after:
                one.call()
            changed |= [launch.options for launch in after] != [launch.options for launch in before]
        assert changed, one.key


def test_search_refuses_a_wrong_result_and_one_that_cannot_run(monkeypatch):
    x, w = torch.randn(4, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    call = functools.partial(layer_norm.forward, x, w, None, 1e-5, torch.float32)
    good = dict(BLOCK_M=2, BLOCK_N=32, num_warps=4)
    candidates = [good, good | dict(BLOCK_N=16), dict(BLOCK_N=32)]
    one = tune.Search("layer_norm_forward 32", call, candidates)
    monkeypatch.setattr(tune, "searches", lambda *_: [one])
    found = tune.search(torch.device(DEVICE), SMALL, 3.0)
    rows = {row["variant"]: row for row in found}
    assert rows[str(good)]["over_default"] > 0
    assert "away from" in rows[str(candidates[1])]["problem"]  # half a row is another norm
    assert "problem" in rows[str(candidates[2])]


def test_implementations_race_and_the_fastest_is_chosen():
    rows = tune.implementations(torch.device(DEVICE), SMALL, 0.1)
    assert {row["op"] for row in rows} == set(backend.OPS) - {"block", "adamw"}
    entry = tune.choose(rows, [])
    for op, winner in entry["implementations"].items():
        timed = {
            r["variant"]: r["microseconds"] for r in rows if r["op"] == op and "problem" not in r
        }
        assert timed[winner] == min(timed.values())


def test_only_what_is_faster_than_noise_is_chosen():
    row = {"kernel": "gemm_gelu bfloat16", "config": {"BLOCK_M": 1}}
    assert tune.choose([], [row | {"over_default": 1.01}])["configs"] == {}
    won = [row | {"over_default": 1.2}, row | {"over_default": 1.1, "config": {}}]
    assert tune.choose([], won)["configs"] == {"gemm_gelu bfloat16": {"BLOCK_M": 1}}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _tuned.entry.cache_clear()
    yield _tuned.path("NVIDIA H200")
    _tuned.entry.cache_clear()


def test_what_was_measured_decides(cache):
    assert backend.measured("mlp", "NVIDIA H200") is None
    cache.parent.mkdir(parents=True)
    won = {"mlp": "triton", "layer_norm": "an implementation of another release"}
    tune._write(cache, {"date": "2026-01-02", "implementations": won, "configs": {}})
    chosen, why = backend.measured("mlp", "NVIDIA H200")
    assert chosen == "triton" and "2026-01-02" in why
    assert backend.measured("layer_norm", "NVIDIA H200") is None
    assert backend.measured("add_layer_norm", "NVIDIA H200") is None


def test_a_broken_file_is_ignored_with_a_warning(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    with pytest.warns(UserWarning, match="run fastgpt tune again"):
        assert _tuned.entry("NVIDIA H200") == {}


def test_a_configuration_under_trial_is_launched():
    x, w = torch.randn(4, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    config = dict(BLOCK_M=1, BLOCK_N=64, num_warps=2)
    trying = _tuned.trying("layer_norm_forward 32", config)
    with use_backend("triton"), trying, _launch.record() as launches:
        ops.layer_norm(x, w)
    assert launches[0].options == config
