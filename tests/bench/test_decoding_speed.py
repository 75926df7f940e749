"""bench.decode: greedy tokens checked before anything is timed, and the bandwidth floor."""

import json
from pathlib import Path

import pytest
import torch

from bench import decode, decode_goals
from bench.harness import ceilings, machine, memory_budget
from bench.peers import models

CPU = torch.device("cpu")
SHORT = ["--size", "char", "--device", "cpu"]
SHORT += ["--prompt", "40", "--new-tokens", "40", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(decode, "read_ceiling", lambda device: 1e10)
    monkeypatch.setattr(decode, "WARM_UP", 0.05)
    monkeypatch.setattr(machine, "check", lambda **_: {"load": 0.0, "busy": 0.0, "spread": 0.0})
    monkeypatch.setattr(models, "LOCAL_NANOGPT", Path("no such folder"))
    monkeypatch.delenv("NANOGPT_DIR", raising=False)


def bench(out, variants: str, *args: str) -> dict:
    command = [*SHORT, "--variants", *variants.split(), *args, "--out", str(out)]
    assert decode.main(command) == 0
    (path,) = out.glob("*/decode-*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_record_and_table(tmp_path, capsys, dtype):
    record = bench(tmp_path, "eager fastgpt", "--dtype", dtype)
    settings = {"size": "char", "prompt": 40, "new_tokens": 40, "dtype": dtype, "rounds": 1}
    assert record["settings"] == settings
    floor = record["floor_seconds"]
    assert (
        floor
        == decode.bytes_per_token(models.config_of("char"), decode.Settings(**settings)) / 1e10
    )
    printed = capsys.readouterr().out
    for row in record["rows"]:
        (seconds,) = row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(1 / seconds)
        assert row["of_floor"] == pytest.approx(floor / seconds)
        assert len(row["first_token_seconds"]) == 1
        assert f"{row['tokens_per_second']:,.1f}" in printed
    assert record["rows"][0]["over_eager"] == 1.0
    assert printed.splitlines()[-1].startswith("record: ")


def test_a_batch(tmp_path):
    """Its tokens are of all texts, its floor of one reading of the weights and every cache."""
    record = bench(tmp_path, "eager fastgpt", "--batch", "3")
    assert record["settings"]["batch"] == 3
    config = models.config_of("char")
    three = decode.bytes_per_token(config, decode.Settings(**record["settings"]))
    one = decode.bytes_per_token(config, decode.Settings(**record["settings"] | {"batch": 1}))
    assert three - one == 2 * 2 * 4 * 128 * 60 * 4 and record["floor_seconds"] == three / 1e10
    for row in record["rows"]:
        assert row["tokens_per_second"] == pytest.approx(3 / row["seconds"][0])
        assert row["over_nanogpt"] is None


def test_goals(tmp_path, monkeypatch):
    """Every figure gets there; and what was not measured is no goal that was met."""

    theirs = []

    def measured(settings, out):
        rate = {"float32": 50.0, "bfloat16": 95.0}[settings.dtype]
        row = {"of_floor": 0.9, "tokens_per_second": rate, "over_nanogpt": 9.0}
        rows = {"fastgpt": row | {"first_token_seconds": [0.02, 0.03, 0.02]}}
        if settings.prompt > 1 or out is not None:
            return rows
        return rows | {"nanogpt": {"first_token_seconds": theirs}}

    monkeypatch.setattr(decode_goals, "_measured", measured)
    for seconds, met in (([0.03, 0.03, 0.04], True), ([0.01, 0.02, 0.01], False)):
        theirs[:] = seconds
        goals = {goal.name: goal for goal in decode_goals.on_cpu(tmp_path, "char", 4, 2)}
        assert goals["1 token from 1, times as fast as nanoGPT"].met == met
    assert goals["fp32, of the read bandwidth"].met and goals["bf16, of the read bandwidth"].met
    assert goals["bf16 over fp32, tokens/s"].measured == pytest.approx(1.9)
    goal = decode_goals.Goal("speed", 0.9, 0.89, ".1%")
    assert not goal.met and decode_goals.line(goal).split()[1:] == ["90.0%", "89.0%", "MISSED"]
    assert decode_goals.line(goal._replace(measured=0.9)).endswith("met")
    unknown = goal._replace(measured=None)
    assert not unknown.met and decode_goals.line(unknown).endswith("NOT MEASURED")


def test_the_read_ceiling(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(2**16, device=device))
    assert 1e8 < ceilings.read_ceiling(CPU, seconds=0.01) < 1e13


def test_against_users_choices(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    checkout = tmp_path / "nanoGPT"
    checkout.mkdir()
    (checkout / "model.py").write_text("from fastgpt.model import GPT, GPTConfig\n")
    monkeypatch.setenv("NANOGPT_DIR", str(checkout))
    rows = bench(tmp_path / "out", "eager nanogpt hf hf-static fastgpt")["rows"]
    assert [row.get("regret", row.get("problem")) for row in rows] == [0.0] * 5
    assert rows[1]["over_nanogpt"] == 1.0


def test_absent_peers_say_so_and_the_rest_runs(tmp_path):
    _, nanogpt, ours = bench(tmp_path, "eager nanogpt fastgpt")["rows"]
    assert nanogpt["problem"].startswith("no nanoGPT: set NANOGPT_DIR to a checkout of it")
    assert "seconds" in ours


def test_too_large_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: 2**20)
    rows = bench(tmp_path, "eager fastgpt")["rows"]
    assert all(row["problem"].endswith(" GiB are missing") for row in rows)


def test_wrong_tokens_get_no_time(tmp_path, monkeypatch):
    """One variant forgets what lies further back, as with a cache that went wrong."""

    def forgetful(run):
        model = models.gpt(run.config, run.weights, run.device).eval()

        def generate(idx, n):
            return torch.cat([idx[:, :-20], model.generate(idx[:, -20:], n, temperature=0)], dim=1)

        return generate

    monkeypatch.setitem(decode.VARIANTS, "hf", forgetful)
    eager, wrong = bench(tmp_path, "eager hf")["rows"]
    assert "not the greedy ones" in wrong["problem"] and "seconds" not in wrong
    assert "seconds" in eager


def test_the_floor_counts_what_is_read():
    """Every weight but the positions', and 2 L C values of the cache for each token before."""
    config = models.config_of("124M")
    with models.quietly(), torch.device("meta"):
        model = models.GPT(config)
    weights = sum(p.numel() for p in model.parameters()) - 1024 * 768
    settings = decode.Settings("124M", 224, 32, "bfloat16", 1)
    cached = 2 * 12 * 768 * (224 + 16)
    assert decode.bytes_per_token(config, settings) == 2 * (weights + cached)


@pytest.mark.parametrize(
    "args, words",
    [
        ("--new-tokens 89", "add up to more than 128, the block size of char"),
        ("--new-tokens 1", "--new-tokens at least 2"),
        ("--batch 0", "--batch must be at least 1"),
        ("--variants eager magic", "fastgpt"),
        ("--variants fastgpt", "ratios need eager first"),
        ("--dtype int8", "bfloat16"),
    ],
)
def test_bad_input(capsys, args, words):
    with pytest.raises(SystemExit, match="2"):
        decode.main([*SHORT, *args.split()])
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOGPT_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        decode.main(SHORT)
    assert f"NANOGPT_DIR={tmp_path} is not a checkout" in capsys.readouterr().err
