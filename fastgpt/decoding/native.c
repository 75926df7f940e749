/* A decoding step's two loops over memory, for CPUs: see native.py.

   A GEMV reads each weight once. Every output is one dot product along a row of the weight, as
   nanoGPT stores it, and the rows are shared among threads; sums are fp32 in vector lanes. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static float from_bf16(uint16_t bits) {
    union { uint32_t bits; float value; } wide = {(uint32_t)bits << 16};
    return wide.value;
}

static uint16_t to_bf16(float value) { /* to nearest, ties to even; NaN stays NaN */
    union { float value; uint32_t bits; } wide = {value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);
}

static float from_int8(int8_t value) { return value; }
static float from_f32(float value) { return value; }
static float to_f32(float value) { return value; }

static void layer_norm(const float *x, const float *weight, const float *bias, float *y, int N) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < N; i++) sum += x[i];
    float mean = sum / N;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < N; i++) squares += (x[i] - mean) * (x[i] - mean);
    float rstd = 1 / sqrtf(squares / N + 1e-5f);
    for (int i = 0; i < N; i++)
        y[i] = (x[i] - mean) * rstd * weight[i] + (bias ? bias[i] : 0);
}

#define LANES 16
#define LANES_OF(T) __attribute__((vector_size(sizeof(T) * LANES)))
typedef float vec LANES_OF(float);
typedef uint32_t words LANES_OF(uint32_t);
typedef int32_t ints LANES_OF(int32_t);
typedef uint16_t halves LANES_OF(uint16_t);
typedef int16_t shorts LANES_OF(int16_t);
typedef int8_t bytes LANES_OF(int8_t);

static vec load_f32(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static vec load_bf16(const uint16_t *p) {
    halves bits;
    memcpy(&bits, p, sizeof bits);
    return (vec)(__builtin_convertvector(bits, words) << 16);
}

static vec load_int8(const int8_t *p) { /* in steps that are instructions: GCC goes no other way */
    bytes values;
    memcpy(&values, p, sizeof values);
    shorts wider = __builtin_convertvector(values, shorts);
    return __builtin_convertvector(__builtin_convertvector(wider, ints), vec);
}

static float total(vec v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* sums[r] = w . x[r]. Of one weight at a time, which is how memory is read fastest; in two parts, so
   that an addition need not wait for the last one. A row's are added up in one order whichever rows
   are beside it. */
#define DOTS(NAME, T, FROM, LOAD)                                                                 \
    static inline __attribute__((always_inline)) void NAME(                                       \
        const T *w, const float *const *x, float *sums, int rows, int K) {                        \
        vec even[4] = {0}, odd[4] = {0};                                                          \
        int k = 0;                                                                                \
        for (; k + 2 * LANES <= K; k += 2 * LANES) {                                              \
            vec first = LOAD(w + k), second = LOAD(w + k + LANES);                                \
            _Pragma("GCC unroll 4")                                                               \
            for (int r = 0; r < rows; r++) {                                                      \
                even[r] += load_f32(x[r] + k) * first;                                            \
                odd[r] += load_f32(x[r] + k + LANES) * second;                                    \
            }                                                                                     \
        }                                                                                         \
        _Pragma("GCC unroll 4")                                                                   \
        for (int r = 0; r < rows; r++) {                                                          \
            sums[r] = total(even[r] + odd[r]);                                                    \
            for (int j = k; j < K; j++) sums[r] += x[r][j] * FROM(w[j]);                          \
        }                                                                                         \
    }

/* y (M, N) = [residual +] ([layer norm] (x (M, K)) @ w (N, K)^T [* scales] + bias) */
#define LINEAR(NAME, T, FROM, LOAD)                                                               \
    DOTS(NAME##_dots, T, FROM, LOAD)                                                              \
    void NAME(const float *x, const T *w, const float *scales, const float *bias,                 \
              const float *norm_weight, const float *norm_bias, const float *residual, float *y,  \
              int M, int N, int K, int threads) {                                                 \
        float *normed = NULL;                                                                     \
        if (norm_weight) {                                                                        \
            normed = malloc(sizeof(float) * M * K);                                               \
            for (int m = 0; m < M; m++)                                                           \
                layer_norm(x + (int64_t)m * K, norm_weight, norm_bias, normed + (int64_t)m * K,   \
                           K);                                                                    \
            x = normed;                                                                           \
        }                                                                                         \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                         \
        for (int n = 0; n < N; n++) {                                                             \
            const T *row = w + (int64_t)n * K;                                                    \
            for (int first = 0; first < M; first += 4) {                                          \
                const float *xs[4];                                                               \
                for (int r = 0; r < 4; r++)                                                       \
                    xs[r] = x + (int64_t)(first + r < M ? first + r : first) * K;                 \
                float sums[4];                                                                    \
                if (M == 1)                                                                       \
                    NAME##_dots(row, xs, sums, 1, K);                                             \
                else                                                                              \
                    NAME##_dots(row, xs, sums, 4, K);                                             \
                for (int m = first; m < M && m < first + 4; m++) {                                \
                    int64_t to = (int64_t)m * N + n;                                              \
                    float sum = sums[m - first] * (scales ? scales[n] : 1) + (bias ? bias[n] : 0);\
                    y[to] = residual ? residual[to] + sum : sum;                                  \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        free(normed);                                                                             \
    }

/* qkv (R, 3 H D): k and v of row r go to positions[r] of the cache (B, H, S, D) of its text, which
   R / B rows share, and q attends to all up to there -> y (R, H D) */
#define ATTEND(NAME, T, FROM, TO, LOAD)                                                           \
    void NAME(const float *qkv, T *keys, T *values, const int32_t *positions, float *y, int R,    \
              int B, int H, int S, int D, int threads) {                                          \
        for (int rh = 0; rh < R * H; rh++) { /* before any row of a text reads those before it */ \
            int r = rh / H, h = rh % H;                                                           \
            const float *k = qkv + ((int64_t)r * 3 * H + H + h) * D, *v = k + H * D;              \
            int64_t at = (((int64_t)r / (R / B) * H + h) * S + positions[r]) * D;                 \
            for (int d = 0; d < D; d++) {                                                         \
                keys[at + d] = TO(k[d]);                                                          \
                values[at + d] = TO(v[d]);                                                        \
            }                                                                                     \
        }                                                                                         \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                         \
        for (int rh = 0; rh < R * H; rh++) {                                                      \
            int r = rh / H, h = rh % H, last = positions[r];                                      \
            const float *q = qkv + ((int64_t)r * 3 * H + h) * D;                                  \
            int64_t cache = ((int64_t)r / (R / B) * H + h) * S * D;                               \
            const T *ks = keys + cache, *vs = values + cache;                                     \
            float *p = malloc(sizeof(float) * (last + 1 + D)), *sums = p + last + 1;              \
            float top = -INFINITY, all = 0, scale = 1 / sqrtf(D);                                 \
            for (int t = 0; t <= last; t++) {                                                     \
                const T *k = ks + (int64_t)t * D;                                                 \
                vec products = {0};                                                               \
                int d = 0;                                                                        \
                for (; d + LANES <= D; d += LANES) products += load_f32(q + d) * LOAD(k + d);     \
                float s = total(products);                                                        \
                for (; d < D; d++) s += q[d] * FROM(k[d]);                                        \
                p[t] = s * scale;                                                                 \
                top = p[t] > top ? p[t] : top;                                                    \
            }                                                                                     \
            for (int d = 0; d < D; d++) sums[d] = 0;                                              \
            for (int t = 0; t <= last; t++) {                                                     \
                const T *v = vs + (int64_t)t * D;                                                 \
                float weight = expf(p[t] - top);                                                  \
                all += weight;                                                                    \
                for (int d = 0; d < D; d++) sums[d] += weight * FROM(v[d]);                       \
            }                                                                                     \
            for (int d = 0; d < D; d++) y[(int64_t)rh * D + d] = sums[d] / all;                   \
            free(p);                                                                              \
        }                                                                                         \
    }

LINEAR(linear_float32, float, from_f32, load_f32)
LINEAR(linear_bfloat16, uint16_t, from_bf16, load_bf16)
LINEAR(linear_int8, int8_t, from_int8, load_int8)
ATTEND(attend_float32, float, from_f32, to_f32, load_f32)
ATTEND(attend_bfloat16, uint16_t, from_bf16, to_bf16, load_bf16)
