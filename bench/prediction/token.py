"""A token of sampling without a GPU: a decoding step's launches, from a run on meta tensors."""

from collections import Counter
from dataclasses import replace

import torch

from bench.peers import models
from bench.prediction import machine_code, model
from bench.prediction.kernel import Kernel
from bench.prediction.model import Gpu
from fastgpt import GPT, GPTConfig
from fastgpt.decoding.decoder import Decoder
from fastgpt.decoding.parameters import in_dtype, parameters
from fastgpt.weights import count_parameters

DTYPE = torch.bfloat16


def kernels(config: GPTConfig, context: int, gpu: Gpu) -> list[Kernel]:
    """Those of one more token of a single text of `context` tokens."""
    from fastgpt.kernels import _launch, decode

    with torch.device("meta"), models.quietly(), torch.no_grad():
        own = parameters(GPT(config))
        assert own is not None  # of a GPT just built
        decoder = Decoder(in_dtype(own, DTYPE), 1, config.block_size)
        decoder.run, decoder.next_position = decode, context
        with _launch.record(gpu.arch, gpu.processors) as launches:
            decoder.step(torch.zeros(1, dtype=torch.int64))
    counts = Counter(machine_code.kernel_of("token", launch, gpu.arch) for launch in launches)
    return [replace(kernel, launches=n) for kernel, n in counts.items()]


def least_bytes(config: GPTConfig, context: int, dtype: torch.dtype = DTYPE) -> int:
    """Read for one new token: the weights, without the embeddings that are only looked up, and the
    keys and values."""
    C, L = config.n_embd, config.n_layer
    weights = count_parameters(L, C, config.vocab_size, block_size=0)
    return (weights + 2 * L * C * context) * dtype.itemsize


def summary(kernels: list[Kernel], config: GPTConfig, context: int, gpu: Gpu) -> dict[str, float]:
    """`over_least`: the bytes moved over the least that a token needs. `microseconds`: without the
    gaps between launches, which are short in a replayed graph."""
    moved = sum(kernel.launches * model.moved(kernel, gpu) for kernel in kernels)
    return {
        "launches": sum(kernel.launches for kernel in kernels),
        "bytes": moved,
        "over_least": moved / least_bytes(config, context),
        "microseconds": 1e3 * model.kernels_ms(kernels, gpu),
    }
