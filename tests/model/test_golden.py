"""Every fact in golden_nanogpt.json, computed once with the real nanoGPT, holds on a CPU in fp32.

The facts were made with one thread, so the tests run with one: a reduction split over threads adds
in another order. Tolerances are a few roundings (fp32 eps is 1.2e-7), because CPUs differ in their
GEMM kernels: with PyTorch and MKL held to older instruction sets, losses moved by up to 2e-7 of
themselves and gradient norms by up to 3e-7.
"""

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import GPT, GPTConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_nanogpt.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
SMALL = [name for name, case in CASES.items() if "forward" in case]  # GPT-2 itself: weights only


def sha256(t: torch.Tensor) -> str:
    return hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()


def new_model(case: dict) -> GPT:
    torch.manual_seed(case["seed"])
    return GPT(GPTConfig(**case["config"]))


def data(case: dict) -> torch.Tensor:
    """The rows that the key "data" of a case describes: step k trains on rows 4k to 4k + 4."""
    config = case["config"]
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    shape = (80, config["block_size"] + 1)
    return torch.randint(config["vocab_size"], shape, generator=generator)


@pytest.fixture(scope="module", params=CASES)
def built(request):
    case = CASES[request.param]
    model = new_model(case)
    return SimpleNamespace(case=case, model=model, rng=torch.get_rng_state())


@pytest.fixture(scope="module", params=SMALL)
def stepped(request):
    """One forward and backward on the first four rows, with three targets ignored."""
    case = CASES[request.param]
    model, rows = new_model(case), data(case)
    x, y = rows[:4, :-1], rows[:4, 1:].clone()
    y[0, :3] = -1
    logits, loss = model(x, y)
    loss.backward()
    return SimpleNamespace(case=case, model=model, x=x, logits=logits.detach(), loss=loss.item())


@pytest.fixture(scope="module", params=SMALL)
def trained(request):
    """Twenty steps as nanoGPT's train.py takes them."""
    case = CASES[request.param]
    model, rows, recipe = new_model(case), data(case), case["train"]
    betas = tuple(recipe["betas"])
    optimizer = model.configure_optimizers(recipe["weight_decay"], recipe["lr"], betas, "cpu")
    losses = []
    for step in rows.split(4):
        _, loss = model(step[:, :-1], step[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return SimpleNamespace(case=case, model=model.eval(), optimizer=optimizer, losses=losses)


def test_state_dict_names_in_order(built):
    assert list(built.model.state_dict()) == list(built.case["params"])


@pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(),
    reason="without AVX normal_ rounds differently, so nanoGPT's own weights have other bits here",
)
def test_initial_weights_bit_for_bit(built):
    ours = {name: sha256(p) for name, p in built.model.state_dict().items()}
    assert ours == {name: fact["sha256"] for name, fact in built.case["params"].items()}


def test_rng_state_after_construction(built):
    assert sha256(built.rng) == built.case["rng_after_init"]


def test_parameter_counts(built):
    assert built.model.get_num_params() == built.case["n_params"]
    assert built.model.get_num_params(non_embedding=False) == built.case["n_params_all"]


def test_logits(stepped):
    fact, logits = stepped.case["forward"], stepped.logits
    assert list(logits.shape) == fact["logits_shape"]
    first = torch.tensor(fact["logits_0_0_first8"])
    torch.testing.assert_close(logits[0, 0, :8], first, rtol=1e-5, atol=1e-6)
    assert logits.double().abs().sum().item() == pytest.approx(fact["logits_abs_sum"], rel=1e-6)
    # positive and negative logits cancel in the plain sum: its rounding is that of the absolute one
    allowed = 1e-6 * fact["logits_abs_sum"]
    assert logits.double().sum().item() == pytest.approx(fact["logits_sum"], abs=allowed)


def test_logits_of_the_last_position(stepped):
    fact = stepped.case["forward"]
    with torch.no_grad():
        logits, loss = stepped.model(stepped.x)
    assert loss is None and list(logits.shape) == fact["last_shape"]
    first = torch.tensor(fact["last_0_first8"])
    torch.testing.assert_close(logits[0, 0, :8], first, rtol=1e-5, atol=1e-6)


def test_loss(stepped):
    assert stepped.loss == pytest.approx(stepped.case["forward"]["loss"], rel=1e-6)


def test_every_gradient(stepped):
    facts = stepped.case["forward"]["grads"]
    ours = {name: p.grad.double() for name, p in stepped.model.named_parameters()}
    assert list(ours) == list(facts)
    for name, grad in ours.items():
        assert grad.norm().item() == pytest.approx(facts[name]["norm"], rel=5e-6), name
        assert grad.abs().sum().item() == pytest.approx(facts[name]["abs_sum"], rel=5e-6), name


def test_optimizer_groups(trained):
    facts = trained.case["optimizer"]["groups"]
    groups = trained.optimizer.param_groups
    ours = [
        dict(
            n=len(group["params"]),
            weight_decay=group["weight_decay"],
            numel=sum(p.numel() for p in group["params"]),
        )
        for group in groups
    ]
    assert ours == facts


def test_losses_of_twenty_steps(trained):
    # AdamW divides by the gradient's own size: a rounding in a small one is a visible difference
    # in its weight, and twenty steps add up
    assert trained.losses == pytest.approx(trained.case["train"]["losses"], rel=2e-6)


def test_greedy_tokens_past_block_size(trained):
    fact = trained.case["generate"]
    expected = torch.tensor(fact["greedy_top_k_1"])
    prompt = torch.tensor(fact["prompt"])
    assert expected.size(1) > trained.case["config"]["block_size"]  # or the crop would go untested
    tokens = trained.model.generate(prompt, expected.size(1) - prompt.size(1), top_k=1)
    assert torch.equal(tokens, expected)


def drawn_as_recorded() -> bool:
    """Whether torch.multinomial makes of a seed what it made of it in the release that recorded."""
    torch.manual_seed(0)
    return torch.multinomial(torch.full((3, 97), 1 / 97), 1).flatten().tolist() == [58, 71, 57]


def test_sampled_tokens(trained):
    if not drawn_as_recorded():
        pytest.skip(
            "this PyTorch draws other samples; test_sampling.py compares with nanoGPT's loop"
        )
    prompt, fact = trained.case["generate"]["prompt"], trained.case["generate"]["sampled"]
    how = {name: fact[name] for name in ("max_new_tokens", "temperature", "top_k")}
    torch.manual_seed(fact["seed"])
    assert trained.model.generate(torch.tensor(prompt), **how).tolist() == fact["tokens"]


def test_mfu_against_an_a100(trained):
    fact = trained.case["mfu"]
    mfu = trained.model.estimate_mfu(fact["fwdbwd_per_iter"], fact["dt"], peak_flops=312e12)
    assert mfu == pytest.approx(fact["value"], rel=1e-12)  # float64, in another order at most


def test_crop_block_size(trained):
    fact, model = trained.case["crop"], copy.deepcopy(trained.model)
    size = fact["block_size"]
    model.crop_block_size(size)
    wpe = model.transformer.wpe.weight
    assert list(wpe.shape) == fact["wpe_shape"] and model.config.block_size == size
    assert torch.equal(wpe, trained.model.transformer.wpe.weight[:size])

    for block in (forked := copy.deepcopy(trained.model)).transformer.h:  # with a causal mask
        block.attn.register_buffer("bias", torch.ones(1, 1, *2 * [forked.config.block_size]).tril())
    forked.crop_block_size(size)
    assert all(block.attn.bias.shape == (1, 1, size, size) for block in forked.transformer.h)

    x = data(trained.case)[:2, :size]  # what fits in both does not notice
    assert torch.equal(model(x)[0], trained.model(x)[0])
