"""`fastgpt init-report`: its statistics catch a wrong draw, every scheme's right ones pass."""

import math
import sys

import pytest
import torch

from fastgpt import GPT, GPTConfig, cli, init
from fastgpt.commands import init_audit, init_report

N = 100_000
SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)
TINY = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
QUICK = ["--depths", "1", "3", "--steps", "2"]


def exceeded(x: torch.Tensor, std: float = 0.02) -> list[bool]:
    """Which of the limits for one tensor x breaks: of its mean, its deviation, its shape."""
    bounds = init_audit.limits(1)
    far = init_audit.deviations(x, std)
    return [abs(d) > bound for d, bound in zip(far, bounds, strict=True)]


def normal(mean: float = 0.0, std: float = 0.02) -> torch.Tensor:
    return mean + std * torch.randn(N)


class TestStatistics:
    def test_a_right_draw_passes(self):
        assert exceeded(normal()) == [False, False, False]

    @pytest.mark.parametrize("factor", [0.97, 1.03])
    def test_a_deviation_off_by_3_percent(self, factor):
        assert exceeded(normal(std=factor * 0.02))[1]

    @pytest.mark.parametrize("mean", [-0.0005, 0.0005])
    def test_a_mean_off_by_a_fortieth_of_the_deviation(self, mean):
        assert exceeded(normal(mean))[0]

    @pytest.mark.parametrize("kind", ["uniform", "truncated", "two values"])
    def test_another_shape_of_the_right_mean_and_deviation(self, kind):
        draw = {
            "uniform": lambda: torch.rand(N) - 0.5,
            "truncated": lambda: torch.nn.init.trunc_normal_(torch.empty(N), a=-2, b=2),
            "two values": lambda: torch.randint(2, (N,)).float(),
        }[kind]()
        x = (draw - draw.mean()) / draw.std() * 0.02
        assert exceeded(x) == [False, False, True]

    def test_nan_passes_nothing(self):
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=16))
        with torch.no_grad():
            model.transformer.wpe.weight[0, 0] = math.nan
        assert [row.name for row in init_audit.audit(model) if not row.ok] == [
            "transformer.wpe.weight"
        ]

    def test_false_alarms_are_as_rare_as_stated(self, monkeypatch):
        """At 90 % one verdict in ten may be wrong, fewer since the bound on D is not tight."""
        monkeypatch.setattr(init_audit, "CONFIDENCE", 0.9)
        alarms = sum(any(exceeded(0.02 * torch.randn(4096))) for _ in range(500))
        assert 15 <= alarms <= 70  # expected up to 50, give or take 7

    def test_more_tensors_move_the_limits_out(self):
        assert all(a < b for a, b in zip(init_audit.limits(1), init_audit.limits(50), strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("linear, residual", init_report.SCHEMES)
def test_every_parameter_of_every_scheme(linear, residual, bias):
    sizes = dict(n_layer=4, n_head=2, n_embd=64, block_size=64, vocab_size=96, bias=bias)
    model = GPT(GPTConfig(**sizes, linear_init=linear, residual_init=residual))
    rows = init_audit.audit(model)
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    assert sum(row.specified[1] > 0 for row in rows) == 2 + 4 * 4  # embeddings, linears
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize(
    "name, change",
    [
        ("transformer.wte.weight", lambda p: p.mul_(1.2)),
        ("transformer.h.1.mlp.c_proj.weight", lambda p: p.mul_(math.sqrt(2))),
        ("transformer.h.0.attn.c_attn.weight", lambda p: p.uniform_(-0.0346, 0.0346)),
        ("transformer.h.0.attn.c_attn.bias", lambda p: p[3].fill_(1e-6)),
        ("transformer.ln_f.weight", lambda p: p[0].fill_(0.999)),
    ],
)
def test_one_wrong_parameter_is_found(name, change):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=96))
    with torch.no_grad():
        change(model.get_parameter(name))
    assert [row.name for row in init_audit.audit(model) if not row.ok] == [name]


def test_a_scan_has_a_number_per_block_and_sees_the_scheme():
    sizes = GPTConfig(n_head=2, n_embd=64, block_size=16, vocab_size=32, n_layer=6)
    small, large = (
        init_report.depth_scan(init_report._with_scheme(sizes, ("0.02", residual)), seed=1)
        for residual in ("0.02*0.02", "0.02")
    )
    assert [len(part) for part in (*small, *large)] == [6, 6, 6, 6]
    assert small.stream[-1] < 1.05 * small.stream[0] < large.stream[-1]
    assert all(gradient > 0 for gradient in small.gradient + large.gradient)


class TestShortRuns:
    IDS = torch.arange(4).repeat(64)  # the next one is always known, their frequencies say ln 4
    SIZES = GPTConfig(block_size=16, vocab_size=4, n_layer=2, n_head=2, n_embd=32)

    def test_what_can_be_learned_is(self):
        letters = init_report.entropy(self.IDS)
        assert letters == pytest.approx(math.log(4))
        losses = init_report.short_run(GPT(self.SIZES), self.IDS, 60, seed=1)
        assert len(losses) == 60 and losses[0] > 0.9 * letters and losses[-1] < 0.5 * letters

    def test_the_control_is_what_pytorch_draws(self):
        model = init_report._undrawn(self.SIZES, seed=1)
        wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
        assert model.lm_head.weight is wte and 0.1 < wte.abs().max() <= 32**-0.5
        assert wpe.detach().std() == pytest.approx(1, rel=0.1)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _shallow_runs(self, monkeypatch):
        shallow = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)
        monkeypatch.setattr(init_report, "RUN", shallow)

    def test_a_line_per_parameter_and_per_scheme(self, capsys):
        assert cli.main(["init-report", *TINY, *QUICK, "--no-plots"]) == 0
        out = capsys.readouterr().out
        model = GPT(GPTConfig(**SIZES))
        for name, _ in model.named_parameters():
            assert out.count(f"\n| {name} ") == 1
        for linear, residual in init_report.SCHEMES:  # stream, gradient, loss
            lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
            assert sum(line[1:3] == [linear, residual] for line in lines) == 3
        assert "28 of 28 parameters are as specified" in out
        assert "1 layers" in out and "3 layers" in out

    def test_pictures_and_document(self, tmp_path, capsys):
        pytest.importorskip("matplotlib", reason="it draws the pictures")
        page = tmp_path / "page.md"
        page.write_text(f"above\n{init_report._BEGIN}\nold\n{init_report._END}\nbelow\n")
        out = ["--out", str(tmp_path / "pictures"), "--docs", str(page)]
        assert cli.main(["init-report", *TINY, *QUICK, *out]) == 0
        for name in ("residual.png", "gradient.png", "loss.png"):
            content = (tmp_path / "pictures" / name).read_bytes()
            assert content.startswith(b"\x89PNG") and len(content) > 10_000
        text = page.read_text()
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "\nold\n" not in text
        printed = capsys.readouterr().out
        assert all(line in printed for line in text.splitlines() if line.startswith("|"))

    def test_a_wrong_model_fails_the_command(self, monkeypatch, capsys):
        monkeypatch.setattr(init, "init_residual_projections", lambda model, std: None)
        command = ["init-report", *TINY, "--depths", "1", "--steps", "0", "--no-plots"]
        assert cli.main(command) == 1
        assert "24 of 28 parameters are as specified" in capsys.readouterr().out

    @pytest.mark.parametrize("option", ["--residual-init", "--linear-init"])
    def test_an_unknown_scheme(self, option, capsys):
        assert cli.main(["init-report", option, "xavier"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("fastgpt: unknown") and "'xavier'" in err and "'0.02'" in err

    def test_without_matplotlib_the_remedy_is_named(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert cli.main(["init-report", *TINY]) == 2
        assert "pip install 'fastgpt[plot]'" in capsys.readouterr().err

    def test_a_document_without_markers(self, tmp_path, capsys):
        (tmp_path / "page.md").write_text("nothing to fill in")
        command = ["init-report", *TINY, *QUICK, "--no-plots", "--docs", str(tmp_path / "page.md")]
        assert cli.main(command) == 2
        assert "page.md has no lines" in capsys.readouterr().err
