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

static inline float sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* Round n activations, a multiple of `group`, to codes of 16 bits; add up each group, too. */
static void round_activations(const float *x, int n, int group, int16_t *codes, float *scale,
                              float *total) {
    for (int g = 0; g < n / group; g++, x += group, codes += group) {
        float most = 0, all = 0;
        for (int k = 0; k < group; k++) {
            most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
            all += x[k];
        }
        float inverse = most > 0 ? TOP / most : 0;
        for (int k = 0; k < group; k++) codes[k] = (int16_t)lrintf(x[k] * inverse);
        scale[g] = most / TOP;
        total[g] = all;
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
#pragma omp parallel for schedule(static) num_threads(threads)
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

/* 16-bit floats as 32-bit floats. */
static inline void widen(const uint16_t *half, float *wide, int n) {
    int g = 0;
    for (; g + 8 <= n; g += 8)
        _mm256_storeu_ps(wide + g, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + g))));
    for (; g < n; g++) wide[g] = _cvtsh_ss(half[g]);
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

/* y = x @ (scale * codes + least).T, where each group has a scale and a least number. Of 32
   codes, byte i holds code i as its low half and code 16 + i as its high half. */
int int4_matmul(const float *x, const uint8_t *codes, const uint16_t *scale, const uint16_t *least,
                float *y, int m, int rows, int width, int groups, int threads) {
    int group = width / groups;
    int16_t *in = malloc((size_t)m * width * sizeof *in);
    float *step = malloc(2 * (size_t)m * groups * sizeof *step), *total = step + m * groups;
    if (!in || !step) return free(in), free(step), 0;
    round_activations(x, m * width, group, in, step, total);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int n = 0; n < rows; n++) {
        const uint8_t *row = codes + (size_t)n * width / 2;
        float scales[groups], leasts[groups], factor[groups];
        widen(scale + (size_t)n * groups, scales, groups);
        widen(least + (size_t)n * groups, leasts, groups);
        for (int i = 0; i < m; i++) {
            const int16_t *a = in + (size_t)i * width;
            const float *steps = step + (size_t)i * groups, *totals = total + (size_t)i * groups;
            float rest = 0;
            for (int g = 0; g < groups; g++) {
                factor[g] = scales[g] * steps[g];
                rest += leasts[g] * totals[g];
            }
            __m256 even = _mm256_setzero_ps(), odd = even;
            for (int g = 0; g < groups - 1; g += 2) {
                __m256 one = int4_group(row + g * group / 2, a + g * group, group);
                __m256 two = int4_group(row + (g + 1) * group / 2, a + (g + 1) * group, group);
                even = _mm256_fmadd_ps(one, _mm256_broadcast_ss(factor + g), even);
                odd = _mm256_fmadd_ps(two, _mm256_broadcast_ss(factor + g + 1), odd);
            }
            if (groups % 2) {
                int g = groups - 1;
                __m256 last = int4_group(row + g * group / 2, a + g * group, group);
                even = _mm256_fmadd_ps(last, _mm256_broadcast_ss(factor + g), even);
            }
            y[(size_t)i * rows + n] = sum(_mm256_add_ps(even, odd)) + rest;
        }
    }
    return free(in), free(step), 1;
}
