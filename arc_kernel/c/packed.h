/* What `lora.c` and `frozen.c` share: LoRA layers that read the same input, and products with what is packed. Numbers of inputs, outputs
   and ranks are multiples of 16.

   What is on a product's right lies in words (bfloat16.h) of two numbers that are multiplied one after the other, 16 columns side by side,
   [columns / 16, span, 16] words ("packed"); what is on its left as it is, or packed. A span is depth / 2 made odd, so that what is 16
   columns away does not fall on the same lines of the cache. */

#include "bfloat16.h"
#include "kernels.h"

#include <omp.h>

enum { ROWS = 8, MOST = 3 }; /* of a tile that is made at a time, MOST in 16 columns */

typedef struct { const uint32_t *words; long row, word; } Left; /* words of it: from a row to the next, from a pair to the next */
typedef struct { bfloat16 *made; float *sums; long far; } To;   /* rows that are made, or sums that are added to; from one to the next */
typedef struct { const bfloat16 *columns, *rest; } More;        /* times [columns], plus [.., columns]; either may be missing */

ALWAYS long span(long words) { return words | 1; }
ALWAYS uint32_t *room_for(long words) { return room(words * sizeof(uint32_t)); }
ALWAYS To to_from(To to, long at) { return (To){to.made ? to.made + at : NULL, to.sums ? to.sums + at : NULL, to.far}; }
ALWAYS More more_from(More more, long column, long at)
{
    return (More){more.columns ? more.columns + column : NULL, more.rest ? more.rest + at : NULL};
}

/* sums += left right. */
ALWAYS void multiply(__m512 sums[ROWS][MOST], Left left, const uint32_t *right, long words, int rows, int columns)
{
    for (long k = 0; k < words; k++) {
        __m512bh beside[MOST];
        EACH(n, columns) beside[n] = (__m512bh)_mm512_loadu_si512(right + (n * span(words) + k) * LANES);
        EACH(m, rows) {
            __m512bh word = (__m512bh)_mm512_set1_epi32(left.words[m * left.row + k * left.word]);
            EACH(n, columns) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], word, beside[n]);
        }
    }
}

/* to [rows, columns] = left right * factor, with `more`, and plus what was there where `add`. */
ALWAYS void tile(To to, Left left, const uint32_t *right, long words, int rows, int columns, float factor, More more, int add)
{
    __m512 sums[ROWS][MOST];
    EACH(m, rows) EACH(n, columns) sums[m][n] = one(0);
    multiply(sums, left, right, words, rows, columns);
    EACH(m, rows) EACH(n, columns) {
        long at = m * to.far + n * LANES;
        __m512 made = _mm512_mul_ps(sums[m][n], one(factor));
        if (more.columns) made = _mm512_mul_ps(made, read(more.columns + n * LANES));
        if (more.rest) made = _mm512_add_ps(made, read(more.rest + at));
        if (add) made = _mm512_add_ps(made, to.sums ? _mm512_loadu_ps(to.sums + at) : read(to.made + at));
        if (to.sums) _mm512_storeu_ps(to.sums + at, made);
        else write(to.made + at, made);
    }
}

/* The same for up to ROWS rows and any columns. */
ALWAYS void strip(To to, Left left, const uint32_t *right, long words, long rows, long columns, float factor, More more, int add)
{
    for (long n = 0, taken; n < columns; n += taken * LANES) {
        long open = (columns - n) / LANES;
        const uint32_t *beside = right + n * span(words);
        taken = open >= 3 && open != 4 ? 3 : open >= 2 ? 2 : 1;
        if (rows == ROWS && taken == 3) tile(to_from(to, n), left, beside, words, ROWS, 3, factor, more_from(more, n, n), add);
        else if (rows == ROWS && taken == 2) tile(to_from(to, n), left, beside, words, ROWS, 2, factor, more_from(more, n, n), add);
        else
            for (long i = 0; i < rows * taken; i++) { /* 16 numbers at a time */
                long m = i / taken, column = n + i % taken * LANES, at = m * to.far + column;
                const Left row = {left.words + m * left.row, left.row, left.word};
                tile(to_from(to, at), row, right + column * span(words), words, 1, 1, factor, more_from(more, column, at), add);
            }
    }
}

/* Rows 2 k and 2 k + 1 of x [rows, columns], one after the other after `far`, packed; zeros for one that is missing. */
ALWAYS void pack_pair(uint32_t *to, const bfloat16 *x, long far, long rows, long columns, long k)
{
    long far_columns = span((rows + 1) / 2);
    const bfloat16 *first = x + 2 * k * far;
    for (long n = 0; n < columns; n += LANES)
        _mm512_storeu_si512(to + n * far_columns + k * LANES, words_of_rows(first + n, 2 * k + 1 < rows ? first + far + n : NULL));
}

/* 16 rows of x [rows, depth], packed as the columns they are of its transpose. */
ALWAYS void pack_turned(uint32_t *to, const bfloat16 *x, long depth)
{
    for (long k = 0; k < depth / 2; k++) _mm512_storeu_si512(to + k * LANES, words_of_columns(x + 2 * k, depth));
}

/* A row of the left that is packed as a column, of so many words. */
ALWAYS Left packed_row(const uint32_t *packed, long row, long words)
{
    return (Left){packed + row / LANES * LANES * span(words) + row % LANES, 1, LANES};
}

#define THREADS _Pragma("omp parallel num_threads(threads)")
#define SHARED _Pragma("omp for schedule(static)")
#define SHARED_NO_WAIT _Pragma("omp for schedule(static) nowait")
#define LAYERS const Layer *l = g->layers; l < g->layers + g->many; l++
static long least(long a, long b) { return a < b ? a : b; }

/* Rows from `row` on are multiplied ROWS at a time: where those are too few, from which of `many`. */
ALWAYS long begin_of(long row, long many) { return many >= ROWS && row + ROWS > many ? many - ROWS : row; }

/* What of the layers is on the right forward: a [ranks] columns, `far_a` words from one to the next, and b, layer by layer, `far_b`. For
   all threads together. */
ALWAYS void pack_forward(const Group *g, uint32_t *a, uint32_t *b, long far_a, long far_b)
{
    for (LAYERS) {
        SHARED_NO_WAIT
        for (long n = 0; n < l->rank; n += LANES) pack_turned(a + (l->ranks_before + n) * far_a, l->a + n * g->inputs, g->inputs);
        SHARED_NO_WAIT
        for (long n = 0; n < l->outputs; n += LANES)
            pack_turned(b + l->outputs_before * far_b + n * span(l->rank / 2), l->b + n * l->rank, l->rank);
    }
#pragma omp barrier
}

/* And backward: a, all ranks one after the other, and b, layer by layer, `far_b`. */
ALWAYS void pack_to_input(const Group *g, uint32_t *a, uint32_t *b, long far_b)
{
    for (LAYERS) {
        SHARED_NO_WAIT
        for (long k = 0; k < l->outputs / 2; k++) pack_pair(b + l->ranks_before * far_b, l->b, l->rank, l->outputs, l->rank, k);
        SHARED_NO_WAIT
        for (long k = 0; k < l->rank / 2; k++) pack_pair(a + l->ranks_before / 2 * LANES, l->a, g->inputs, g->ranks, g->inputs, k);
    }
#pragma omp barrier
}

/* Up to ROWS rows of h [ranks] = x a' * scale, layers with the same scale at once, and of to_h [ranks] = grad b * scale. */
ALWAYS void low_forward(bfloat16 *h, const bfloat16 *x, const Group *g, const uint32_t *a, long rows)
{
    const Left of_x = {(const uint32_t *)x, g->inputs / 2, 1};
    const Layer *end = g->layers + g->many;
    for (const Layer *l = g->layers, *next; l < end; l = next) {
        long ranks = 0;
        for (next = l; next < end && next->scale == l->scale; next++) ranks += next->rank;
        const uint32_t *beside = a + l->ranks_before * span(g->inputs / 2);
        strip((To){h + l->ranks_before, NULL, g->ranks}, of_x, beside, g->inputs / 2, rows, ranks, l->scale, (More){0}, 0);
    }
}

ALWAYS void low_to_input(bfloat16 *to_h, const bfloat16 *grad, const Group *g, const uint32_t *b, long far_b, long rows)
{
    for (LAYERS) {
        const Left of_grad = {(const uint32_t *)(grad + l->outputs_before), g->outputs / 2, 1};
        const To low = {to_h + l->ranks_before, NULL, g->ranks};
        strip(low, of_grad, b + l->ranks_before * far_b, l->outputs / 2, rows, l->rank, l->scale, (More){0}, 0);
    }
}
