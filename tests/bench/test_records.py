"""A slower run is told from a noisy one, and what is shown is what the records say."""

import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bench import curves
from bench.harness import record
from bench.reports import compare, document, markdown, pictures, terminal
from fastgpt.commands.prepare import prepare

ROOT = Path(__file__).parents[2]
SETTINGS = {"size": "124M", "B": 16, "T": 1024, "dtype": "bfloat16", "rounds": 10}
STEP = {"eager": 0.045, "compile": 0.034, "fastgpt": 0.028}  # invented seconds, for these tests


def row(variant, seconds, eager):
    return {
        "variant": variant,
        "seconds": seconds,
        "tokens_per_second": 16384 / seconds[0],
        "over_eager": eager[0] / seconds[0],
        "ms": {"p10": 1.0, "median": 1e3 * seconds[0], "p90": 2.0},
        "peak_bytes": 3 * 2**30,
        "mfu": None,
        "of_matmul_ceiling": 0.5,
        "attention": "cuDNN",
        "first_step_seconds": 2.0,
        "final_loss": 10.5,
    }


def train(date, slower=1.0, machine=1.0, noise=0.01, rounds=10, device="GPU", **settings):
    """A record of invented times; `slower` is fastgpt's, `machine` everybody's."""
    draw = random.Random(date)
    rows, eager = [], []
    weather = [machine * draw.uniform(1, 1.2) for _ in range(rounds)]  # the same for all
    for variant, step in STEP.items():
        step *= slower if variant == "fastgpt" else 1
        seconds = [step * w * draw.gauss(1, noise) for w in weather]
        eager = eager or seconds
        rows.append(row(variant, seconds, eager))
    return {
        "schema": record.SCHEMA,
        "bench": "train",
        "date": f"2026-01-{date:02}T00:00:00+00:00",
        "environment": {"device": device, "torch": "2.0", "triton": "3.0", "python": "3.12"},
        "commit": f"{date:040x}",
        "settings": SETTINGS | settings,
        "rows": rows,
    }


def ops(date, device="GPU"):
    figures = {"microseconds": 1e3, "flops": 0.0, "bytes": 1e9, "teraflops_per_second": 0.0}
    figures["gigabytes_per_second"] = 1e3
    rows = [
        {"op": "layer_norm", "shape": "8x8", "direction": "forward", "variant": variant,
         "seconds": [1e-3, 1.1e-3], "over_eager": 1.0, "of_ceiling": 0.25, **figures}
        for variant in ("eager", "fastgpt")
    ]  # fmt: skip
    rows.append({"op": "layer_norm", "shape": "8x8", "variant": "Liger", "problem": "no Liger"})
    ceilings = {"flops": 7e14, "bandwidth": 4e12, "source": "measured"}
    settings = {"M": 8, "C": 8, "V": 8, "dtype": "bfloat16"}
    return train(date, device=device) | {
        "bench": "ops", "settings": settings, "rows": rows, "ceilings": ceilings
    }  # fmt: skip


def verdict_of(variant, old, new):
    (verdict,) = [v for v in compare.compare(old, new) if v.key[-1] == variant]
    return verdict


def test_a_slower_fastgpt_fails_on_a_machine_that_is_slower_too():
    verdict = verdict_of("fastgpt", train(1), train(2, slower=1.06, machine=1.5))
    assert verdict.failed and "SLOWER" in verdict.text


@pytest.mark.parametrize(
    "new",
    [
        train(2, machine=2.0),  # all are slower
        train(2, slower=1.02),  # within 3 %
        train(2, slower=0.8),
    ],
    ids=["machine", "little", "faster"],
)
def test_what_is_no_regression_passes(new):
    verdicts = compare.compare(train(1), new)
    assert {v.key[-1] for v in verdicts} == {"compile", "fastgpt"}
    assert not any(v.failed for v in verdicts)


def test_noise_alone_seldom_fails():
    """With 10 % of noise the medians of 10 rounds often differ by more than 3 %."""
    runs = [train(date, noise=0.1) for date in range(1, 81)]
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    medians = [[statistics.median(compare.ratios(r)[("fastgpt",)]) for r in p] for p in pairs]
    assert sum(new > 1.03 * old for old, new in medians) > 10
    assert sum(verdict_of("fastgpt", *pair).failed for pair in pairs) <= 6  # of 40, at 5 %


def test_another_variant_is_shown_but_does_not_fail():
    new = train(2)
    new["rows"][1]["seconds"] = [2 * s for s in new["rows"][1]["seconds"]]
    verdict = verdict_of("compile", train(1), new)
    assert not verdict.failed and "slower" in verdict.text


def test_too_few_rounds_say_so():
    verdict = verdict_of("fastgpt", train(1, rounds=2), train(2, rounds=2, slower=1.5))
    assert not verdict.failed and "cannot be told from noise with 2 and 2 rounds" in verdict.text


@pytest.mark.parametrize("variant, failed", [("fastgpt", True), ("compile", False)])
def test_a_row_that_lost_its_time(variant, failed):
    new = train(2)
    (lost,) = [row for row in new["rows"] if row["variant"] == variant]
    lost.clear()
    lost |= {"variant": variant, "problem": "losses differ: not timed"}
    verdict = verdict_of(variant, train(1), new)
    assert verdict.failed == failed and "losses differ" in verdict.text


def test_an_op_is_compared_with_eager_in_its_own_direction():
    old, new = ops(1), ops(2)
    for r in new["rows"]:
        if r["variant"] == "fastgpt":
            r["seconds"] = [2e-3, 2.2e-3]
    (verdict,) = compare.compare(old, new)
    assert verdict.key == ("layer_norm", "8x8", "forward", "fastgpt")
    assert " 1.000x eager ->  0.500x" in verdict.text


def test_chance_of_equal_and_of_different_samples():
    assert compare.chance([1, 2, 3], [4, 5, 6]) == pytest.approx(1 / 20)
    assert compare.chance([4, 5, 6], [1, 2, 3]) == 1.0
    assert compare.chance([1.0] * 30, [1.0] * 30) == 1.0
    many = [i / 100 for i in range(30)]
    assert compare.chance(many, many) == pytest.approx(0.5, abs=0.01)
    assert compare.chance(many, [x + 0.1 for x in many]) < 1e-3


@pytest.mark.parametrize("variant, failed", [("fastgpt", True), ("compile", False)])
def test_a_time_that_is_flagged_now(variant, failed):
    old, new = train(1), train(2)
    (row,) = [row for row in new["rows"] if row["variant"] == variant]
    row["flag"] = "losses are up to 0.3 from those of eager"
    verdict = verdict_of(variant, old, new)
    assert verdict.failed == failed and "losses are up to 0.3" in verdict.text
    assert not verdict_of(variant, new, new | {"date": "later"}).failed  # it is known by now


def save(folder, *records):
    for found in records:
        record.save(found, folder)


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m bench.<module> args...` in this process: its exit status and what it said."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        try:
            code = module.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, "".join(capsys.readouterr())

    return run


def test_the_command_compares_the_last_two_of_the_same_settings(tmp_path, command):
    save(tmp_path, train(1), train(2, B=4, slower=0.1), train(3, slower=1.1))
    code, said = command(compare, "--results", tmp_path, "--device", "gpu")
    assert code == 1 and "1 of fastgpt's rows" in said
    assert "of 2026-01-03" in said and "against 2026-01-01" in said
    first = tmp_path / "gpu/train-20260101T000000.json"
    code, said = command(compare, first, "--results", tmp_path)
    assert code == 0 and "nothing to compare with: the first record" in said
    code, said = command(compare, "--results", tmp_path, "--device", "another")
    assert code == 0 and "no record of another" in said


@pytest.mark.parametrize("module", [compare, document], ids=["compare", "report"])
@pytest.mark.parametrize(
    "content, why",
    [('{"schema": 99}', "has schema 99, this checkout reads"), ("[1]", "not a benchmark record")],
)
def test_what_cannot_be_read_is_named(tmp_path, command, module, content, why):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/train-1.json").write_text(content)
    code, said = command(module, "--results", tmp_path)
    assert code == 2 and why in said and "train-1.json" in said


def test_the_report_shows_the_newest_of_each(tmp_path):
    records = [train(1), train(2, slower=0.5), ops(3), train(4, B=4)]
    text = document.document(records)
    trained, *missing = document.readme(records).split("\n\n")
    first, second = trained.splitlines()[2:]
    assert first.startswith("| 124M, B=16, T=1024, bfloat16 |") and "GPU | 2026-01-02 |" in first
    assert second.startswith("| 124M, B=4, T=1024, bfloat16 |") and "GPU | 2026-01-04 |" in second
    assert missing[0].startswith("Not measured yet, training: 350M, B=16, T=1024, bfloat16; ")
    assert missing[1] == (
        "Not measured yet, decoding: 124M, batch 1, bfloat16; 124M, batch 1, float32."
    )
    assert text.count("2026-01-02") == 1 and "2026-01-01" not in text
    assert "| layer_norm | forward | fastgpt | 1,000.0 | 1.00 | 1,000.0 GB/s | 25.0% |" in text
    assert "| fastgpt | " in text and "- layer_norm, Liger: no Liger" in text
    assert "copy on 2026-01-03" not in text  # these runs measured no matmul ceiling
    records[0]["matmul_ceiling"] = records[1]["matmul_ceiling"] = 7e14
    assert "matmul measured in this run, copy on 2026-01-03" in document.document(records)


def test_the_readme_shows_nanogpt_and_no_ratio_of_a_machine_that_was_not_quiet():
    """Also where it wins: the second run's nanoGPT is the fastest."""
    noisy = train(1) | {"machine": {"busy": 0.0, "spread": 0.5}}
    noisy["rows"].append(row("nanogpt-compile", [0.001], [0.045]))
    (line,) = document.readme([noisy]).split("\n\n")[0].splitlines()[2:]
    assert "(" not in line and "| 16,384,000 |" in line
    quiet = noisy | {"machine": {"busy": 0.0, "spread": 0.01}}
    (line,) = document.readme([quiet]).split("\n\n")[0].splitlines()[2:]
    assert "| 16,384,000 (45.00) |" in line


def test_the_readmes_picture_is_of_a_gpu_if_any_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    records = [train(1, device="CPU (x86_64)"), train(2)]
    records[1]["rows"][1]["flag"] = "doubtful"
    picture = document.headline(records)
    assert picture.title == "Training tokens/s on GPU, 2026-01-02"
    picture.draw(tmp_path / picture.name, records)
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert "CPU" in document.headline(records[:1]).title
    assert document.headline([ops(1)]) is None


def test_tables_on_a_terminal_fit_60_columns():
    """Of every record: nothing is cut, what does not fit goes below."""
    for found in [*record.load_all(), train(1), ops(2)]:
        text = terminal.text(found)
        assert max(map(len, text.splitlines())) <= 60
        assert all(cell in text for line in markdown.cells(found)[1] for cell in line)


def test_the_pictures_say_which_device(tmp_path):
    pytest.importorskip("matplotlib")
    records = [train(1, device="CPU (x86_64)"), ops(2, device="CPU (x86_64)")]
    found = pictures.of_device(records)
    assert [p.name for p in found] == [
        f"performance-cpu-x86-64-{what}.png" for what in ("tokens", "memory", "roofline")
    ]
    for picture in found:
        assert "on CPU" in picture.title
        picture.draw(tmp_path / picture.name, records)
        assert (tmp_path / picture.name).read_bytes().startswith(b"\x89PNG")


def test_loss_curves_are_held_against_another_seeds(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    prepare("to be, or not to be: that is the question. " * 40, tmp_path)
    command = ["--data", tmp_path, "--size", "char", "--device", "cpu", "--dtype", "float32"]
    command += ["--batch-size", 2, "--block-size", 16, "--steps", 30]
    command += ["--variants", "eager", "fastgpt", "hf", "--out", tmp_path / "out"]
    assert curves.main([str(part) for part in command]) == 0
    (path,) = (tmp_path / "out").glob("*/curves-*.json")
    found = record.load(path)
    eager, other, ours, _ = found["rows"]
    assert [len(row["losses"]) for row in (eager, other, ours)] == [30] * 3
    assert eager["losses"][-1] < eager["losses"][0] and eager["gap"] == 0
    assert ours["of_a_seed"] < 0.01 and other["of_a_seed"] == 1
    assert f"{ours['final_loss']:.4f}" in capsys.readouterr().out
    assert f"| fastgpt | {ours['final_loss']:.4f} |" in document.document([found])
    (picture,) = pictures.of_device([found])
    picture.draw(tmp_path / picture.name, [found])
    assert picture.name.endswith("-curves.png") and (tmp_path / picture.name).exists()
    with pytest.raises(SystemExit):
        curves.main(["--data", str(tmp_path), "--size", "124M", "--steps", "0"])
    assert "--steps 0" in capsys.readouterr().err
    (tmp_path / "train.bin").write_bytes(b"\xff\xff" * 50)
    with pytest.raises(SystemExit):
        curves.main(["--data", str(tmp_path)])
    assert "has id 65535" in capsys.readouterr().err


def test_the_command_writes_between_the_markers(tmp_path, command):
    pytest.importorskip("matplotlib")
    save(tmp_path / "results", train(1))
    places = ["--results", tmp_path / "results", "--root", tmp_path]
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    code, said = command(document, *places)
    assert code == 2 and document.BEGIN in said
    readme.write_text(f"above\n{document.BEGIN}\nold\n{document.END}\nbelow\n")
    code, said = command(document, *places)
    assert code == 0, said
    table = document.readme([train(1)])
    assert readme.read_text() == f"above\n{document.BEGIN}\n{table}\n{document.END}\nbelow\n"
    assert (tmp_path / "docs/performance.md").read_text() == document.document([train(1)])
    assert (tmp_path / "docs/performance-gpu-tokens.png").exists()


def test_what_is_committed_shows_what_is_committed():
    """`make bench-report` after a record was added. A record of one's own does not count."""
    folder = record.RESULTS.relative_to(ROOT)
    paths = [path.relative_to(ROOT) for path in sorted(record.RESULTS.glob("*/*.json"))]
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", str(folder)]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        committed = set(listed.stdout.split())
        paths = [path for path in paths if str(path) in committed]
    records = sorted((record.load(ROOT / path) for path in paths), key=lambda r: r["date"])
    text = (ROOT / "README.md").read_text()
    assert document.replace_between(text, document.readme(records)) == text
    assert (ROOT / "docs/performance.md").read_text() == document.document(records)
    for found in document.by_device(records).values():
        for picture in [*pictures.of_device(found), document.headline(records)]:
            assert (ROOT / "docs" / picture.name).exists()


def test_records_are_kept_apart_and_read_in_order(tmp_path):
    first = record.save(train(2), tmp_path)
    second = record.save(train(2), tmp_path)
    save(tmp_path, train(1))
    assert first != second and json.loads(first.read_text()) == json.loads(second.read_text())
    dates = [found["date"] for found in record.load_all(tmp_path)]
    assert dates == sorted(dates) and len(dates) == 3
