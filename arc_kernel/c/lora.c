/* What a LoRA adds to a group of linear layers that read the same input, forward and backward; `lora_linear.py` says what each computes.
   bfloat16 in memory, float32 between. Numbers of inputs, outputs and ranks are multiples of 16.

   What is on a product's right lies in words (bfloat16.h) of two numbers that are multiplied one after the other, 16 columns side by side,
   [columns / 16, span, 16] words ("packed"); what is on its left as it is, or packed. A span is depth / 2 made odd, so that what is 16
   columns away does not fall on the same lines of the cache. */

#include "bfloat16.h"

#include <omp.h>

enum { ROWS = 8, MOST = 3 };                       /* of a tile that is made at a time, MOST in 16 columns */
enum { PANEL = 2 * MOST * LANES, AT_ONCE = 1024 }; /* columns and rows that are packed at a time for gradients */

typedef struct { /* a [rank, inputs], b [outputs, rank], and the sums of their gradients; ranks and outputs of the layers before it */
    const bfloat16 *a, *b;
    float *of_a, *of_b;
    long rank, outputs, ranks_before, outputs_before;
    float scale;
} Layer;
typedef struct { const Layer *layers; long many, inputs, outputs, ranks; } Group; /* sums of the layers' outputs and ranks */
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

/* to [rows, columns] = left right * factor, with `more`, and plus what was there where `add`. */
ALWAYS void tile(To to, Left left, const uint32_t *right, long words, int rows, int columns, float factor, More more, int add)
{
    __m512 sums[ROWS][MOST];
    EACH(m, rows) EACH(n, columns) sums[m][n] = one(0);
    for (long k = 0; k < words; k++) {
        __m512bh beside[MOST];
        EACH(n, columns) beside[n] = (__m512bh)_mm512_loadu_si512(right + (n * span(words) + k) * LANES);
        EACH(m, rows) {
            __m512bh word = (__m512bh)_mm512_set1_epi32(left.words[m * left.row + k * left.word]);
            EACH(n, columns) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], word, beside[n]);
        }
    }
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

/* h [rows, ranks] = x a'; y [rows, outputs] += h b' * scale, layer by layer, and `residual` [rows, outputs] where there is one. 1 without
   memory, else 0, like the next two. */
int lora_forward(const bfloat16 *x, const Group *g, bfloat16 *h, bfloat16 *y, const bfloat16 *residual, long rows, int threads)
{
    long far_a = span(g->inputs / 2), far_b = span(g->ranks / 2); /* the latter is the longest of the layers' */
    uint32_t *a = room_for(g->ranks * far_a), *b = room_for(g->outputs * far_b);
    if (!a || !b) return free(a), free(b), 1;
    THREADS
    {
        for (LAYERS) {
            SHARED_NO_WAIT
            for (long n = 0; n < l->rank; n += LANES) pack_turned(a + (l->ranks_before + n) * far_a, l->a + n * g->inputs, g->inputs);
            SHARED_NO_WAIT
            for (long n = 0; n < l->outputs; n += LANES)
                pack_turned(b + l->outputs_before * far_b + n * span(l->rank / 2), l->b + n * l->rank, l->rank);
        }
#pragma omp barrier
        SHARED
        for (long row = 0; row < rows; row += ROWS) {
            long many = least(ROWS, rows - row);
            const Left of_x = {(const uint32_t *)(x + row * g->inputs), g->inputs / 2, 1};
            strip((To){h + row * g->ranks, NULL, g->ranks}, of_x, a, g->inputs / 2, many, g->ranks, 1, (More){0}, 0);
            for (LAYERS) {
                const Left of_h = {(const uint32_t *)(h + row * g->ranks + l->ranks_before), g->ranks / 2, 1};
                long at = row * g->outputs + l->outputs_before;
                const More more = {NULL, residual ? residual + at : NULL};
                const uint32_t *beside = b + l->outputs_before * far_b;
                strip((To){y + at, NULL, g->outputs}, of_h, beside, l->rank / 2, many, l->outputs, l->scale, more, 1);
            }
        }
    }
    free(a), free(b);
    return 0;
}

/* to_h [rows, ranks] = grad b * scale, layer by layer; to_x [rows, inputs], where it is there, += to_h a. */
int lora_to_input(const bfloat16 *grad, const Group *g, bfloat16 *to_h, bfloat16 *to_x, long rows, int threads)
{
    long far_a = span(g->ranks / 2), far_b = span(g->outputs / 2); /* the latter is the longest of the layers' */
    uint32_t *a = room_for(g->inputs * far_a), *b = room_for(g->ranks * far_b);
    if (!a || !b) return free(a), free(b), 1;
    THREADS
    {
        for (LAYERS) {
            SHARED_NO_WAIT
            for (long k = 0; k < l->outputs / 2; k++) pack_pair(b + l->ranks_before * far_b, l->b, l->rank, l->outputs, l->rank, k);
            SHARED_NO_WAIT
            for (long k = 0; k < l->rank / 2; k++) pack_pair(a + l->ranks_before / 2 * LANES, l->a, g->inputs, g->ranks, g->inputs, k);
        }
#pragma omp barrier
        SHARED
        for (long row = 0; row < rows; row += ROWS) {
            long many = least(ROWS, rows - row);
            for (LAYERS) {
                const Left of_grad = {(const uint32_t *)(grad + row * g->outputs + l->outputs_before), g->outputs / 2, 1};
                const To low = {to_h + row * g->ranks + l->ranks_before, NULL, g->ranks};
                strip(low, of_grad, b + l->ranks_before * far_b, l->outputs / 2, many, l->rank, l->scale, (More){0}, 0);
            }
            if (!to_x) continue;
            const Left of_h = {(const uint32_t *)(to_h + row * g->ranks), g->ranks / 2, 1};
            strip((To){to_x + row * g->inputs, NULL, g->inputs}, of_h, a, g->ranks / 2, many, g->inputs, 1, (More){0}, 1);
        }
    }
    free(a), free(b);
    return 0;
}

/* of_a += to_h' x, times `factor` [inputs] where there is one; of_b += grad' h * scale; layer by layer. So many rows, and columns of x and
   grad, at a time that what is packed of them stays in a core's cache. */
int lora_to_masters(const bfloat16 *grad, const bfloat16 *to_h, const bfloat16 *x, const bfloat16 *factor, const bfloat16 *h,
                    const Group *g, long rows, int threads)
{
    const long far = span(AT_ONCE / 2);
    uint32_t *of_h = room_for(2 * g->ranks * far), *of_to_h = of_h + g->ranks * far, *panels = room_for(threads * PANEL * far);
    if (!of_h || !panels) return free(of_h), free(panels), 1;
    THREADS
    {
        uint32_t *panel = panels + omp_get_thread_num() * PANEL * far;
        for (long start = 0; start < rows; start += AT_ONCE) {
            long many = least(AT_ONCE, rows - start), words = (many + 1) / 2;
            SHARED
            for (long k = 0; k < words; k++) {
                pack_pair(of_h, h + start * g->ranks, g->ranks, many, g->ranks, k);
                pack_pair(of_to_h, to_h + start * g->ranks, g->ranks, many, g->ranks, k);
            }
            for (LAYERS) {
                SHARED_NO_WAIT
                for (long n = 0; n < l->outputs; n += PANEL) {
                    long columns = least(PANEL, l->outputs - n);
                    const bfloat16 *from = grad + start * g->outputs + l->outputs_before + n;
                    for (long k = 0; k < words; k++) pack_pair(panel, from, g->outputs, many, columns, k);
                    for (long row = 0; row < columns; row += ROWS) {
                        const To to = {NULL, l->of_b + (n + row) * l->rank, l->rank};
                        const uint32_t *beside = of_h + l->ranks_before * span(words);
                        strip(to, packed_row(panel, row, words), beside, words, ROWS, l->rank, l->scale, (More){0}, 1);
                    }
                }
            }
            SHARED
            for (long n = 0; n < g->inputs; n += PANEL) {
                long columns = least(PANEL, g->inputs - n);
                for (long k = 0; k < words; k++) pack_pair(panel, x + start * g->inputs + n, g->inputs, many, columns, k);
                for (LAYERS)
                    for (long row = 0; row < l->rank; row += ROWS) {
                        const To to = {NULL, l->of_a + row * g->inputs + n, g->inputs};
                        const More more = {factor ? factor + n : NULL, NULL};
                        strip(to, packed_row(of_to_h, l->ranks_before + row, words), panel, words, ROWS, columns, 1, more, 1);
                    }
            }
        }
    }
    free(of_h), free(panels);
    return 0;
}
