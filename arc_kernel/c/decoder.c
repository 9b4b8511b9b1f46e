/* A layer of the Llama family, forward and backward, from the functions of the other files: `fused_layer.py` says what it computes, in the
   same order. Rows are tokens, those of one sequence after the other. */

#include "kernels.h"

#include <string.h>

enum { QKV, O, GATE_UP, DOWN };

/* What is kept of a layer from forward to backward; `low` what each group's LoRA made of its input. */
typedef struct {
    bfloat16 *normed[2], *qkv, *turned, *attended, *both, *low[4];
    float *inverse[2], *levels;
} Kept;

/* What is not: what a norm or SwiGLU gives, hidden states between; and gradients. */
typedef struct {
    bfloat16 *read, *active, *between, *to_low, *to_active, *to_both, *to_rows, *to_between, *to_q, *to_k, *to_v, *to_qkv;
} Scratch;

/* Room for so many numbers a row from `at` bytes on, which move on. */
static void *take(char *memory, long *at, long rows, long numbers, long bytes)
{
    void *room = memory ? memory + *at : NULL;
    *at += (rows * numbers * bytes + 63) / 64 * 64;
    return room;
}
#define NUMBERS(many) take(memory, at, rows, many, sizeof(bfloat16))

static Kept kept_in(char *memory, long *at, const DecoderLayer *l, long batch, long tokens)
{
    long rows = batch * tokens, hidden = l->groups[QKV]->inputs, padded = (tokens + SIDE - 1) / SIDE * SIDE;
    Kept k;
    for (int i = 0; i < 2; i++) k.normed[i] = NUMBERS(hidden), k.inverse[i] = take(memory, at, rows, 1, sizeof(float));
    for (int i = 0; i < 4; i++) k.low[i] = NUMBERS(l->groups[i]->ranks);
    k.qkv = NUMBERS(l->groups[QKV]->outputs), k.both = NUMBERS(l->groups[GATE_UP]->outputs);
    k.turned = NUMBERS((l->heads + l->keys) * l->width), k.attended = NUMBERS(l->heads * l->width);
    k.levels = take(memory, at, batch * padded, l->heads, sizeof(float));
    return k;
}

static Scratch scratch_in(char *memory, long *at, const DecoderLayer *l, long batch, long tokens)
{
    long rows = batch * tokens, hidden = l->groups[QKV]->inputs, inner = l->groups[DOWN]->inputs, ranks = 0;
    for (int i = 0; i < 4; i++) ranks = ranks > l->groups[i]->ranks ? ranks : l->groups[i]->ranks;
    Scratch s = {.read = NUMBERS(hidden), .active = NUMBERS(inner), .between = NUMBERS(hidden), .to_low = NUMBERS(ranks)};
    s.to_active = NUMBERS(inner), s.to_both = NUMBERS(2 * inner), s.to_between = NUMBERS(hidden);
    s.to_rows = NUMBERS(hidden > l->heads * l->width ? hidden : l->heads * l->width);
    s.to_q = NUMBERS(l->heads * l->width), s.to_k = NUMBERS(l->keys * l->width);
    s.to_v = NUMBERS(l->keys * l->width), s.to_qkv = NUMBERS(l->groups[QKV]->outputs);
    return s;
}

/* Bytes of what is kept of a layer, and of what is not. */
long kept_bytes(const DecoderLayer *l, long batch, long tokens)
{
    long at = 0;
    return kept_in(NULL, &at, l, batch, tokens), at;
}
long scratch_bytes(const DecoderLayer *l, long batch, long tokens)
{
    long at = 0;
    return scratch_in(NULL, &at, l, batch, tokens), at;
}

/* Where only `many` rows are wanted after attention (in ascending order; all, where that is negative), they are put together ... */
static void pick(bfloat16 *to, const bfloat16 *from, const int64_t *wanted, long many, long width)
{
    for (long i = 0; i < many; i++) memmove(to + i * width, from + wanted[i] * width, width * sizeof *to);
}

/* ... and, in the same memory, back where they were. */
static void spread(bfloat16 *rows, const int64_t *wanted, long many, long width)
{
    for (long i = many - 1; i >= 0; i--) memmove(rows + wanted[i] * width, rows + i * width, width * sizeof *rows);
}
static void clear_others(bfloat16 *rows, const int64_t *wanted, long many, long width, long all)
{
    for (long row = 0, i = 0; row < all; row++) {
        if (i < many && wanted[i] == row) i++;
        else memset(rows + row * width, 0, width * sizeof *rows);
    }
}

/* Heads that lie one after the other in rows of so many numbers. */
static Heads heads_of(bfloat16 *data, long tokens, long far, long width) { return (Heads){data, tokens * far, width, far}; }

/* out [rows, hidden] from hidden states; cos and sin [batch or 1, tokens, width]. Where rows are wanted, out is [many, hidden]. 1 without
   memory, else 0, like the next. */
int layer_forward(const DecoderLayer *l, char *kept, char *scratch, const bfloat16 *hidden, bfloat16 *out, const bfloat16 *cos,
                  const bfloat16 *sin, int shared, long batch, long tokens, const int64_t *wanted, long many, int threads)
{
    long at = 0, from = 0, rows = batch * tokens, width = l->width, turned = (l->heads + l->keys) * width;
    long size = l->groups[QKV]->inputs, far = l->groups[QKV]->outputs, inner = l->groups[DOWN]->inputs;
    const Kept k = kept_in(kept, &at, l, batch, tokens);
    const Scratch s = scratch_in(scratch, &from, l, batch, tokens);
    const Heads q = heads_of(k.turned, tokens, turned, width), keys = heads_of(k.turned + l->heads * width, tokens, turned, width);
    const Heads v = heads_of(k.qkv + turned, tokens, far, width), made = heads_of(k.attended, tokens, l->heads * width, width);
    const Shape shape = {batch, l->heads, l->keys, tokens, width};
#define FORWARD(i, x, y, residual) frozen_forward(x, l->groups[i], l->there + i, k.low[i], y, residual, rows, threads)
    norm(hidden, l->norms[0], l->eps[0], k.normed[0], k.inverse[0], s.read, rows, size, threads);
    if (FORWARD(QKV, s.read, k.qkv, NULL)) return 1;
    rotate(k.qkv, tokens * far, far, cos, sin, shared, k.turned, batch, tokens, l->heads + l->keys, width, threads);
    if (attention_forward(&q, &keys, &v, &made, k.levels, &shape, l->scaling, 0, threads)) return 1;
    if (many >= 0) {
        pick(k.attended, k.attended, wanted, many, l->heads * width);
        pick(s.to_rows, hidden, wanted, many, size);
        hidden = s.to_rows, rows = many;
    }
    if (FORWARD(O, k.attended, s.between, hidden)) return 1;
    norm(s.between, l->norms[1], l->eps[1], k.normed[1], k.inverse[1], s.read, rows, size, threads);
    if (FORWARD(GATE_UP, s.read, k.both, NULL)) return 1;
    swiglu(k.both, s.active, rows, inner, threads);
    return FORWARD(DOWN, s.active, out, s.between);
}

/* `grad` [rows, hidden], that to the layer's output (where rows are wanted, in the first of it), becomes that to its input; of the `first`
   layer that is not needed. Gradients to the LoRA's weights are added to their sums. */
int layer_backward(const DecoderLayer *l, char *kept, char *scratch, bfloat16 *grad, int first, const bfloat16 *cos, const bfloat16 *sin,
                   int shared, long batch, long tokens, const int64_t *wanted, long many, int threads)
{
    long at = 0, from = 0, all = batch * tokens, rows = many < 0 ? all : many, width = l->width, turned = (l->heads + l->keys) * width;
    long size = l->groups[QKV]->inputs, far = l->groups[QKV]->outputs, inner = l->groups[DOWN]->inputs;
    const Kept k = kept_in(kept, &at, l, batch, tokens);
    const Scratch s = scratch_in(scratch, &from, l, batch, tokens);
    const Heads q = heads_of(k.turned, tokens, turned, width), keys = heads_of(k.turned + l->heads * width, tokens, turned, width);
    const Heads v = heads_of(k.qkv + turned, tokens, far, width), made = heads_of(k.attended, tokens, l->heads * width, width);
    const Heads of_made = heads_of(s.to_rows, tokens, l->heads * width, width), of_q = heads_of(s.to_q, tokens, l->heads * width, width);
    const Heads of_k = heads_of(s.to_k, tokens, l->keys * width, width), of_v = heads_of(s.to_v, tokens, l->keys * width, width);
    const Shape shape = {batch, l->heads, l->keys, tokens, width};
#define BACK(i, y, to_x) frozen_to_input(y, l->groups[i], l->back + i, s.to_low, to_x, rows, threads)
#define MASTERS(i, y, x, factor) lora_to_masters(y, s.to_low, x, factor, k.low[i], l->groups[i], rows, threads)
    if (BACK(DOWN, grad, s.to_active)) return 1;
    swiglu_back(s.to_active, k.both, s.to_both, s.active, rows, inner, threads);
    if (MASTERS(DOWN, grad, s.active, NULL)) return 1;
    if (BACK(GATE_UP, s.to_both, s.to_rows) || MASTERS(GATE_UP, s.to_both, k.normed[1], l->norms[1])) return 1;
    norm_back(s.to_rows, k.normed[1], k.inverse[1], l->norms[1], grad, s.to_between, rows, size, threads);
    if (BACK(O, s.to_between, s.to_rows) || MASTERS(O, s.to_between, k.attended, NULL)) return 1;
    if (many >= 0) {
        spread(k.attended, wanted, many, l->heads * width); /* between them is what does not matter: its gradient is zero */
        spread(s.to_rows, wanted, many, l->heads * width), clear_others(s.to_rows, wanted, many, l->heads * width, all);
        spread(s.to_between, wanted, many, size), clear_others(s.to_between, wanted, many, size, all);
        rows = all;
    }
    if (attention_backward(&q, &keys, &v, &made, &of_made, k.levels, &of_q, &of_k, &of_v, &shape, l->scaling, threads)) return 1;
    rotate_back(s.to_q, s.to_k, s.to_v, cos, sin, shared, s.to_qkv, batch, tokens, l->heads, l->keys, width, threads);
    if (first ? lora_to_input(s.to_qkv, l->groups[QKV], s.to_low, NULL, rows, threads) : BACK(QKV, s.to_qkv, s.to_rows)) return 1;
    if (MASTERS(QKV, s.to_qkv, k.normed[0], l->norms[0])) return 1;
    if (!first) norm_back(s.to_rows, k.normed[0], k.inverse[0], l->norms[0], s.to_between, grad, rows, size, threads);
    return 0;
}
