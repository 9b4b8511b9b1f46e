/* Sixteen numbers at a time on a CPU with avx512_bf16: bfloat16 in memory, float32 in registers. */

#ifndef BFLOAT16_H
#define BFLOAT16_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define ALWAYS static inline __attribute__((always_inline))
#define EACH(i, many) _Pragma("GCC unroll 8") for (int i = 0; i < many; i++) /* in registers: `many` is known when it is compiled */
enum { LANES = 16 };

typedef uint16_t bfloat16; /* its bits */

ALWAYS void *room(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }
ALWAYS __m512 one(float x) { return _mm512_set1_ps(x); }

ALWAYS __m512 read(const bfloat16 *from)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}

ALWAYS void write(bfloat16 *to, __m512 x) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

/* The processor multiplies pairs of bfloat16: words of two numbers. Of 16 columns of two rows (the second may be missing: zeros) ... */
ALWAYS __m512i words_of_rows(const bfloat16 *first, const bfloat16 *second)
{
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)first)), high = _mm512_setzero_si512();
    if (second) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* ... and of 16 rows, `width` numbers from one to the next, the first two columns. */
ALWAYS __m512i words_of_columns(const bfloat16 *x, long width)
{
    const __m512i rows = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_i32gather_epi32(_mm512_mullo_epi32(rows, _mm512_set1_epi32(width / 2)), (const void *)x, 4);
}

/* 2 to the x, 0 below 2 to the -200; NaN stays. A series to the fifth power: ln(2)^n / n!, within 3e-6. */
ALWAYS __m512 power_of_two(__m512 x)
{
    x = _mm512_max_ps(one(-200.0f), x); /* in this order: where one is NaN, the second is given back */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_fmadd_ps(one(1.3333558e-3f), part, one(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, part, one(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, part, one(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, part, one(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, part, one(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

#endif
