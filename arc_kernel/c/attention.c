/* Causal attention of a training pass, forward and the gradients to queries, keys and values; bfloat16 in and out, float32 between.

   By blocks of 64 queries and 64 keys, whose scores stay in the core's cache and are made again for the gradient (Dao et al. 2022,
   "FlashAttention"; Dao 2023, "FlashAttention-2"). Scores lie transposed, a key's for 64 queries in four registers: a softmax's largest and
   sum are then made without looking across a register, and products find what they read as pairs. Words are those of
   bfloat16.h. */

#include "bfloat16.h"
#include "kernels.h"

#include <math.h>
#include <omp.h>
#include <string.h>

enum { PAIRS = SIDE / 2, ROWS = 4, COLUMNS = SIDE / LANES, WIDEST = 256 }; /* ROWS x SIDE numbers are made at a time */
#define FAR -1e30f         /* a score of what is not seen */
#define LOG2_E 1.44269504f /* powers of two are faster than those of e */
#define ROUNDED (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) /* by itself: not made one with the sum that follows */
#define OWN __attribute__((aligned(64)))

ALWAYS bfloat16 *at(const Heads *x, long batch, long head, long token)
{
    return x->data + batch * x->batch + head * x->head + token * x->token;
}

ALWAYS long blocks_of(const Shape *s) { return (s->tokens + SIDE - 1) / SIDE; }
ALWAYS long rows_of(const Shape *s, long block) { return s->tokens < (block + 1) * SIDE ? s->tokens - block * SIDE : SIDE; }

/* Of 16 numbers each of two rows the words that hold both. */
ALWAYS __m512i paired(__m512 first, __m512 second)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* sums[m][n] += a[m] . b[n] over `words`; word k of a[m] is at a[m * am + k * ak], of 16 columns n at b[k * bk + 16 n]. */
ALWAYS void multiply(__m512 sums[ROWS][COLUMNS], int columns, const uint32_t *a, long am, long ak, const uint32_t *b, long bk, long words)
{
    for (long k = 0; k < words; k++) {
        __m512bh right[COLUMNS];
        EACH(n, columns) right[n] = (__m512bh)_mm512_loadu_si512(b + k * bk + n * LANES);
        EACH(m, ROWS) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(a[m * am + k * ak]);
            EACH(n, columns) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], left, right[n]);
        }
    }
}

ALWAYS void add_tile(float *to, long width, const float *factors, int columns, const uint32_t *a, long am, long ak, const uint32_t *b)
{
    __m512 sums[ROWS][COLUMNS];
    EACH(m, ROWS) EACH(n, columns) {
        sums[m][n] = _mm512_loadu_ps(to + m * width + n * LANES);
        if (factors) sums[m][n] = _mm512_mul_ps(sums[m][n], one(factors[m]));
    }
    multiply(sums, columns, a, am, ak, b, width, PAIRS);
    EACH(m, ROWS) EACH(n, columns) _mm512_storeu_ps(to + m * width + n * LANES, sums[m][n]);
}

/* to [64, width] = to * factors [64], where there are some, + a [64, 64] b [64, width]; b by words of two rows. */
ALWAYS void add_product(float *to, long width, const float *factors, const uint32_t *a, long am, long ak, const uint32_t *b)
{
    for (long row = 0; row < SIDE; row += ROWS) {
        float *rows = to + row * width;
        const float *of_rows = factors ? factors + row : NULL;
        long n = 0;
        for (; n + SIDE <= width; n += SIDE) add_tile(rows + n, width, of_rows, COLUMNS, a + row * am, am, ak, b + n);
        for (; n < width; n += LANES) add_tile(rows + n, width, of_rows, 1, a + row * am, am, ak, b + n);
    }
}

/* A block of a head's rows, zeros beyond the last: [64, width]. */
static void copy(bfloat16 *to, const Heads *x, const Shape *s, long batch, long head, long block)
{
    long rows = rows_of(s, block);
    for (long row = 0; row < rows; row++) memcpy(to + row * s->width, at(x, batch, head, block * SIDE + row), s->width * sizeof *to);
    memset(to + rows * s->width, 0, (SIDE - rows) * s->width * sizeof *to);
}

/* [64, width] by words of two rows: [32, width] words. */
static void pair_rows(uint32_t *to, const bfloat16 *from, long width)
{
    for (long row = 0; row < PAIRS; row++, to += width, from += 2 * width)
        for (long n = 0; n < width; n += LANES) _mm512_storeu_si512(to + n, words_of_rows(from + n, from + width + n));
}

/* [64, width] by words of two columns, turned: [width / 2, 64] words. */
static void pair_columns(uint32_t *to, const bfloat16 *from, long width)
{
    for (long k = 0; k < width / 2; k++)
        for (long row = 0; row < SIDE; row += LANES)
            _mm512_storeu_si512(to + k * SIDE + row, words_of_columns(from + row * width + 2 * k, width));
}

/* Which of 16 queries from `query` on do not see a key: those before it. */
ALWAYS __mmask16 blind(long key, long query) { return key <= query ? 0 : key - query >= LANES ? 0xffff : (1u << (key - query)) - 1; }

/* ROWS keys' scores for 64 queries: keys [ROWS, width], queries by `pair_columns`. */
ALWAYS void scores_of(__m512 made[ROWS][COLUMNS], const bfloat16 *keys, const uint32_t *queries, long width)
{
    EACH(m, ROWS) EACH(n, COLUMNS) made[m][n] = one(0);
    multiply(made, COLUMNS, (const uint32_t *)keys, width / 2, 1, queries, SIDE, width / 2);
}

/* One block of queries by words of two columns, the first of them query `first` of all tokens, over the keys and values of its head up to
   that of block `last`: sums [64, width] of the softmax
   times values, not yet over `total`, its sum of powers of two below the `largest` score; [64] both. */
static void attend(const uint32_t *queries, const bfloat16 *keys, const uint32_t *values, long first, long last, long width,
                   float scaling, float *sums, float *largest, float *total)
{
    float scores[SIDE * SIDE] OWN, shrunk[SIDE] OWN;
    uint32_t chances[PAIRS * SIDE] OWN;
    const __m512 unit = one(scaling * LOG2_E);
    memset(sums, 0, SIDE * width * sizeof *sums);
    for (long n = 0; n < SIDE; n++) largest[n] = FAR, total[n] = 0;
    for (long j = 0; j <= last; j++, keys += SIDE * width, values += PAIRS * width) {
        const int open = (j + 1) * SIDE - 1 <= first; /* all see all of it */
        __m512 most[COLUMNS];
        EACH(n, COLUMNS) most[n] = _mm512_load_ps(largest + n * LANES);
        for (long row = 0; row < SIDE; row += ROWS) {
            __m512 made[ROWS][COLUMNS];
            scores_of(made, keys + row * width, queries, width);
            EACH(m, ROWS) EACH(n, COLUMNS) {
                __m512 score = _mm512_mul_round_ps(made[m][n], unit, ROUNDED);
                if (!open) score = _mm512_mask_mov_ps(score, blind(j * SIDE + row + m, first + n * LANES), one(FAR));
                most[n] = _mm512_max_ps(most[n], score);
                _mm512_store_ps(scores + (row + m) * SIDE + n * LANES, score);
            }
        }
        EACH(n, COLUMNS) {
            __m512 factor = power_of_two(_mm512_sub_ps(_mm512_load_ps(largest + n * LANES), most[n]));
            __m512 sum = _mm512_mul_ps(_mm512_load_ps(total + n * LANES), factor);
            for (long row = 0; row < PAIRS; row++) {
                const float *score = scores + 2 * row * SIDE + n * LANES;
                __m512 first = power_of_two(_mm512_sub_ps(_mm512_load_ps(score), most[n]));
                __m512 second = power_of_two(_mm512_sub_ps(_mm512_load_ps(score + SIDE), most[n]));
                sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
                _mm512_store_si512(chances + row * SIDE + n * LANES, paired(first, second));
            }
            _mm512_store_ps(shrunk + n * LANES, factor);
            _mm512_store_ps(total + n * LANES, sum);
            _mm512_store_ps(largest + n * LANES, most[n]);
        }
        add_product(sums, width, shrunk, chances, 1, SIDE, values);
    }
}

/* out = softmax(q k' scaling) v, with `before` keys and values before those of the first query. `levels` [batch, heads, 64 * blocks]: the
   logarithm to base 2 of each softmax's sum. 1 without memory, else 0. */
int attention_forward(const Heads *q, const Heads *k, const Heads *v, const Heads *out, float *levels, const Shape *s, float scaling,
                      long before, int threads)
{
    const Shape all = {s->batch, s->heads, s->keys, before + s->tokens, s->width};
    long blocks = blocks_of(s), seen = blocks_of(&all), side = SIDE * s->width, shared = s->heads / s->keys, heads = s->batch * s->heads;
    bfloat16 *keys = room(s->batch * s->keys * seen * side * sizeof *keys);
    uint32_t *values = room(s->batch * s->keys * seen * side / 2 * sizeof *values);
    if (!keys || !values) return free(keys), free(values), 1;
#pragma omp parallel num_threads(threads)
    {
        bfloat16 rows[SIDE * WIDEST] OWN;
        uint32_t queries[PAIRS * WIDEST] OWN;
        float sums[SIDE * WIDEST] OWN, largest[SIDE] OWN, total[SIDE] OWN;
#pragma omp for schedule(static)
        for (long i = 0; i < s->batch * s->keys * seen; i++) {
            long group = i / seen, block = i % seen;
            copy(keys + i * side, k, &all, group / s->keys, group % s->keys, block);
            copy(rows, v, &all, group / s->keys, group % s->keys, block);
            pair_rows(values + i * side / 2, rows, s->width);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < heads * blocks; i++) { /* the longest first */
            long block = blocks - 1 - i / heads, b = i % heads / s->heads, h = i % s->heads, group = b * s->keys + h / shared;
            copy(rows, q, s, b, h, block);
            pair_columns(queries, rows, s->width);
            long first = before + block * SIDE, last = (first + rows_of(s, block) - 1) / SIDE;
            attend(queries, keys + group * seen * side, values + group * seen * side / 2, first, last, s->width, scaling, sums, largest,
                   total);
            for (long row = 0; row < SIDE; row++) levels[(i % heads * blocks + block) * SIDE + row] = largest[row] + log2f(total[row]);
            for (long row = 0; row < rows_of(s, block); row++)
                for (long n = 0; n < s->width; n += LANES)
                    write(at(out, b, h, block * SIDE + row) + n, _mm512_div_ps(_mm512_load_ps(sums + row * s->width + n), one(total[row])));
        }
    }
    free(keys), free(values);
    return 0;
}

/* What the gradient needs of a block of queries: q and the gradient to out by words of two columns and of two rows, [width / 2, 64] or
   [32, width]; `levels` of `attention_forward`, and `along`, that gradient times out, [64] both. */
typedef struct { const uint32_t *columns, *rows, *grad_columns, *grad_rows; const float *levels, *along; } Queries;

/* Of a block of keys and values [64, width], keys also by words of two rows, and one of queries: what they add to the gradients to queries,
   keys (both before `scaling`) and values, [64, width] each. `own`: it is the same block of tokens. */
static void add_gradients(const Queries *q, const bfloat16 *keys, const uint32_t *key_rows, const bfloat16 *values, long width, int own,
                          float scaling, float *to_queries, float *to_keys, float *to_values)
{
    bfloat16 chances[SIDE * SIDE] OWN, of_scores[SIDE * SIDE] OWN;
    uint32_t of_scores_rows[PAIRS * SIDE] OWN;
    const __m512 unit = one(scaling * LOG2_E);
    for (long row = 0; row < SIDE; row += ROWS) {
        __m512 made[ROWS][COLUMNS];
        float chance[ROWS * SIDE] OWN;
        scores_of(made, keys + row * width, q->columns, width);
        EACH(m, ROWS) EACH(n, COLUMNS) {
            __m512 score = _mm512_mul_round_ps(made[m][n], unit, ROUNDED); /* as forward: of the largest the rounding tells */
            __m512 p = power_of_two(_mm512_sub_ps(score, _mm512_loadu_ps(q->levels + n * LANES)));
            if (own) p = _mm512_mask_mov_ps(p, blind(row + m, n * LANES), one(0));
            _mm512_store_ps(chance + m * SIDE + n * LANES, p);
            write(chances + (row + m) * SIDE + n * LANES, p);
        }
        scores_of(made, values + row * width, q->grad_columns, width);
        EACH(n, COLUMNS) {
            __m512 along = _mm512_loadu_ps(q->along + n * LANES);
            EACH(m, ROWS) {
                made[m][n] = _mm512_mul_ps(_mm512_sub_ps(made[m][n], along), _mm512_load_ps(chance + m * SIDE + n * LANES));
                write(of_scores + (row + m) * SIDE + n * LANES, made[m][n]);
            }
            EACH(m, ROWS / 2)
                _mm512_store_si512(of_scores_rows + (row / 2 + m) * SIDE + n * LANES, paired(made[2 * m][n], made[2 * m + 1][n]));
        }
    }
    add_product(to_values, width, NULL, (const uint32_t *)chances, PAIRS, 1, q->grad_rows);
    add_product(to_keys, width, NULL, (const uint32_t *)of_scores, PAIRS, 1, q->rows);
    add_product(to_queries, width, NULL, of_scores_rows, 1, SIDE, key_rows);
}

/* A block's rows from float32, times `factor`; [64, width]. */
static void write_block(const Heads *to, const Shape *s, long batch, long head, long block, const float *from, float factor)
{
    for (long row = 0; row < rows_of(s, block); row++)
        for (long n = 0; n < s->width; n += LANES)
            write(at(to, batch, head, block * SIDE + row) + n, _mm512_mul_ps(_mm512_load_ps(from + row * s->width + n), one(factor)));
}

/* The gradients to q, k and v from `grad`, that to out, with forward's `out` and `levels`. 1 without memory, else 0.

   Every thread takes as many pairs of blocks, as far as whole blocks of keys allow, in the order of key heads ("groups", each with the
   query heads that share it): what one adds to queries stays its own. Where a group is in several threads' hands, their parts are added. */
int attention_backward(const Heads *q, const Heads *k, const Heads *v, const Heads *out, const Heads *grad, const float *levels,
                       const Heads *to_q, const Heads *to_k, const Heads *to_v, const Shape *s, float scaling, int threads)
{
    long width = s->width, blocks = blocks_of(s), side = SIDE * width, shared = s->heads / s->keys, heads = s->batch * s->heads;
    long groups = s->batch * s->keys, pairs = blocks * (blocks + 1) / 2, part = shared * blocks * side;
    uint32_t *packed = room(heads * blocks * side * 2 * sizeof *packed); /* of each block what `Queries` points to */
    float *along = room(heads * blocks * SIDE * sizeof *along), *parts = room(threads * 2 * part * sizeof *parts);
    long *owners = room(threads * 2 * sizeof *owners); /* whose parts those are: a group, or -1 */
    if (!packed || !along || !parts || !owners) return free(packed), free(along), free(parts), free(owners), 1;
#pragma omp parallel num_threads(threads)
    {
        bfloat16 rows[SIDE * WIDEST] OWN, keys[SIDE * WIDEST] OWN, values[SIDE * WIDEST] OWN;
        uint32_t key_rows[PAIRS * WIDEST] OWN;
        float to_keys[SIDE * WIDEST] OWN, to_values[SIDE * WIDEST] OWN;
        int me = omp_get_thread_num(), team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (long i = 0; i < heads * blocks; i++) {
            long b = i / blocks / s->heads, h = i / blocks % s->heads, block = i % blocks;
            uint32_t *to = packed + i * side * 2;
            copy(rows, q, s, b, h, block);
            pair_columns(to, rows, width), pair_rows(to + side / 2, rows, width);
            copy(rows, grad, s, b, h, block);
            pair_columns(to + side, rows, width), pair_rows(to + side / 2 * 3, rows, width);
            memset(along + i * SIDE, 0, SIDE * sizeof *along);
            for (long row = 0; row < rows_of(s, block); row++) {
                __m512 sum = one(0);
                for (long n = 0; n < width; n += LANES)
                    sum = _mm512_fmadd_ps(read(at(out, b, h, block * SIDE + row) + n), read(rows + row * width + n), sum);
                along[i * SIDE + row] = _mm512_reduce_add_ps(sum);
            }
        }
        long first = groups * pairs * me / team, end = groups * pairs * (me + 1) / team, kept = 0;
        owners[me * 2] = owners[me * 2 + 1] = -1;
        for (long group = 0; group < groups; group++) {
            long b = group / s->keys, g = group % s->keys, done = 0;
            float *mine = parts + (me * 2 + kept) * part; /* a thread has a part of two groups at most, its first and its last */
            for (long j = 0, before = group * pairs; j < blocks; before += blocks - j, j++) {
                if (before < first || before >= end) continue;
                if (!done++) memset(mine, 0, part * sizeof *mine);
                copy(keys, k, s, b, g, j), copy(values, v, s, b, g, j);
                pair_rows(key_rows, keys, width);
                memset(to_keys, 0, side * sizeof *to_keys), memset(to_values, 0, side * sizeof *to_values);
                for (long h = 0; h < shared; h++)
                    for (long i = j; i < blocks; i++) {
                        long block = (b * s->heads + g * shared + h) * blocks + i;
                        const uint32_t *of = packed + block * side * 2;
                        Queries queries = {of, of + side / 2, of + side, of + side / 2 * 3, levels + block * SIDE, along + block * SIDE};
                        add_gradients(&queries, keys, key_rows, values, width, i == j, scaling, mine + (h * blocks + i) * side, to_keys,
                                      to_values);
                    }
                write_block(to_k, s, b, g, j, to_keys, scaling), write_block(to_v, s, b, g, j, to_values, 1);
            }
            if (done == blocks)
                for (long i = 0; i < shared * blocks; i++)
                    write_block(to_q, s, b, g * shared + i / blocks, i % blocks, mine + i * side, scaling);
            else if (done)
                owners[me * 2 + kept++] = group;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < groups * shared * blocks; i++) {
            long group = i / (shared * blocks), block = i % (shared * blocks), found = 0;
            for (long o = 0; o < team * 2; o++) {
                if (owners[o] != group) continue;
                const float *from = parts + o * part + block * side;
                for (long n = 0; n < side; n += LANES) {
                    __m512 sum = found ? _mm512_load_ps(to_keys + n) : one(0);
                    _mm512_store_ps(to_keys + n, _mm512_add_ps(sum, _mm512_load_ps(from + n)));
                }
                found = 1;
            }
            if (found) write_block(to_q, s, group / s->keys, group % s->keys * shared + block / blocks, block % blocks, to_keys, scaling);
        }
    }
    free(packed), free(along), free(parts), free(owners);
    return 0;
}
