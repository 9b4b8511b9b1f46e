/* What the functions of these files take, and the functions. Each is described where it stands. */

#ifndef KERNELS_H
#define KERNELS_H

#include "bfloat16.h"

enum { SIDE = 64 }; /* tokens in a block of attention */

typedef struct { bfloat16 *data; long batch, head, token; } Heads; /* how far the next is, in numbers; those of a head lie side by side */
typedef struct { long batch, heads, keys, tokens, width; } Shape;  /* heads is a multiple of keys, width of 16 and at most WIDEST */
typedef struct { /* a [rank, inputs], b [outputs, rank], and the sums of their gradients; ranks and outputs of the layers before it */
    const bfloat16 *a, *b;
    float *of_a, *of_b;
    long rank, outputs, ranks_before, outputs_before;
    float scale;
} Layer;
typedef struct { const Layer *layers; long many, inputs, outputs, ranks; } Group; /* sums of the layers' outputs and ranks */
/* A weight [columns, depth]: its numbers plus 128, four of a column to a word, packed with a span of depth / 4 made odd; each column's
   scale; what the left is multiplied with before it is rounded [depth], and what is added to the columns, or nothing. */
typedef struct { const uint32_t *words; const float *scales; const bfloat16 *factors, *bias; } Frozen;
typedef struct { /* groups and weights of q, k and v; attention's output; gate and up; down: forward and the gradient to their inputs */
    const Group *groups[4];
    Frozen there[4], back[4];
    const bfloat16 *norms[2]; /* before attention and after it */
    float eps[2], scaling;
    long heads, keys, width;
} DecoderLayer;

int attention_forward(const Heads *q, const Heads *k, const Heads *v, const Heads *out, float *levels, const Shape *s, float scaling,
                      long before, int threads);
int attention_backward(const Heads *q, const Heads *k, const Heads *v, const Heads *out, const Heads *grad, const float *levels, const Heads
                       *to_q, const Heads *to_k, const Heads *to_v, const Shape *s, float scaling, int threads);
void norm(const bfloat16 *x, const bfloat16 *weight, float eps, bfloat16 *normed, float *inverse, bfloat16 *scaled, long rows, long width,
          int threads);
void norm_back(const bfloat16 *grad, const bfloat16 *normed, const float *inverse, const bfloat16 *weight, const bfloat16 *beside, bfloat16
               *to, long rows, long width, int threads);
void rotate(const bfloat16 *x, long far_batch, long far, const bfloat16 *cos, const bfloat16 *sin, int shared, bfloat16 *to, long batch,
            long tokens, long heads, long width, int threads);
void rotate_back(const bfloat16 *q, const bfloat16 *k, const bfloat16 *v, const bfloat16 *cos, const bfloat16 *sin, int shared, bfloat16
                 *to, long batch, long tokens, long heads, long keys, long width, int threads);
void swiglu(const bfloat16 *both, bfloat16 *to, long rows, long width, int threads);
void swiglu_back(const bfloat16 *grad, const bfloat16 *both, bfloat16 *to_both, bfloat16 *product, long rows, long width, int threads);
int frozen_forward(const bfloat16 *x, const Group *g, const Frozen *w, bfloat16 *h, bfloat16 *y, const bfloat16 *residual, long rows, int
                   threads);
int frozen_to_input(const bfloat16 *grad, const Group *g, const Frozen *w, bfloat16 *to_h, bfloat16 *to_x, long rows, int threads);
int lora_forward(const bfloat16 *x, const Group *g, bfloat16 *h, bfloat16 *y, const bfloat16 *residual, long rows, int threads);
int lora_to_input(const bfloat16 *grad, const Group *g, bfloat16 *to_h, bfloat16 *to_x, long rows, int threads);
int lora_to_masters(const bfloat16 *grad, const bfloat16 *to_h, const bfloat16 *x, const bfloat16 *factor, const bfloat16 *h, const Group
                    *g, long rows, int threads);
long kept_bytes(const DecoderLayer *l, long batch, long tokens);
long scratch_bytes(const DecoderLayer *l, long batch, long tokens);
int layer_forward(const DecoderLayer *l, char *kept, char *scratch, const bfloat16 *hidden, bfloat16 *out, const bfloat16 *cos,
                  const bfloat16 *sin, int shared, long batch, long tokens, const int64_t *wanted, long many, int threads);
int layer_backward(const DecoderLayer *l, char *kept, char *scratch, bfloat16 *grad, int first, const bfloat16 *cos, const bfloat16 *sin,
                   int shared, long batch, long tokens, const int64_t *wanted, long many, int threads);

#endif
