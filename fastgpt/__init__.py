"""nanoGPT's GPT with fused Triton kernels underneath. `from fastgpt import GPT, GPTConfig`."""

from fastgpt import backend as _backend
from fastgpt import ops as ops
from fastgpt.backend import use_backend as use_backend
from fastgpt.config import GPTConfig as GPTConfig
from fastgpt.environment import backend_report as backend_report
from fastgpt.model import GPT as GPT
from fastgpt.train_step import TrainStep as TrainStep

__version__ = "0.1.0"  # setup.py reads it here

_backend.load_for_start()
