"""Maths shared by two or more kernels. Blocks are fp32 on entry and on return."""

import triton
import triton.language as tl


@triton.jit
def gelu(h, TANH: tl.constexpr):
    """h * Phi(h), or OpenAI's approximation of it."""
    if TANH:
        # 0.5 * (1 + tanh(u)) == sigmoid(2u), without the cancellation at negative u
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def gelu_grad(h, TANH: tl.constexpr):
    """d gelu(h) / dh"""
    if TANH:
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
