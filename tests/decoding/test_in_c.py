"""Steps in C: on several threads, of models in any dtype, and of ids that are none."""

import ctypes
import shutil

import pytest
import torch

from fastgpt import use_backend
from fastgpt.decoding import step_in_c
from fastgpt.decoding.decoder import Decoder
from fastgpt.decoding.parameters import in_dtype, parameters
from fastgpt.implementations import compiled
from tests.decoding.test_decoding import MODES, tiny
from tests.decoding.test_sampling import V, prompt

IN_C = pytest.mark.skipif("auto" not in MODES, reason="there is no C compiler")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no GCC")
def test_gcc_before_12(monkeypatch, tmp_path):
    """Which has other shuffles: lanes are added up as by the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "gcc -U__GNUC__ -D__GNUC__=11")
    old = compiled.library.__wrapped__(step_in_c._SOURCE)
    assert isinstance(old, ctypes.CDLL), old
    x, weight = torch.randn(3, 100), torch.randn(40, 100)
    found = []
    monkeypatch.setattr(step_in_c, "_address", step_in_c._address.__wrapped__)  # keeps none
    for library in (old, compiled.library(step_in_c._SOURCE)):
        monkeypatch.setattr(compiled, "library", lambda source, library=library: library)
        out = torch.full((3, 40), torch.nan)
        step_in_c.linear(out, x, weight, None)
        found.append(out)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], x @ weight.T)


@IN_C
@torch.no_grad()
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 1), (1, 5)])
def test_threads_change_no_bit(rows, width):
    """Of a step of several layers, each of which reads what other threads wrote."""
    weights = in_dtype(
        parameters(tiny(n_layer=3, n_embd=64, n_head=4, block_size=64)), torch.float32
    )
    ids, before, found = torch.arange(rows * width), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for _ in range(4):
                decoder = Decoder(weights, rows, 64, width)
                decoder.prefill(torch.zeros(rows, 1, dtype=torch.int64))
                found.append(torch.stack([decoder.step(ids).clone() for _ in range(50)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits, found[0]) for logits in found)


@IN_C
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(own, low):
    """Their first tokens are those of the same weights in fp32."""
    model, idx = tiny().to(own), prompt(2, 3)
    found = model.generate(idx, 5, temperature=0, dtype=low)
    assert torch.equal(found, model.float().generate(idx, 5, temperature=0, dtype=low))


@torch.no_grad()
def test_a_tied_weight_is_converted_once():
    model = tiny()
    half = in_dtype(parameters(model.half()), torch.float32)
    assert half.wte is half.head and half.wte.dtype == half.wpe.dtype == torch.float32
    low = in_dtype(parameters(model.float()), torch.bfloat16)
    assert low.wte.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drawn", [-1, V])
def test_a_drawn_id_outside_the_vocabulary(drawn, mode, monkeypatch):
    """By a function of the caller's: as in nanoGPT an IndexError, and no reading there."""
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: torch.full((2, 1), drawn))
    with use_backend(mode), pytest.raises(IndexError):
        tiny().generate(prompt(2, 3), 3)
