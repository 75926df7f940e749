/* A decoding step for CPUs: see step_in_c.py.

   A GEMV reads each weight once. Every output is one dot product along a row of the weight, as
   nanoGPT stores it, and blocks of rows are shared among threads; sums are fp32 in vector lanes. */

#define LANES 16
#include "vectors.h"

#include <omp.h>

#define LANES_OF(T) __attribute__((vector_size(sizeof(T) * LANES)))
typedef uint32_t words LANES_OF(uint32_t);
typedef uint16_t halves LANES_OF(uint16_t);
typedef int16_t shorts LANES_OF(int16_t);
typedef int8_t bytes LANES_OF(int8_t);

static inline float from_int8(int8_t value) { return value; }

static inline floats load_f32(const float *p) { return *(const floats *)p; }

static inline floats load_bf16(const uint16_t *p) {
    halves bits;
    memcpy(&bits, p, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

static inline floats load_int8(const int8_t *p) { /* in steps that are instructions: GCC goes no
                                                     other way */
    bytes values;
    memcpy(&values, p, sizeof values);
    shorts wider = __builtin_convertvector(values, shorts);
    return (floats)__builtin_convertvector(__builtin_convertvector(wider, ints), floats);
}

/* The first `count` of LANES numbers; the others are 0 */
static inline floats some(const float *p, int count) {
    floats v = {0};
    memcpy(&v, p, sizeof(float) * count);
    return v;
}

#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Lanes of a and then of b, of which each group's two halves are added up: groups of 16, 8, 4, 2 */
static inline floats fold16(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

static inline floats fold8(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

static inline floats fold4(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

static inline floats fold2(floats a, floats b) {
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Lane i is the sum of v[i]'s lanes. 16 sums at once: one alone costs as much as half a row */
static inline floats totals(const floats *v) {
    floats a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = fold16(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) b[i] = fold8(a[2 * i], a[2 * i + 1]);
    return fold2(fold4(b[0], b[1]), fold4(b[2], b[3]));
}

static inline floats gelu(floats h, int tanh) {
    floats less;
    return h * (tanh ? tanh_cdf(h, &less) : normal_cdf(h, exp_(h * h * -0.5f)));
}

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

/* A function of a step with its arguments. Every thread calls it and does its share. */
struct call {
    void (*function)(const struct call *);
    void *pointers[8];
    int32_t sizes[6];
    int64_t weight_bytes; /* of a matrix at pointers[1], which threads read in equal parts */
};

enum { AHEAD = 32768 }; /* bytes */

/* A thread that has done its share begins to read what is next: memory should not wait for the
   slowest thread, nor a thread for the first bytes of a weight. */
void run(const struct call *calls, int count, int threads) {
#pragma omp parallel num_threads(threads)
    for (const struct call *call = calls, *end = calls + count; call < end;) {
        call->function(call);
        if (++call < end && call->weight_bytes) {
            int64_t share = call->weight_bytes / omp_get_num_threads();
            const char *start = (const char *)call->pointers[1] + share * omp_get_thread_num();
            for (int at = 0; at < AHEAD && at < share; at += 64) __builtin_prefetch(start + at);
        }
#pragma omp barrier
    }
}

/* positions (n,) += 1, up to last (n,) */
void advance(const struct call *call) {
    int32_t *positions = call->pointers[0];
    const int32_t *last = call->pointers[1];
#pragma omp for schedule(static) nowait
    for (int i = 0; i < call->sizes[0]; i++)
        positions[i] = positions[i] < last[i] ? positions[i] + 1 : last[i];
}

/* wte (V, K)[ids (M,)] + wpe (block_size, K)[positions (M,)] -> y (M, K) */
#define EMBED(NAME, T, FROM)                                                                      \
    void NAME(const struct call *call) {                                                          \
        const int64_t *ids = call->pointers[0];                                                   \
        const int32_t *positions = call->pointers[1];                                             \
        const T *wte = call->pointers[2], *wpe = call->pointers[3];                               \
        float *y = call->pointers[4];                                                             \
        int M = call->sizes[0], K = call->sizes[1];                                               \
        _Pragma("omp for schedule(static) nowait")                                                \
        for (int m = 0; m < M; m++)                                                               \
            for (int k = 0; k < K; k++)                                                           \
                y[(int64_t)m * K + k] = FROM(wte[ids[m] * K + k]) +                               \
                                        FROM(wpe[(int64_t)positions[m] * K + k]);                 \
    }

/* How many rows of x, and of a weight, are multiplied together in registers */
#ifdef __AVX512F__
enum { GROUP = 4, PAIR = 2 };
#else
enum { GROUP = 4, PAIR = 1 };
#endif

/* sums[r] = lane by lane w[i] . x[r], for `wide` rows i of a weight; rest, what is left of K. A single
   x takes one row of the weight at a time, which is how memory is read fastest. In two parts, so that
   an addition need not wait for the last one, and in one order whatever rows are beside. */
#define DOTS(NAME, T, FROM, LOAD)                                                                 \
    static inline __attribute__((always_inline)) void NAME(                                       \
        const T *w, const float *const *x, floats *sums, float *rest, int wide, int rows, int K) {\
        floats even[PAIR][GROUP] = {0}, odd[PAIR][GROUP] = {0};                                   \
        int k = 0;                                                                                \
        for (; k + 2 * LANES <= K; k += 2 * LANES) {                                              \
            floats first[PAIR], second[PAIR];                                                     \
            _Pragma("GCC unroll 2")                                                               \
            for (int i = 0; i < wide; i++) {                                                      \
                first[i] = LOAD(w + (int64_t)i * K + k);                                          \
                second[i] = LOAD(w + (int64_t)i * K + k + LANES);                                 \
            }                                                                                     \
            _Pragma("GCC unroll 4")                                                               \
            for (int r = 0; r < rows; r++) {                                                      \
                floats left = load_f32(x[r] + k), right = load_f32(x[r] + k + LANES);             \
                _Pragma("GCC unroll 2")                                                           \
                for (int i = 0; i < wide; i++) {                                                  \
                    even[i][r] += left * first[i];                                                \
                    odd[i][r] += right * second[i];                                               \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        _Pragma("GCC unroll 4")                                                                   \
        for (int r = 0; r < rows; r++) {                                                          \
            _Pragma("GCC unroll 2")                                                               \
            for (int i = 0; i < wide; i++) {                                                      \
                float more = 0;                                                                   \
                for (int j = k; j < K; j++) more += x[r][j] * FROM(w[(int64_t)i * K + j]);        \
                sums[r * LANES + i] = even[i][r] + odd[i][r];                                     \
                rest[r * LANES + i] = more;                                                       \
            }                                                                                     \
        }                                                                                         \
    }

/* Of weights for several rows of x: there the processor, busy multiplying, does not look ahead */
static inline void to_level_2(const void *start, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)start + at, 0, 2);
}

/* y (M, N) = [residual +] [gelu]([layer norm] (x (M, K)) @ w (N, K)^T [* scales] + bias), GELU in
   its tanh form if activation is 2, none if it is 0 */
#define LINEAR(NAME, T, FROM, LOAD, WIDE)                                                         \
    DOTS(NAME##_dots, T, FROM, LOAD)                                                              \
    void NAME(const struct call *call) {                                                          \
        const float *x = call->pointers[0];                                                       \
        const T *w = call->pointers[1];                                                           \
        const float *scales = call->pointers[2], *bias = call->pointers[3];                       \
        const float *norm_weight = call->pointers[4], *norm_bias = call->pointers[5];             \
        const float *residual = call->pointers[6];                                                \
        float *y = call->pointers[7];                                                             \
        int M = call->sizes[0], N = call->sizes[1], K = call->sizes[2];                           \
        int activation = call->sizes[3];                                                          \
        float *normed = NULL;                                                                     \
        if (norm_weight) { /* by every thread for itself, which is sooner than waiting for one */ \
            normed = malloc(sizeof(float) * M * K);                                               \
            for (int m = 0; m < M; m++)                                                           \
                layer_norm(x + (int64_t)m * K, norm_weight, norm_bias, normed + (int64_t)m * K,   \
                           K);                                                                    \
            x = normed;                                                                           \
        }                                                                                         \
        _Pragma("omp for schedule(static) nowait")                                                \
        for (int n = 0; n < N; n += LANES) {                                                      \
            int count = N - n < LANES ? N - n : LANES;                                            \
            for (int first = 0; first < M; first += GROUP) {                                      \
                const float *xs[GROUP];                                                           \
                for (int r = 0; r < GROUP; r++)                                                   \
                    xs[r] = x + (int64_t)(first + r < M ? first + r : first) * K;                 \
                floats sums[GROUP * LANES];                                                       \
                float rest[GROUP * LANES];                                                        \
                if (count < LANES) {                                                              \
                    memset(sums, 0, sizeof sums);                                                 \
                    memset(rest, 0, sizeof rest);                                                 \
                }                                                                                 \
                for (int i = 0, wide; i < count; i += wide) {                                     \
                    const T *row = w + (int64_t)(n + i) * K;                                      \
                    wide = M > 1 && i + WIDE <= count ? WIDE : 1;                                 \
                    if (M > 1 && first == 0 && n + i + LANES + wide <= N)                         \
                        to_level_2(row + (int64_t)LANES * K, sizeof(T) * wide * K);               \
                    if (M == 1) NAME##_dots(row, xs, sums + i, rest + i, 1, 1, K);                \
                    else if (wide < WIDE) NAME##_dots(row, xs, sums + i, rest + i, 1, GROUP, K);  \
                    else if (M == 2) NAME##_dots(row, xs, sums + i, rest + i, WIDE, 2, K);        \
                    else NAME##_dots(row, xs, sums + i, rest + i, WIDE, GROUP, K);                \
                }                                                                                 \
                for (int m = first; m < M && m < first + GROUP; m++) {                            \
                    int at = (m - first) * LANES;                                                 \
                    int64_t to = (int64_t)m * N + n;                                              \
                    floats out = totals(sums + at) + load_f32(rest + at);                         \
                    if (scales) out *= some(scales + n, count);                                   \
                    if (bias) out += some(bias + n, count);                                       \
                    if (activation) out = gelu(out, activation == 2);                             \
                    if (residual) out += some(residual + to, count);                              \
                    memcpy(y + to, &out, sizeof(float) * count);                                  \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        free(normed);                                                                             \
    }

/* qkv (R, 3 H D): k and v of row r go to positions[r] of the cache (B, H, S, D) of its text, which
   R / B rows share, and q attends to all up to there -> y (R, H D) */
#define ATTEND(NAME, T, FROM, TO, LOAD)                                                           \
    void NAME(const struct call *call) {                                                          \
        const float *qkv = call->pointers[0];                                                     \
        T *keys = call->pointers[1], *values = call->pointers[2];                                 \
        const int32_t *positions = call->pointers[3];                                             \
        float *y = call->pointers[4];                                                             \
        int R = call->sizes[0], B = call->sizes[1], H = call->sizes[2];                           \
        int S = call->sizes[3], D = call->sizes[4];                                               \
        _Pragma("omp for schedule(static)")                                                       \
        for (int rh = 0; rh < R * H; rh++) { /* before any row of a text reads those before it */ \
            int r = rh / H, h = rh % H;                                                           \
            const float *k = qkv + ((int64_t)r * 3 * H + H + h) * D, *v = k + H * D;              \
            int64_t at = (((int64_t)r / (R / B) * H + h) * S + positions[r]) * D;                 \
            for (int d = 0; d < D; d++) {                                                         \
                keys[at + d] = TO(k[d]);                                                          \
                values[at + d] = TO(v[d]);                                                        \
            }                                                                                     \
        }                                                                                         \
        _Pragma("omp for schedule(static) nowait")                                                \
        for (int rh = 0; rh < R * H; rh++) {                                                      \
            int r = rh / H, h = rh % H, length = positions[r] + 1;                                \
            int whole = (length + LANES - 1) / LANES * LANES;                                     \
            const float *q = qkv + ((int64_t)r * 3 * H + h) * D;                                  \
            int64_t cache = ((int64_t)r / (R / B) * H + h) * S * D;                               \
            float *p = malloc(sizeof(float) * whole);                                             \
            float all = NAME##_probabilities(q, keys + cache, p, length, whole, D);               \
            NAME##_mean(p, values + cache, y + (int64_t)rh * D, all, length, D);                  \
            free(p);                                                                              \
        }                                                                                         \
    }

/* p[t] = exp(q . keys[t] / sqrt(D) - the largest), 0 past length; returns their sum */
#define PROBABILITIES(NAME, T, FROM, LOAD)                                                        \
    static float NAME(const float *q, const T *keys, float *p, int length, int whole, int D) {    \
        float scale = 1 / sqrtf(D), top = -INFINITY, all = 0;                                     \
        for (int t = 0; t < whole; t += LANES) {                                                  \
            floats products[LANES] = {0}, rest = {0};                                             \
            for (int i = 0; i < LANES && t + i < length; i++) {                                   \
                const T *k = keys + (int64_t)(t + i) * D;                                         \
                int d = 0;                                                                        \
                for (; d + LANES <= D; d += LANES) products[i] += load_f32(q + d) * LOAD(k + d);  \
                for (; d < D; d++) rest[i] += q[d] * FROM(k[d]);                                  \
            }                                                                                     \
            *(floats *)(p + t) = (totals(products) + rest) * scale;                               \
        }                                                                                         \
        _Pragma("omp simd reduction(max : top)")                                                  \
        for (int t = 0; t < length; t++) top = p[t] > top ? p[t] : top;                           \
        for (int t = length; t < whole; t++) p[t] = -INFINITY;                                    \
        for (int t = 0; t < whole; t += LANES) *(floats *)(p + t) = exp_(load_f32(p + t) - top);  \
        _Pragma("omp simd reduction(+ : all)")                                                    \
        for (int t = 0; t < length; t++) all += p[t];                                             \
        return all;                                                                               \
    }

/* y (D,) = sum of p[t] * values[t] / all: four or one vectors of y at a time */
#define MEAN(NAME, T, FROM, LOAD)                                                                 \
    static inline __attribute__((always_inline)) int NAME##_of(                                   \
        const float *p, const T *values, float *y, float all, int length, int d, int D,           \
        int width) {                                                                              \
        for (; d + width * LANES <= D; d += width * LANES) {                                      \
            floats sums[4] = {0};                                                                 \
            for (int t = 0; t < length; t++) {                                                    \
                const T *v = values + (int64_t)t * D + d;                                         \
                _Pragma("GCC unroll 4")                                                           \
                for (int j = 0; j < width; j++) sums[j] += p[t] * LOAD(v + j * LANES);            \
            }                                                                                     \
            for (int j = 0; j < width; j++) *(floats *)(y + d + j * LANES) = sums[j] / all;       \
        }                                                                                         \
        return d;                                                                                 \
    }                                                                                             \
    static void NAME(const float *p, const T *values, float *y, float all, int length, int D) {   \
        int d = NAME##_of(p, values, y, all, length, 0, D, 4);                                    \
        d = NAME##_of(p, values, y, all, length, d, D, 1);                                        \
        for (; d < D; d++) {                                                                      \
            float sum = 0;                                                                        \
            for (int t = 0; t < length; t++) sum += p[t] * FROM(values[(int64_t)t * D + d]);      \
            y[d] = sum / all;                                                                     \
        }                                                                                         \
    }

#define ATTENTION(NAME, T, FROM, TO, LOAD)                                                        \
    PROBABILITIES(NAME##_probabilities, T, FROM, LOAD)                                            \
    MEAN(NAME##_mean, T, FROM, LOAD)                                                              \
    ATTEND(NAME, T, FROM, TO, LOAD)

EMBED(embed_float32, float, from_f32)
EMBED(embed_bfloat16, uint16_t, from_bf16)
LINEAR(linear_float32, float, from_f32, load_f32, 1) /* GCC would keep no second row in registers */
LINEAR(linear_bfloat16, uint16_t, from_bf16, load_bf16, PAIR)
LINEAR(linear_int8, int8_t, from_int8, load_int8, PAIR)
ATTENTION(attend_float32, float, from_f32, to_f32, load_f32)
ATTENTION(attend_bfloat16, uint16_t, from_bf16, to_bf16, load_bf16)
