/* Causal attention for CPUs, forward and backward: see native.py.

       S = scale q k^T, masked     P = softmax(S)      y = P v
       dv = P^T dy     dS = P (dy v^T - sum(dy y))     dq = scale dS k     dk = scale dS^T q

   A head belongs to one thread, which takes ROWS queries at a time against all keys up to the last of
   them. All products are made of one tile of registers; what they read is copied once per head into
   fp32 and the order of reading, padded with zeros to whole tiles. */

#include "vectors.h"

#ifdef __AVX512F__
enum { TILE = 8 }; /* rows of a tile, which is two vectors wide */
#else
enum { TILE = 4 };
#endif
enum { WIDE = 2 * LANES, ROWS = 32 };

static int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* c (TILE, WIDE) [+]= a (TILE, K) @ b (K, WIDE), a in any strides */
static inline void multiply_tile(const float *a, int64_t a_row, int64_t a_column, const float *b,
                                 float *c, int64_t c_row, int64_t K, int add) {
    floats sums[TILE][2] = {0};
    for (int64_t k = 0; k < K; k++) {
        floats left = *(floats *)(b + k * WIDE), right = *(floats *)(b + k * WIDE + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            float factor = a[i * a_row + k * a_column];
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++) { /* c comes last: to start from it would round as often as K */
        floats *to = (floats *)(c + i * c_row);
        if (add) sums[i][0] += to[0], sums[i][1] += to[1];
        to[0] = sums[i][0], to[1] = sums[i][1];
    }
}

/* c (M, N) [+]= a (M, K) @ b (K, N), b in panels of WIDE columns that are b_panel apart */
static void multiply(const float *a, int64_t a_row, int64_t a_column, const float *b,
                     int64_t b_panel, float *c, int64_t c_row, int64_t M, int64_t N, int64_t K,
                     int add) {
    for (int64_t n = 0; n < N; n += WIDE, b += b_panel)
        for (int64_t m = 0; m < M; m += TILE)
            multiply_tile(a + m * a_row, a_row, a_column, b, c + m * c_row + n, c_row, K, add);
}

/* x (M, N) in rows -> panels of WIDE columns, each (rows, WIDE) */
static void into_panels(const float *x, float *panels, int64_t M, int64_t N, int64_t rows) {
    for (int64_t n = 0; n < N; n += WIDE)
        for (int64_t m = 0; m < M; m++)
            memcpy(panels + n * rows + m * WIDE, x + m * N + n, WIDE * sizeof(float));
}

/* x (M, N) in rows -> the panels of its transpose: of WIDE rows, each (N, WIDE) */
static void into_transposed_panels(const float *x, float *panels, int64_t M, int64_t N) {
    for (int64_t m = 0; m < M; m += WIDE)
        for (int64_t n = 0; n < N; n++)
            for (int i = 0; i < WIDE; i++) panels[m * N + n * WIDE + i] = x[(m + i) * N + n];
}

/* The first `count` of a row of scores (padded) become probabilities, the others up to `end` 0.
   Without `lse` they are divided by their sum, whose logarithm is returned; else it is known. */
static float softmax(float *row, int64_t count, int64_t end, const float *lse) {
    for (int64_t i = count; i < end; i++) row[i] = -INFINITY;
    float top = lse ? *lse : -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < (lse ? 0 : count); i++) top = row[i] > top ? row[i] : top;
    floats sums = {0};
    for (int64_t i = 0; i < end; i += LANES) {
        floats *part = (floats *)(row + i);
        *part = exp_(*part - top);
        sums += *part;
    }
    if (lse) return *lse;
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    for (int64_t i = 0; i < end; i += LANES) *(floats *)(row + i) /= sum;
    return top + logf(sum);
}

#define ATTENTION(SUFFIX, T, FROM, TO)                                                            \
    /* count rows of x, row_stride apart -> fp32 (rows, Dp), times factor, padded with zeros */    \
    static void read_##SUFFIX(const T *x, int64_t row_stride, float *out, int64_t count,          \
                              int64_t rows, int64_t D, int64_t Dp, float factor) {                \
        memset(out, 0, sizeof(float) * rows * Dp);                                                \
        for (int64_t i = 0; i < count; i++)                                                       \
            for (int64_t d = 0; d < D; d++) out[i * Dp + d] = FROM(x[i * row_stride + d]) * factor;\
    }                                                                                             \
    static void write_##SUFFIX(const float *x, T *out, int64_t row_stride, int64_t count,         \
                               int64_t D, int64_t Dp, float factor) {                             \
        for (int64_t i = 0; i < count; i++)                                                       \
            for (int64_t d = 0; d < D; d++) out[i * row_stride + d] = TO(x[i * Dp + d] * factor); \
    }                                                                                             \
    /* qkv (B, S, 3 H D) -> y (B, S, H D), lse (B, H, S) */                                        \
    void attention_##SUFFIX(const T *qkv, T *y, float *lse, int B, int S, int H, int D,           \
                            int threads) {                                                        \
        int64_t C = (int64_t)H * D, Sp = whole(S, ROWS), Dp = whole(D, WIDE);                     \
        int64_t line = Sp + LANES; /* rows a power of two apart would share cache lines */         \
        float scale = 1 / sqrtf(D);                                                               \
        _Pragma("omp parallel num_threads(threads)") {                                            \
            float *memory = malloc(sizeof(float) * (3 * Sp * Dp + 2 * ROWS * Dp + ROWS * line));  \
            float *rows = memory, *k = rows + Sp * Dp, *v = k + Sp * Dp, *q = v + Sp * Dp;        \
            float *o = q + ROWS * Dp, *p = o + ROWS * Dp;                                         \
            _Pragma("omp for schedule(static)")                                                   \
            for (int64_t bh = 0; bh < (int64_t)B * H; bh++) {                                     \
                int64_t b = bh / H, h = bh % H;                                                   \
                const T *from = qkv + b * S * 3 * C + h * D;                                      \
                read_##SUFFIX(from + C, 3 * C, rows, S, Sp, D, Dp, 1);                            \
                into_transposed_panels(rows, k, Sp, Dp);                                          \
                read_##SUFFIX(from + 2 * C, 3 * C, rows, S, Sp, D, Dp, 1);                        \
                into_panels(rows, v, Sp, Dp, Sp);                                                 \
                for (int64_t s = 0; s < S; s += ROWS) {                                           \
                    int64_t count = S - s < ROWS ? S - s : ROWS, keys = s + ROWS;                 \
                    read_##SUFFIX(from + s * 3 * C, 3 * C, q, count, ROWS, D, Dp, scale);         \
                    multiply(q, Dp, 1, k, Dp * WIDE, p, line, ROWS, keys, D, 0);                  \
                    for (int i = 0; i < ROWS; i++) {                                              \
                        float sum = softmax(p + i * line, s + i + 1, keys, NULL);                 \
                        if (i < count) lse[bh * S + s + i] = sum;                                 \
                    }                                                                             \
                    multiply(p, line, 1, v, Sp * WIDE, o, Dp, ROWS, Dp, keys, 0);                 \
                    write_##SUFFIX(o, y + (b * S + s) * C + h * D, C, count, D, Dp, 1);           \
                }                                                                                 \
            }                                                                                     \
            free(memory);                                                                         \
        }                                                                                         \
    }                                                                                             \
    /* dy, y (B, S, H D), and what the forward read and wrote -> dqkv (B, S, 3 H D) */             \
    void attention_backward_##SUFFIX(const T *dy, const T *qkv, const T *y, const float *lse,     \
                                     T *dqkv, int B, int S, int H, int D, int threads) {          \
        int64_t C = (int64_t)H * D, Sp = whole(S, ROWS), Dp = whole(D, WIDE), line = Sp + LANES;  \
        float scale = 1 / sqrtf(D);                                                               \
        _Pragma("omp parallel num_threads(threads)") {                                            \
            float *memory = malloc(sizeof(float) * (6 * Sp * Dp + 5 * ROWS * Dp + 2 * ROWS * line));\
            float *rows = memory, *k = rows + Sp * Dp, *k_t = k + Sp * Dp, *v_t = k_t + Sp * Dp;  \
            float *dk = v_t + Sp * Dp, *dv = dk + Sp * Dp, *q = dv + Sp * Dp;                     \
            float *q_panels = q + ROWS * Dp, *d = q_panels + ROWS * Dp, *d_panels = d + ROWS * Dp;\
            float *dq = d_panels + ROWS * Dp, *p = dq + ROWS * Dp, *dp = p + ROWS * line;         \
            _Pragma("omp for schedule(static)")                                                   \
            for (int64_t bh = 0; bh < (int64_t)B * H; bh++) {                                     \
                int64_t b = bh / H, h = bh % H;                                                   \
                const T *from = qkv + b * S * 3 * C + h * D;                                      \
                T *to = dqkv + b * S * 3 * C + h * D;                                             \
                read_##SUFFIX(from + C, 3 * C, rows, S, Sp, D, Dp, 1);                            \
                into_panels(rows, k, Sp, Dp, Sp);                                                 \
                into_transposed_panels(rows, k_t, Sp, Dp);                                        \
                read_##SUFFIX(from + 2 * C, 3 * C, rows, S, Sp, D, Dp, 1);                        \
                into_transposed_panels(rows, v_t, Sp, Dp);                                        \
                memset(dk, 0, sizeof(float) * 2 * Sp * Dp);                                       \
                for (int64_t s = 0; s < S; s += ROWS) {                                           \
                    int64_t count = S - s < ROWS ? S - s : ROWS, keys = s + ROWS;                 \
                    const T *dy_rows = dy + (b * S + s) * C + h * D;                              \
                    const T *y_rows = y + (b * S + s) * C + h * D;                                \
                    read_##SUFFIX(from + s * 3 * C, 3 * C, q, count, ROWS, D, Dp, scale);         \
                    into_panels(q, q_panels, ROWS, Dp, ROWS);                                     \
                    read_##SUFFIX(dy_rows, C, d, count, ROWS, D, Dp, 1);                          \
                    into_panels(d, d_panels, ROWS, Dp, ROWS);                                     \
                    multiply(q, Dp, 1, k_t, Dp * WIDE, p, line, ROWS, keys, D, 0);                \
                    multiply(d, Dp, 1, v_t, Dp * WIDE, dp, line, ROWS, keys, D, 0);               \
                    for (int64_t i = 0; i < ROWS; i++) {                                          \
                        float *p_row = p + i * line, *dp_row = dp + i * line, delta = 0;          \
                        if (i >= count) {                                                         \
                            memset(p_row, 0, sizeof(float) * keys);                               \
                            memset(dp_row, 0, sizeof(float) * keys);                              \
                            continue;                                                             \
                        }                                                                         \
                        softmax(p_row, s + i + 1, keys, lse + bh * S + s + i);                    \
                        _Pragma("omp simd reduction(+ : delta)")                                  \
                        for (int64_t j = 0; j < D; j++)                                           \
                            delta += d[i * Dp + j] * FROM(y_rows[i * C + j]);                     \
                        for (int64_t j = 0; j < keys; j++) dp_row[j] = (dp_row[j] - delta) * p_row[j];\
                    }                                                                             \
                    multiply(p, 1, line, d_panels, ROWS * WIDE, dv, Dp, keys, Dp, ROWS, 1);       \
                    multiply(dp, 1, line, q_panels, ROWS * WIDE, dk, Dp, keys, Dp, ROWS, 1);      \
                    multiply(dp, line, 1, k, Sp * WIDE, dq, Dp, ROWS, Dp, keys, 0);               \
                    write_##SUFFIX(dq, to + s * 3 * C, 3 * C, count, D, Dp, scale);               \
                }                                                                                 \
                write_##SUFFIX(dk, to + C, 3 * C, S, D, Dp, 1);                                   \
                write_##SUFFIX(dv, to + 2 * C, 3 * C, S, D, Dp, 1);                               \
            }                                                                                     \
            free(memory);                                                                         \
        }                                                                                         \
    }

ATTENTION(float32, float, from_f32, to_f32)
ATTENTION(bfloat16, uint16_t, from_bf16, to_bf16)

/* x -> gelu(x), and its slope in place of x */
static void gelu_exact(float *x, float *y, int count) {
    for (int i = 0; i < count; i += LANES) {
        floats h = *(floats *)(x + i), below = exp_(h * h * -0.5f);
        floats cdf = normal_cdf(h, below);
        *(floats *)(y + i) = h * cdf;
        *(floats *)(x + i) = cdf + h * below * 0.398942280f;
    }
}

static void gelu_tanh(float *x, float *y, int count) {
    for (int i = 0; i < count; i += LANES) {
        floats h = *(floats *)(x + i), less, half = tanh_cdf(h, &less);
        *(floats *)(y + i) = h * half;
        *(floats *)(x + i) =
            half + h * (1.0f - less) * less * (1.59576912f + 0.214064449f * h * h);
    }
}

enum { CHUNK = 512 };

#define GELU(SUFFIX, T, FROM, TO)                                                                 \
    void gelu_##SUFFIX(T *x, T *y, int64_t count, int tanh, int threads) {                        \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                         \
        for (int64_t start = 0; start < count; start += CHUNK) {                                  \
            float in[CHUNK] = {0}, out[CHUNK];                                                    \
            int here = count - start < CHUNK ? count - start : CHUNK;                             \
            for (int i = 0; i < here; i++) in[i] = FROM(x[start + i]);                            \
            if (tanh) gelu_tanh(in, out, CHUNK); else gelu_exact(in, out, CHUNK);                 \
            for (int i = 0; i < here; i++) x[start + i] = TO(in[i]);                              \
            for (int i = 0; i < here; i++) y[start + i] = TO(out[i]);                             \
        }                                                                                         \
    }

GELU(float32, float, from_f32, to_f32)
GELU(bfloat16, uint16_t, from_bf16, to_bf16)
