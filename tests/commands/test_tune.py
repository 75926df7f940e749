"""`fastgpt tune` on toy sizes, and that what it wrote is what runs."""

import argparse
import functools
import types

import pytest
import torch

from fastgpt import backend, ops, use_backend
from fastgpt.commands import implementation_race, launch_search, tune
from fastgpt.kernels import _launch, _tuned, layer_norm
from tests.close import DEVICE

SMALL = launch_search.Sizes(M=32, C=32, D=16, V=40, dtype=torch.float32)


def test_every_search_finds_its_kernels_configuration():
    """A key nobody asks for would be a search without an effect."""
    for one in launch_search.searches(torch.device(DEVICE), SMALL):
        with _launch.record() as before:
            one.call()
        changed = False
        for candidate in one.candidates[:4]:
            with _tuned.trying(one.key, candidate), _launch.record() as after:
                one.call()
            changed |= [launch.options for launch in after] != [launch.options for launch in before]
            old, new = ({one.kernel: set(one.options) for one in some} for some in (before, after))
            assert all(old[kernel] == new[kernel] for kernel in old.keys() & new.keys()), (
                "a measurement with other settings is ignored"
            )
        assert changed, one.key


def test_a_result_is_not_written_over_by_the_next():
    """A search holds a candidate's result against one from before it."""
    for one in launch_search.searches(torch.device(DEVICE), SMALL):
        first, second = ((one.result or one.call)() for _ in range(2))
        pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
        assert not [a for a, b in pairs if a.numel() and a.data_ptr() == b.data_ptr()], one.key


def test_search_refuses_a_wrong_result_and_one_that_cannot_run(monkeypatch):
    x, w = torch.randn(4, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    call = functools.partial(layer_norm.forward, x, w, None, 1e-5, torch.float32)
    good = dict(BLOCK_M=2, BLOCK_N=32, num_warps=4)
    candidates = [good, good | dict(BLOCK_N=16), dict(BLOCK_N=32)]
    one = launch_search.Search("layer_norm_forward 32", call, candidates)
    monkeypatch.setattr(launch_search, "searches", lambda *_: [one])
    found = launch_search.search(torch.device(DEVICE), SMALL, 3.0)
    rows = {row["variant"]: row for row in found}
    assert rows[str(good)]["over_today"] > 0
    assert "away from" in rows[str(candidates[1])]["problem"]  # half a row is another norm
    assert "problem" in rows[str(candidates[2])]


def test_a_search_in_place_is_held_against_fresh_results(monkeypatch):
    """The kernel overwrites its logits: a second call on them gives other losses."""
    (one,) = (
        s
        for s in launch_search.searches(torch.device(DEVICE), SMALL)
        if s.key == "cross_entropy_ 40"
    )
    good = dict(BLOCK=64, num_warps=2)
    part = one._replace(candidates=[good, good | dict(BLOCK=32)])
    monkeypatch.setattr(launch_search, "searches", lambda *_: [part])
    assert not [r for r in launch_search.search(torch.device(DEVICE), SMALL, 3.0) if "problem" in r]


def test_every_op_is_raced_and_the_block_as_a_whole():
    rows = implementation_race.race(torch.device(DEVICE), SMALL, 0.1)
    assert {row["op"] for row in rows} == set(backend.OPS) - {"adamw", "decode"}
    timed = {(row["op"], row["variant"]) for row in rows if "microseconds" in row}
    assert {("block", "torch"), ("block", "triton" if DEVICE == "cuda" else "aten")} <= timed
    assert set(tune.choose(rows, [])["implementations"]) == {op for op, _ in timed}


def race(monkeypatch, **times: dict[str, float]) -> dict[str, str]:
    """What is chosen where `in_turns` gives these microseconds, and 100 for what is not named."""

    def in_turns(variants, device, seconds):
        return {name: [1e-6 * times.get(raced[-1], {}).get(name, 100.0)] * 3 for name in variants}

    def race_of(op, run, why_not, expected, device, seconds):
        raced.append(op)
        return original(op, lambda name: expected, lambda name: None, expected, device, seconds)

    raced = []
    original = implementation_race._race
    monkeypatch.setattr(implementation_race, "_race", race_of)
    monkeypatch.setattr(implementation_race, "in_turns", in_turns)
    rows = implementation_race.race(torch.device(DEVICE), SMALL, 0.1)
    return tune.choose(rows, [])["implementations"]


def test_a_tie_and_a_hair_leave_the_conservative_choice(monkeypatch):
    hair = dict.fromkeys(("torch", "flash-attn", "aten"), 99.0)
    chosen = race(monkeypatch, **dict.fromkeys(backend.OPS, hair))
    assert chosen == {op: backend.OPS[op].unmeasured for op in chosen} and "mlp" in chosen


def test_what_wins_by_the_margin_is_chosen(monkeypatch):
    chosen = race(
        monkeypatch,
        layer_norm={"torch": 90.0},
        mlp={"triton": 90.0},
        causal_attention={"flash": 80.0, "cudnn": 81.0},
        block={"torch": 101.0},
    )
    assert chosen["layer_norm"] == "torch" and chosen["mlp"] == "triton"
    assert chosen["causal_attention"] == "flash" and chosen["block"] == "triton"


ALONE = {  # faster alone, and nothing that a fused block can be made of
    "mlp": {"torch": 50.0, "triton": 90.0},
    "add_layer_norm": {"torch": 50.0},
    "packed_causal_attention": {"flash-attn": 50.0, "cudnn": 90.0},
}


@pytest.mark.parametrize("modules", [100.0, 99.0, 200.0])
def test_parts_that_are_faster_alone_leave_the_block_fused(monkeypatch, modules):
    chosen = race(monkeypatch, **ALONE, block={"torch": modules})
    assert chosen["block"] == "triton"
    assert [chosen[op] for op in ALONE] == ["triton", "triton", "cudnn"]


def test_a_block_that_loses_as_a_whole_gives_its_parts_back(monkeypatch):
    chosen = race(monkeypatch, **ALONE, block={"torch": 90.0})
    assert chosen["block"] == "torch"
    assert [chosen[op] for op in ALONE] == ["torch", "torch", "flash-attn"]


def test_without_a_race_of_the_block_its_parts_stay_fusable():
    rows = [{"op": "mlp", "variant": "torch", "microseconds": 1.0}]
    assert tune.choose(rows, [])["implementations"] == {}
    rows.append({"op": "mlp", "variant": "cublas", "microseconds": 5.0})
    assert tune.choose(rows, [])["implementations"] == {"mlp": "cublas"}


def test_only_what_is_faster_than_noise_is_chosen():
    row = {"kernel": "gemm_gelu bfloat16", "config": {"BLOCK_M": 1}}
    assert tune.choose([], [row | {"over_today": 1.01}])["configs"] == {}
    won = [row | {"over_today": 1.2}, row | {"over_today": 1.1, "config": {}}]
    assert tune.choose([], won)["configs"] == {"gemm_gelu bfloat16": {"BLOCK_M": 1}}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _tuned.forget()
    yield _tuned.path("NVIDIA H200")
    _tuned.forget()


def test_what_was_measured_decides(cache):
    assert backend.measured("mlp", "NVIDIA H200") is None
    cache.parent.mkdir(parents=True)
    won = {"mlp": "triton", "layer_norm": "an implementation of another release"}
    tune._write(cache, {"date": "2026-01-02", "implementations": won, "configs": {}})
    chosen, why = backend.measured("mlp", "NVIDIA H200")
    assert chosen == "triton" and "2026-01-02" in why
    assert backend.measured("layer_norm", "NVIDIA H200") is None
    assert backend.measured("add_layer_norm", "NVIDIA H200") is None


def test_of_what_the_user_did_not_measure_ours_is_left(cache, monkeypatch):
    shipped = {"date": "then", "implementations": {"mlp": "cublas"}, "configs": {"a 1": 1}}
    monkeypatch.setitem(_tuned.SHIPPED, "NVIDIA H200", shipped)
    cache.parent.mkdir(parents=True)
    tune._write(cache, {"date": "now", "implementations": {}, "configs": {"b 1": 2}})
    merged = {"date": "now", "implementations": {"mlp": "cublas"}, "configs": {"a 1": 1, "b 1": 2}}
    assert _tuned.entry("NVIDIA H200") == merged


def test_a_second_run_keeps_what_the_first_has_found(cache, monkeypatch, capsys):
    """It measures candidates against the first one's winners, which nothing beats then."""
    rows = [{"kernel": "a 1", "variant": "{}", "config": {"A": 1}, "microseconds": 1.0}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(implementation_race, "race", lambda *args: [])
    for times in (1.2, 1.0):
        found = [row | {"over_today": times} for row in rows]
        monkeypatch.setattr(launch_search, "search", lambda *args, found=found: found)
        parser = argparse.ArgumentParser()
        tune.add_arguments(parser)
        assert tune.main(parser.parse_args([])) == 0
        assert _tuned.entry("NVIDIA H200")["configs"]["a 1"] == {"A": 1}


BROKEN = ["{", "[]", "{}", '{"date": 1, "implementations": {}, "configs": {}}']


@pytest.mark.parametrize("content", [*BROKEN, '{"date": "", "implementations": {}, "configs": []}'])
def test_a_broken_file_is_ignored_with_a_warning(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.warns(UserWarning, match="run fastgpt tune again"):
        assert _tuned.entry("NVIDIA H200") == _tuned.SHIPPED.get("NVIDIA H200", {})


def test_what_was_measured_of_another_version_is_ignored(monkeypatch):
    configs = {"kernel 8": {"BLOCK": 1, "num_warps": 2}, "pair": [{"A": 1}, {"B": 2}]}
    monkeypatch.setattr(_tuned, "_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(_tuned, "entry", lambda name: {"configs": configs})
    t = types.SimpleNamespace(is_cuda=True, device="cuda:0")
    guess = {"BLOCK": 4, "num_warps": 4}
    assert _tuned.configured(t, "kernel", lambda n: guess, 8)["BLOCK"] == 1
    assert _tuned.configured(t, "kernel", lambda n: guess | {"STAGES": 1}, 8)["BLOCK"] == 4
    assert _tuned.configured(t, "pair", lambda: ({"A": 3}, {"B": 3})) == [{"A": 1}, {"B": 2}]
    assert _tuned.configured(t, "pair", lambda: ({"A": 3}, {"C": 3})) == ({"A": 3}, {"C": 3})


def test_a_configuration_under_trial_is_launched():
    x, w = torch.randn(4, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    config = dict(BLOCK_M=1, BLOCK_N=64, num_warps=2)
    trying = _tuned.trying("layer_norm_forward 32", config)
    with use_backend("triton"), trying, _launch.record() as launches:
        ops.layer_norm(x, w)
    assert launches[0].options == config


def test_only_some_kernels_leave_what_is_known_of_the_others():
    device = torch.device(DEVICE)
    rows = launch_search.search(device, SMALL, 0.0, ["layer_norm_forward"])
    assert rows == []  # no time for a candidate
    with pytest.raises(ValueError, match=r"layer_norn: unknown kernel; .*layer_norm_forward"):
        launch_search.search(device, SMALL, 1.0, ["layer_norn"])
    kept = {"date": "then", "implementations": {"mlp": "cublas"}, "configs": {"a 1": 1, "b 1": 1}}
    new = {"date": "now", "implementations": {}, "configs": {"b 1": 2}}
    assert _tuned.joined(kept, new) == {
        "date": "now", "implementations": {"mlp": "cublas"}, "configs": {"a 1": 1, "b 1": 2},
    }  # fmt: skip
    assert _tuned.joined({}, new) == new
