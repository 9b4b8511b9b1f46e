/* Linear layers that read the same input, with frozen weights in 8 bits and their LoRA, forward and the gradient to the input, as one
   product: what the LoRA adds is added where the other is in registers. What is multiplied with the weights is rounded row by row to 8 bits
   on the way (`int8.py`). Rows are taken CHUNK at a time, so that they stay in the core's cache while the weights pass by. */

#include "packed.h"

#include <string.h>

enum { CHUNK = 64 };

typedef struct { int8_t *numbers; float *scales; int32_t *starts; } Rounded; /* rows, each one's scale, and -128 times its sum */

ALWAYS __m512 scaled(const bfloat16 *x, const bfloat16 *factors, long n)
{
    return factors ? _mm512_mul_ps(read(x + n), read(factors + n)) : read(x + n);
}

/* A row in 8 bits; its scale is NaN where a number of it is: the largest is found by its bits, of which NaN has more than all others. */
static void round_row(Rounded to, long row, const bfloat16 *from, const bfloat16 *factors, long depth)
{
    __m512i bits = _mm512_setzero_si512(), sum = bits;
    for (long n = 0; n < depth; n += LANES) bits = _mm512_max_epi32(bits, _mm512_castps_si512(_mm512_abs_ps(scaled(from, factors, n))));
    int most = _mm512_reduce_max_epi32(bits);
    float largest;
    memcpy(&largest, &most, sizeof largest);
    const __m512 over = one(largest > 0 ? 127 / largest : 0);
    for (long n = 0; n < depth; n += LANES) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(scaled(from, factors, n), over));
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128((void *)(to.numbers + row * depth + n), _mm512_cvtsepi32_epi8(whole));
    }
    to.scales[row] = largest / 127, to.starts[row] = -128u * (uint32_t)_mm512_reduce_add_epi32(sum);
}

/* to [rows, columns] = x w' + bias + low right + rest. The processor multiplies numbers without a sign with such that have one: hence the
   128. Its instruction by itself, since gcc 12 moves the sums of its own function for it from register to register, at half the speed. */
ALWAYS void tile_in_8_bits(bfloat16 *to, long far, Rounded x, long depth, Frozen w, Left low, const uint32_t *right, long words,
                           const bfloat16 *rest, int rows, int columns)
{
    __m512i whole[ROWS][MOST];
    __m512 sums[ROWS][MOST];
    EACH(m, rows) EACH(n, columns) whole[m][n] = _mm512_set1_epi32(x.starts[m]);
    for (long k = 0; k < depth / 4; k++) {
        __m512i beside[MOST];
        EACH(n, columns) beside[n] = _mm512_loadu_si512(w.words + (n * span(depth / 4) + k) * LANES);
        EACH(m, rows) {
            __m512i word = _mm512_set1_epi32(((const int32_t *)x.numbers)[m * depth / 4 + k]);
            EACH(n, columns) __asm__("vpdpbusd %2, %1, %0" : "+v"(whole[m][n]) : "v"(beside[n]), "v"(word));
        }
    }
    EACH(n, columns) {
        const __m512 scales = _mm512_loadu_ps(w.scales + n * LANES), bias = w.bias ? read(w.bias + n * LANES) : one(0);
        EACH(m, rows) sums[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[m][n]), _mm512_mul_ps(one(x.scales[m]), scales), bias);
    }
    multiply(sums, low, right, words, rows, columns);
    EACH(m, rows) EACH(n, columns) {
        long at = m * far + n * LANES;
        write(to + at, rest ? _mm512_add_ps(sums[m][n], read(rest + at)) : sums[m][n]);
    }
}

ALWAYS Frozen columns_from(Frozen w, long n, long depth)
{
    return (Frozen){w.words + n * span(depth / 4), w.scales + n, w.factors, w.bias ? w.bias + n : NULL};
}

/* The same for `many` rows and any columns; where rows are no multiple of ROWS, the last ROWS once more. */
static void rows_in_8_bits(bfloat16 *to, long far, Rounded x, long depth, Frozen w, Left low, const uint32_t *right, long words,
                           const bfloat16 *rest, long many, long columns)
{
    for (long n = 0, taken; n < columns; n += taken * LANES) {
        taken = many < ROWS ? 1 : least(MOST, (columns - n) / LANES);
        const Frozen of_columns = columns_from(w, n, depth);
        for (long row = 0; row < many; row += many < ROWS ? 1 : ROWS) {
            long begin = begin_of(row, many), at = begin * far + n;
            const Rounded from = {x.numbers + begin * depth, x.scales + begin, x.starts + begin};
            const Left of_low = {low.words + begin * low.row, low.row, low.word};
#define TILE(rows, columns) \
    tile_in_8_bits(to + at, far, from, depth, of_columns, of_low, right + n * span(words), words, rest ? rest + at : NULL, rows, columns)
            if (many < ROWS) TILE(1, 1);
            else if (taken == 3) TILE(ROWS, 3);
            else if (taken == 2) TILE(ROWS, 2);
            else TILE(ROWS, 1);
        }
    }
}

/* Rows come in strips of ROWS, the last with those that are left over, and strips in chunks, as many for each thread. */
ALWAYS long chunks_of(long rows, int threads)
{
    long strips = rows / ROWS, turn = CHUNK / ROWS * threads, chunks = least(strips, (strips + turn - 1) / turn * threads);
    return chunks ? chunks : 1;
}
ALWAYS long start_of(long chunk, long chunks, long rows) { return chunk == chunks ? rows : rows / ROWS * chunk / chunks * ROWS; }

/* Memory for the rounded rows of each thread's chunk. */
enum { MANY = CHUNK + ROWS };
ALWAYS long bytes_of(long depth) { return MANY * (depth + 2 * sizeof(float)); }
ALWAYS Rounded rounded_in(char *memory, long depth)
{
    memory += omp_get_thread_num() * bytes_of(depth);
    return (Rounded){(int8_t *)memory + MANY * 2 * sizeof(float), (float *)memory, (int32_t *)memory + MANY};
}

/* h [rows, ranks] = x a' * scale and y [rows, outputs] = x w' + bias + h b', layer by layer, + residual [rows, outputs], where there is
   one. 1 without memory, else 0, like the next. */
int frozen_forward(const bfloat16 *x, const Group *g, const Frozen *w, bfloat16 *h, bfloat16 *y, const bfloat16 *residual, long rows,
                   int threads)
{
    long depth = g->inputs, far_a = span(depth / 2), far_b = span(g->ranks / 2), chunks = chunks_of(rows, threads);
    uint32_t *a = room_for(g->ranks * far_a), *b = room_for(g->outputs * far_b);
    char *memory = room(threads * bytes_of(depth));
    if (!a || !b || !memory) return free(a), free(b), free(memory), 1;
    THREADS
    {
        const Rounded eight = rounded_in(memory, depth);
        pack_forward(g, a, b, far_a, far_b);
        SHARED
        for (long chunk = 0; chunk < chunks; chunk++) {
            long start = start_of(chunk, chunks, rows), many = start_of(chunk + 1, chunks, rows) - start;
            for (long row = 0; row < many; row++) round_row(eight, row, x + (start + row) * depth, w->factors, depth);
            for (long row = 0; row < many; row += ROWS) {
                long at = start + begin_of(row, many);
                low_forward(h + at * g->ranks, x + at * depth, g, a, least(ROWS, many));
            }
            for (LAYERS) {
                const Left of_h = {(const uint32_t *)(h + start * g->ranks + l->ranks_before), g->ranks / 2, 1};
                long before = l->outputs_before, at = start * g->outputs + before;
                rows_in_8_bits(y + at, g->outputs, eight, depth, columns_from(*w, before, depth), of_h, b + before * far_b, l->rank / 2,
                               residual ? residual + at : NULL, many, l->outputs);
            }
        }
    }
    free(a), free(b), free(memory);
    return 0;
}

/* to_h [rows, ranks] = grad b * scale, layer by layer, and to_x [rows, inputs] = grad w' + to_h a; without layers the product alone. */
int frozen_to_input(const bfloat16 *grad, const Group *g, const Frozen *w, bfloat16 *to_h, bfloat16 *to_x, long rows, int threads)
{
    long depth = g->outputs, far_a = span(g->ranks / 2), far_b = span(depth / 2), chunks = chunks_of(rows, threads);
    uint32_t *a = room_for(g->inputs * far_a), *b = room_for(g->ranks * far_b);
    char *memory = room(threads * bytes_of(depth));
    if (!a || !b || !memory) return free(a), free(b), free(memory), 1;
    THREADS
    {
        const Rounded eight = rounded_in(memory, depth);
        pack_to_input(g, a, b, far_b);
        SHARED
        for (long chunk = 0; chunk < chunks; chunk++) {
            long start = start_of(chunk, chunks, rows), many = start_of(chunk + 1, chunks, rows) - start;
            for (long row = 0; row < many; row++) round_row(eight, row, grad + (start + row) * depth, w->factors, depth);
            for (long row = 0; row < many; row += ROWS) {
                long at = start + begin_of(row, many);
                low_to_input(to_h + at * g->ranks, grad + at * depth, g, b, far_b, least(ROWS, many));
            }
            const Left of_h = {(const uint32_t *)(to_h + start * g->ranks), g->ranks / 2, 1};
            rows_in_8_bits(to_x + start * g->inputs, g->inputs, eight, depth, *w, of_h, a, g->ranks / 2, NULL, many, g->inputs);
        }
    }
    free(a), free(b), free(memory);
    return 0;
}
