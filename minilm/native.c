/* Activations times quantized weights, for few rows of activations (chapter 19).

   x: [m, width]   y: [m, rows]   all row by row; width and groups are multiples of 32.

   Codes are read once, in the order in which they lie, and multiplied as integers: 16 products of
   16-bit numbers take one instruction. For that, each group of activations is rounded to 16 bits
   with a scale of its own, an error of at most 1/65534 of the largest number in the group. The rows
   of weights are shared out among `threads` threads. */

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define TOP 32767.0f
#define SMALL 65536 /* products that one thread does sooner than two can be asked */

static inline float sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* Round n activations, a multiple of `group`, to codes of 16 bits; add up each group, too. */
static void round_activations(const float *x, int n, int group, int16_t *codes, float *scale,
                              float *total) {
    for (int g = 0; g < n / group; g++, x += group, codes += group) {
        float most = 0;
        int64_t all = 0;
        for (int k = 0; k < group; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
        float inverse = most > 0 ? TOP / most : 0;
        for (int k = 0; k < group; k++) {
            codes[k] = (int16_t)lrintf(x[k] * inverse);
            all += codes[k]; /* of what is multiplied, so that errors do not add up */
        }
        scale[g] = most / TOP;
        total[g] = all * scale[g];
    }
}

/* 32 int8 codes times as many activations, as eight sums. */
static inline __m256 int8_block(const int8_t *codes, const int16_t *x) {
    __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
    __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + 16)));
    low = _mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i *)x));
    high = _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i *)(x + 16)));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
}

/* y = x @ (scale * codes).T; each row has a scale, or all have one. */
int int8_matmul(const float *x, const int8_t *codes, const float *scale, float *y, int m, int rows,
                int width, int each, int threads) {
    int blocks = width / 32;
    int16_t *in = malloc((size_t)m * width * sizeof *in);
    float *step = malloc(2 * (size_t)m * blocks * sizeof *step), *unused = step + m * blocks;
    if (!in || !step) return free(in), free(step), 0;
    round_activations(x, m * width, 32, in, step, unused);
#pragma omp parallel for schedule(static) num_threads(threads) \
    if ((size_t)m * rows * width > SMALL)
    for (int n = 0; n < rows; n++) {
        const int8_t *row = codes + (size_t)n * width;
        for (int i = 0; i < m; i++) {
            const int16_t *a = in + (size_t)i * width;
            const float *steps = step + (size_t)i * blocks;
            __m256 even = _mm256_setzero_ps(), odd = even;
            for (int b = 0; b < blocks - 1; b += 2) {
                __m256 one = int8_block(row + 32 * b, a + 32 * b);
                __m256 two = int8_block(row + 32 * b + 32, a + 32 * b + 32);
                even = _mm256_fmadd_ps(one, _mm256_broadcast_ss(steps + b), even);
                odd = _mm256_fmadd_ps(two, _mm256_broadcast_ss(steps + b + 1), odd);
            }
            if (blocks % 2) {
                __m256 last = int8_block(row + width - 32, a + width - 32);
                even = _mm256_fmadd_ps(last, _mm256_broadcast_ss(steps + blocks - 1), even);
            }
            y[(size_t)i * rows + n] = scale[each ? n : 0] * sum(_mm256_add_ps(even, odd));
        }
    }
    return free(in), free(step), 1;
}

/* The int4 codes of a group times as many activations, as eight sums. */
static inline __m256 int4_group(const uint8_t *codes, const int16_t *x, int group) {
    const __m256i mask = _mm256_set1_epi16(15);
    __m256i part = _mm256_setzero_si256();
    for (int k = 0; k < group; k += 32, codes += 16, x += 32) {
        __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
        __m256i low = _mm256_and_si256(both, mask), high = _mm256_srli_epi16(both, 4);
        low = _mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i *)x));
        high = _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i *)(x + 16)));
        part = _mm256_add_epi32(part, _mm256_add_epi32(low, high));
    }
    return _mm256_cvtepi32_ps(part);
}

/* One row of int4 weights times one of activations. factor: [groups], of each group's sum. */
static inline float int4_row(const uint8_t *codes, const int16_t *x, const float *factor,
                             int groups, int group) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    int g = 0;
    for (; g + 1 < groups; g += 2, codes += group, x += 2 * group) {
        __m256 one = int4_group(codes, x, group);
        __m256 two = int4_group(codes + group / 2, x + group, group);
        even = _mm256_fmadd_ps(one, _mm256_broadcast_ss(factor + g), even);
        odd = _mm256_fmadd_ps(two, _mm256_broadcast_ss(factor + g + 1), odd);
    }
    if (g < groups)
        even = _mm256_fmadd_ps(int4_group(codes, x, group), _mm256_broadcast_ss(factor + g), even);
    return sum(_mm256_add_ps(even, odd));
}

/* Of n groups: factor = scale * step; returns the sum of least * total. */
static inline float int4_factors(const uint16_t *scale, const uint16_t *least, const float *step,
                                 const float *total, float *factor, int n) {
    __m256 rest = _mm256_setzero_ps();
    float last = 0;
    int g = 0;
    for (; g + 8 <= n; g += 8) {
        __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scale + g)));
        __m256 l = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(least + g)));
        _mm256_storeu_ps(factor + g, _mm256_mul_ps(s, _mm256_loadu_ps(step + g)));
        rest = _mm256_fmadd_ps(l, _mm256_loadu_ps(total + g), rest);
    }
    for (; g < n; g++) {
        factor[g] = _cvtsh_ss(scale[g]) * step[g];
        last += _cvtsh_ss(least[g]) * total[g];
    }
    return sum(rest) + last;
}

/* y = x @ (scale * codes + least).T, where each group has a scale and a least number. Of 32
   codes, byte i holds code i as its low half and code 16 + i as its high half. */
int int4_matmul(const float *x, const uint8_t *codes, const uint16_t *scale, const uint16_t *least,
                float *y, int m, int rows, int width, int groups, int threads) {
    int group = width / groups;
    int16_t *in = malloc((size_t)m * width * sizeof *in);
    float *step = malloc(2 * (size_t)m * groups * sizeof *step), *total = step + m * groups;
    if (!in || !step) return free(in), free(step), 0;
    round_activations(x, m * width, group, in, step, total);
#pragma omp parallel for schedule(static) num_threads(threads) \
    if ((size_t)m * rows * width > SMALL)
    for (int n = 0; n < rows; n++) {
        const uint8_t *row = codes + (size_t)n * width / 2;
        const uint16_t *s = scale + (size_t)n * groups, *l = least + (size_t)n * groups;
        float factor[groups];
        for (int i = 0; i < m; i++) {
            const int16_t *a = in + (size_t)i * width;
            float rest = int4_factors(s, l, step + i * groups, total + i * groups, factor, groups);
            float main = group == 32 ? int4_row(row, a, factor, groups, 32)
                                     : int4_row(row, a, factor, groups, group);
            y[(size_t)i * rows + n] = main + rest;
        }
    }
    return free(in), free(step), 1;
}
