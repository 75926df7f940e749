"""Decoding step by step: the logits of whole forwards, whatever happens between two steps."""

import math

import pytest
import torch

from fastgpt import GPT, GPTConfig, TrainStep, sampling, use_backend
from fastgpt.decoding import step_in_c
from fastgpt.decoding.decoder import Decoder
from fastgpt.decoding.graphs import Graphs
from fastgpt.decoding.parameters import dense, in_dtype, in_int8, parameters
from tests.close import DEVICE
from tests.decoding import test_sampling
from tests.decoding.test_sampling import BLOCK_SIZE, V, prompt

MODES = ["torch"]
if step_in_c.unsupported((torch.empty(1),), 8) is None:
    MODES.append("auto")  # on a CPU that is step.c


def tiny(**changes) -> GPT:
    """With heads that the attention kernels take."""
    return test_sampling.tiny(**{"n_embd": 32} | changes)


@pytest.fixture(params=MODES)
def mode(request):
    with use_backend(request.param):
        yield request.param


def whole(model: GPT, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), use_backend("torch"):
        return model(text[:, -model.config.block_size :])[0][:, -1]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-5 of the largest logit."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("config", [{}, {"bias": False}, {"gelu": "tanh"}, {"n_head": 1}], ids=str)
def test_cached_logits_are_those_of_whole_forwards(mode, rows, config):
    """At every position, and past block_size."""
    model, text = tiny(**config), prompt(rows, BLOCK_SIZE + 4)
    logits = sampling.NextLogits(model, [0] * rows, text.size(1))
    for T in range(2, text.size(1) + 1):
        assert_close(logits(text[:, :T]), whole(model, text[:, :T]))


@torch.no_grad()
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_of_the_kernels(gelu):
    """Few steps: the interpreter takes a second for each."""
    model, text = tiny(n_layer=1, gelu=gelu).to(DEVICE), prompt(2, 6).to(DEVICE)
    starts = [0, 2]
    with use_backend("triton"):
        logits = sampling.NextLogits(model, starts, 6)
        for T in range(4, 7):
            found = logits(text[:, :T]).clone()
            for row, start in enumerate(starts):
                assert_close(found[[row]], whole(model, text[[row], start:T]))


@torch.no_grad()
def test_of_a_model_without_blocks(mode):
    model, text = tiny(n_layer=0), prompt(2, 6)
    logits = sampling.NextLogits(model, [0, 0], 6)
    for T in range(2, 7):
        assert_close(logits(text[:, :T]), whole(model, text[:, :T]))


@torch.no_grad()
def test_more_rows_than_the_kernels_take():
    model, text = tiny(), prompt(20, 6)
    logits = sampling.NextLogits(model, [0] * 20, 6)
    for T in range(2, 7):
        assert_close(logits(text[:, :T]), whole(model, text[:, :T]))


@torch.no_grad()
def test_after_crop_block_size(mode):
    model, text = tiny(), prompt(2, 9)
    model.generate(text[:, :3], 2)
    model.crop_block_size(7)
    logits = sampling.NextLogits(model, [0, 0], 9)
    for T in range(2, 10):
        assert_close(logits(text[:, :T]), whole(model, text[:, :T]))


def test_a_training_step_between_two_calls(mode):
    model, idx = tiny(), prompt(2, 4)
    greedy = dict(temperature=0)
    before = model.generate(idx, 8, **greedy)
    step = TrainStep(model, weight_decay=0.0, lr=0.3, betas=(0.9, 0.95))
    for _ in range(5):
        step([(before[:, :-1].contiguous(), before[:, 1:].flip(1).contiguous())])
    after = model.generate(idx, 8, **greedy)
    assert not torch.equal(after, before)
    for T in range(4, 12):
        assert torch.equal(whole(model, after[:, :T]).argmax(-1), after[:, T])


def test_under_inference_mode_and_outside(mode):
    model, idx = tiny(), prompt(2, 4)
    expected = model.generate(idx, 9, temperature=0)
    with torch.inference_mode():
        assert torch.equal(model.generate(idx, 9, temperature=0), expected)
    columns = model.generate_stream(idx, 9, temperature=0)
    with torch.inference_mode():
        text = torch.cat([idx, next(columns), next(columns)], dim=1)
    assert torch.equal(torch.cat([text, *columns], dim=1), expected)


def test_two_models_interleaved(mode):
    models, idx = [tiny(), tiny(n_head=1)], prompt(2, 4)
    expected = [model.generate(idx, 12, temperature=0) for model in models]
    streams = [model.generate_stream(idx, 12, temperature=0) for model in models]
    columns = list(zip(*streams, strict=True))
    for i in range(2):
        assert torch.equal(torch.cat([idx, *(pair[i] for pair in columns)], dim=1), expected[i])


def test_an_exception_in_the_middle_of_a_stream(mode, monkeypatch):
    model, idx = tiny(), prompt(2, 4)
    expected = model.generate(idx, 9, temperature=0)
    stream = model.generate_stream(idx, 9, temperature=0)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", lambda self, ids: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert list(stream) == [] and torch.is_grad_enabled()
    assert torch.equal(model.generate(idx, 9, temperature=0), expected)


def test_memory_is_constant():
    """Objects that live on after a call would add up."""
    import gc

    model, idx = tiny(), prompt(2, 4)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    model.generate(idx, 12)
    before = tensors()
    for _ in range(10):
        model.generate(idx, 12, top_k=3)
        next(model.generate_stream(idx, 12))
    assert tensors() == before


@pytest.mark.parametrize("steps", [4, BLOCK_SIZE + 5])
def test_prompts_of_unequal_length_get_what_they_get_alone(mode, steps):
    """With rows that pass block_size one after the other, and padding of any id."""
    model, idx = tiny(), prompt(4, 10)
    lengths = torch.tensor([10, 1, 4, 7])
    together = model.generate(idx, steps, temperature=0, lengths=lengths)
    assert torch.equal(together[:, :10], idx)
    for row, text, n in zip(together, idx, lengths.tolist(), strict=True):
        alone = model.generate(text[None, -n:], steps, temperature=0)
        assert torch.equal(row[10:], alone[0, n:])


def test_unequal_prompts_of_a_changed_model_and_one_longer_than_block_size():
    model, idx = tiny(), prompt(3, BLOCK_SIZE + 4)
    lengths = torch.tensor([BLOCK_SIZE + 4, 2, BLOCK_SIZE - 1])
    for _ in range(2):
        together = model.generate(idx, 6, temperature=0, lengths=lengths)
        for row, text, n in zip(together, idx, lengths.tolist(), strict=True):
            alone = model.generate(text[None, -n:], 6, temperature=0)
            assert torch.equal(row[-6:], alone[0, -6:])
        model.transformer.h[0].register_forward_hook(lambda m, x, y: y.flip(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype):
    """Logits as close as those of a model whose matrices were rounded."""
    model, text = tiny(), prompt(2, BLOCK_SIZE)
    rounded = in_dtype(in_dtype(parameters(model), dtype), torch.float32)
    with torch.no_grad():
        wide, low = (
            sampling.NextLogits(model, [0, 0], BLOCK_SIZE, d) for d in (torch.float32, dtype)
        )
        wide.parameters = rounded._replace(head=model.lm_head.weight.to(dtype).float())
        for T in range(3, BLOCK_SIZE + 1):
            expected, found = wide(text[:, :T]), low(text[:, :T])
            error = (found - expected).abs().max() / expected.std()
            assert error < 16 * torch.finfo(dtype).eps, T
    tokens = model.generate(text[:, :3], BLOCK_SIZE + 3, dtype=dtype)  # past block_size too
    assert tokens.shape == (2, BLOCK_SIZE + 6)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def test_weights_in_8_bits(mode):
    """Logits of a model whose matrices were rounded; PyTorch's kernel rounds x to 16 bits too."""
    model, text = tiny(), prompt(2, BLOCK_SIZE)
    rounded = tiny()
    rounded.load_state_dict(model.state_dict())
    low = in_int8(parameters(model))
    for block, own in zip(rounded.transformer.h, low.blocks, strict=True):
        block.attn.c_attn.weight.copy_(dense(own.qkv, torch.float32))
        block.attn.c_proj.weight.copy_(dense(own.attn_proj, torch.float32))
        block.mlp.c_fc.weight.copy_(dense(own.fc, torch.float32))
        block.mlp.c_proj.weight.copy_(dense(own.mlp_proj, torch.float32))
    head = dense(low.head, torch.float32)
    assert 0 < (head - model.lm_head.weight).abs().max() <= low.head.scales.max() * 0.51
    wide, ours = (sampling.NextLogits(m, [0, 0], BLOCK_SIZE, d)
                  for m, d in ((rounded, None), (model, torch.int8)))  # fmt: skip
    wide.parameters = wide.parameters._replace(head=head)
    for T in range(3, BLOCK_SIZE + 1):
        expected, found = wide(text[:, :T]), ours(text[:, :T])
        assert (found - expected).abs().max() < (0.1 if mode == "torch" else 1e-5) * expected.std()
    tokens = model.generate(text[:, :1], BLOCK_SIZE + 3, dtype=torch.int8)  # past block_size too
    assert tokens.shape == (2, BLOCK_SIZE + 4)


def test_steps_are_captured_once_per_bucket():
    """With a stand-in for CUDA's graphs, which notes what ran while it was captured."""
    ran, captured = [], []

    class Graph:
        def __init__(self, run):
            self.run = run
            captured.append(self)

        def replay(self):
            self.run()

    graphs = Graphs(ran.append, Graph)
    for key in (64, 64, 64, 128, 128, 64, 128):
        graphs(key)
    assert ran == [64, 64, 64, 128, 128, 64, 128] and len(captured) == 2


@torch.no_grad()
def test_a_captured_step_is_the_step(monkeypatch):
    """A replay repeats calls with the very arguments of the capture: nothing in a step may depend
    on the host's numbers but the bucket."""
    from fastgpt.decoding import decoder

    class Replay:
        """The calls made in `run`, made again."""

        def __init__(self, run):
            self.calls = []
            owner = run.__closure__[-1].cell_contents.run.__self__
            chosen, owner.run = owner.run, self
            self.target = chosen
            run()
            owner.run = chosen

        def __getattr__(self, name):
            def call(*args):
                self.calls.append((name, args))

            return call

        def replay(self):
            for name, args in self.calls:
                getattr(self.target, name)(*args)

    monkeypatch.setattr(decoder, "capture_for", lambda device, run: Replay)
    model, text = tiny(), prompt(2, BLOCK_SIZE)
    logits = sampling.NextLogits(model, [0, 0], BLOCK_SIZE)
    for T in range(2, BLOCK_SIZE + 1):
        assert_close(logits(text[:, :T]), whole(model, text[:, :T]))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_a_kept_decoder(monkeypatch, dtype):
    """As on CUDA: the next call has it, with the weights of then; two streams have one each."""
    made, init = [], Decoder.__init__
    model, idx = tiny(), prompt(2, 4)
    how = dict(temperature=0, dtype=dtype)
    expected = model.generate(idx, 9, **how)
    monkeypatch.setattr(sampling, "keeps", lambda device: True)
    monkeypatch.setattr(Decoder, "__init__", lambda *args: made.append(args) or init(*args))
    for _ in range(3):
        assert torch.equal(model.generate(idx, 9, **how), expected)
    assert len(made) == 1
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.data.add_(1.0)  # no version tells of it
    changed = model.generate(idx, 9, **how)
    assert len(made) == 1 and not torch.equal(changed, expected)
    monkeypatch.setattr(sampling, "keeps", lambda device: False)
    assert torch.equal(model.generate(idx, 9, **how), changed)
    monkeypatch.setattr(sampling, "keeps", lambda device: True)
    for around in (torch.inference_mode(), torch.inference_mode(False)):
        with around:
            assert torch.equal(model.generate(idx, 8, **how), changed[:, :-1])
    streams = [model.generate_stream(idx, 9, **how) for _ in range(2)]
    columns = list(zip(*streams, strict=True))
    assert all(torch.equal(a, b) for a, b in columns)
    assert torch.equal(torch.cat([idx, *(a for a, _ in columns)], dim=1), changed)


@torch.no_grad()
def test_a_step_of_12_layers_is_62_launches():
    """Besides two of PyTorch's that set the ids and the positions."""
    from fastgpt.kernels import _launch, decode

    with torch.device("meta"):
        model = GPT(GPTConfig())
    own = parameters(model)
    assert own is not None
    made = Decoder(in_dtype(own, torch.bfloat16), 1, 1024)
    made.run = decode
    with _launch.record() as launches:
        made.step(torch.zeros(1, dtype=torch.int64, device="meta"))
    assert len(launches) == 62
    read = {t for launch in launches for t in launch.args if isinstance(t, torch.Tensor)}
    matrices = [t for t in read if t.dim() == 2 and t.dtype == torch.bfloat16]
    assert len(matrices) == 12 * 4 + 1  # each weight once, in 16 bits


BAD = {
    "negative count": (dict(max_new_tokens=-1), ValueError, "max_new_tokens=-1"),
    "count that is none": (dict(max_new_tokens=2.5), ValueError, "max_new_tokens=2.5"),
    "no dtype of weights": (dict(dtype=torch.int64), ValueError, "dtype=torch.int64"),
    "a length of 0": (dict(lengths=torch.tensor([4, 0])), ValueError, "empty prompt"),
    "a length too many": (dict(lengths=torch.tensor([4, 4, 4])), ValueError, r"must be \(B,\)"),
    "a length too large": (dict(lengths=torch.tensor([4, 5])), ValueError, "from 1 to T"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_token(case):
    how, error, words = BAD[case]
    for call in (GPT.generate, GPT.generate_stream):
        with pytest.raises(error, match=words):
            call(tiny(), prompt(2, 4), **{"max_new_tokens": 3} | how)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_logits(temperature):
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(RuntimeError, match="logits hold NaN or inf; look for"):
        model.generate(prompt(), 2, temperature=temperature)


def test_ids_outside_the_vocabulary():
    with pytest.raises(IndexError, match=f"vocab_size={V}"):
        tiny().generate(prompt() + V, 2)
