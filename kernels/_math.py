"""Maths shared by two or more kernels. Blocks are fp32 on entry and on return."""

import triton
import triton.language as tl


@triton.jit
def gelu(h, TANH: tl.constexpr, dtype: tl.constexpr):
    """h * Phi(h), or OpenAI's approximation of it. h was read as dtype."""
    y, _ = gelu_and_grad(h, TANH, dtype)
    return y


@triton.jit
def gelu_and_grad(h, TANH: tl.constexpr, dtype: tl.constexpr):
    """gelu(h) and d gelu(h) / dh, which share most of their work."""
    if TANH:
        # 0.5 * (1 + tanh(u)) == sigmoid(2u), without the cancellation at negative u
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return h * s, s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    if dtype == tl.float32:
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        cdf, density = _normal_in_16_bits(h, dtype)
    return h * cdf, cdf + h * density


@triton.jit
def _normal_in_16_bits(h, dtype: tl.constexpr):
    """Phi(h) and its density, so close that h * Phi(h) and its derivative are off by less than a
    quarter of an ulp of dtype, also where Phi is small. exp2 of a polynomial: erf costs twice that.

    log2 Phi(-|h|) is fitted in b, for which b * b = log2(e) * h * h / 2. bfloat16 asks for h down
    to -13.2, float16 for more digits down to -5.6. Beyond, the first coefficient brings exp2 to 0.
    """
    b = 0.8493218002880191 * tl.abs(h)
    if dtype == tl.bfloat16:
        q = -1.1090651241829619e-06 * b + 5.156278348295018e-05
        q = q * b - 0.0010085874237120152
        q = q * b + 0.010948101989924908
        q = q * b - 0.07427820563316345
        q = q * b - 0.6522948145866394
        q = q * b - 1.3479807376861572
        q = q * b + (8 - 1.000779151916504)
        # exp2 flushes subnormal results to 0: Phi(-13) is one, though gelu(-13) is not
        tail = tl.exp2(q) * 2.0**-8
    else:
        q = -2.7691498871718068e-06 * b + 0.00012621594942174852
        q = q * b - 0.0019200182287022471
        q = q * b + 0.01591200940310955
        q = q * b - 0.08756648749113083
        q = q * b - 0.6358252167701721
        q = q * b - 1.3554540872573853
        q = q * b - 0.9999963045120239
        tail = tl.exp2(q)
    return tl.where(h >= 0.0, 1.0 - tail, tail), tl.exp2(-1.3257480647361595 - b * b)
