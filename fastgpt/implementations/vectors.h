/* What the C files share: vectors of LANES floats, bf16, exp and GELU. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline float from_bf16(uint16_t bits) {
    union { uint32_t bits; float value; } wide = {(uint32_t)bits << 16};
    return wide.value;
}

static inline uint16_t to_bf16(float value) { /* to nearest, ties to even; NaN stays NaN */
    union { float value; uint32_t bits; } wide = {value};
    uint32_t rounded = (wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

static inline float from_f32(float value) { return value; }
static inline float to_f32(float value) { return value; }

static inline floats either(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

/* e^x for x <= 0: exactly 0 where it would be subnormal; NaN stays NaN */
static inline floats exp_(floats x) {
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    floats n = shifted - 12582912.0f;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ints power = ((ints)shifted << 23) + (127 << 23); /* the whole number is in the low bits */
    ints kept = ~(x < -87.0f);
    return (floats)((ints)(p * (floats)power) & kept);
}

/* Normal cdf of h, of which `below` is exp(-h^2 / 2); from the half h <= 0. A minimax fit of
   cdf / exp(-h^2 / 2): the cdf is off by 3e-9 at most */
static inline floats normal_cdf(floats h, floats below) {
    floats t = 1.0f / (1.0f + 0.33f * either(h < 0.0f, -h, h));
    floats q = 0.044655803f * t - 0.21636101f;
    q = q * t + 0.322958469f;
    q = q * t - 0.0807278533f;
    q = q * t + 0.176091762f;
    q = q * t + 0.120953195f;
    q = (q * t + 0.132429638f) * t * below;
    return either(h > 0.0f, 1.0f - q, q);
}

/* What GELU's tanh form has for the cdf, (1 + tanh(u)) / 2; `less` is its lesser side, of -|h| */
static inline floats tanh_cdf(floats h, floats *less) {
    floats twice = h * (1.59576912f + 0.0713548163f * h * h); /* 2u */
    floats small = exp_(either(twice < 0.0f, twice, -twice));
    *less = small / (1.0f + small);
    return either(twice > 0.0f, 1.0f - *less, *less);
}
