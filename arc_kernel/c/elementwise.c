/* Norm, rotary and SwiGLU of a training pass as one reading and one writing each; `elementwise.py` says what each computes. bfloat16 in
   memory, rounded once. Widths are multiples of 16, rows lie one after the other where nothing else is said. */

#include "bfloat16.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

#define ROWS_IN_PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads)")

void norm(const bfloat16 *x, const bfloat16 *weight, float eps, bfloat16 *normed, float *inverse, bfloat16 *scaled, long rows, long width,
          int threads)
{
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        const bfloat16 *from = x + row * width;
        __m512 squares = one(0);
        for (long n = 0; n < width; n += LANES) squares = _mm512_fmadd_ps(read(from + n), read(from + n), squares);
        inverse[row] = 1 / sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
        for (long n = 0; n < width; n += LANES) {
            write(normed + row * width + n, _mm512_mul_ps(read(from + n), one(inverse[row])));
            write(scaled + row * width + n, _mm512_mul_ps(read(normed + row * width + n), read(weight + n)));
        }
    }
}

/* `beside` may be missing. */
void norm_back(const bfloat16 *grad, const bfloat16 *normed, const float *inverse, const bfloat16 *weight, const bfloat16 *beside,
               bfloat16 *to, long rows, long width, int threads)
{
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        const bfloat16 *of_row = grad + row * width, *seen = normed + row * width;
        __m512 sum = one(0);
        for (long n = 0; n < width; n += LANES)
            sum = _mm512_fmadd_ps(_mm512_mul_ps(read(of_row + n), read(weight + n)), read(seen + n), sum);
        __m512 along = one(_mm512_reduce_add_ps(sum) / width), over = one(inverse[row]);
        for (long n = 0; n < width; n += LANES) {
            __m512 wide = _mm512_fnmadd_ps(read(seen + n), along, _mm512_mul_ps(read(of_row + n), read(weight + n)));
            wide = beside ? _mm512_fmadd_ps(wide, over, read(beside + row * width + n)) : _mm512_mul_ps(wide, over);
            write(to + row * width + n, wide);
        }
    }
}

/* Heads of one token turned by its angles, forward (`way` 1) or back (-1): [heads, width], cos and sin [width]; width a multiple of 32. */
ALWAYS void turn(bfloat16 *to, const bfloat16 *from, const bfloat16 *cos, const bfloat16 *sin, long heads, long width, float way)
{
    long half = width / 2;
    for (long head = 0; head < heads; head++, to += width, from += width)
        for (long n = 0; n < half; n += LANES) {
            __m512 first = read(from + n), second = read(from + half + n);
            __m512 sin_first = read(sin + (way > 0 ? n : half + n)), sin_second = read(sin + (way > 0 ? half + n : n));
            __m512 moved = _mm512_mul_ps(second, _mm512_mul_ps(sin_first, one(way)));
            write(to + n, _mm512_fmsub_ps(first, read(cos + n), moved));
            moved = _mm512_mul_ps(first, _mm512_mul_ps(sin_second, one(way)));
            write(to + half + n, _mm512_fmadd_ps(second, read(cos + half + n), moved));
        }
}

/* x [batch, tokens, heads, width], `far` numbers from a token to the next; cos and sin [batch or 1, tokens, width]. */
void rotate(const bfloat16 *x, long far_batch, long far, const bfloat16 *cos, const bfloat16 *sin, int shared, bfloat16 *to, long batch,
            long tokens, long heads, long width, int threads)
{
    ROWS_IN_PARALLEL
    for (long row = 0; row < batch * tokens; row++) {
        long angle = (shared ? row % tokens : row) * width;
        turn(to + row * heads * width, x + row / tokens * far_batch + row % tokens * far, cos + angle, sin + angle, heads, width, 1);
    }
}

/* Gradients to q [batch, tokens, heads, width] and to k [.., keys, width] turned back, that to v as it is: [.., heads + 2 keys, width]. */
void rotate_back(const bfloat16 *q, const bfloat16 *k, const bfloat16 *v, const bfloat16 *cos, const bfloat16 *sin, int shared,
                 bfloat16 *to, long batch, long tokens, long heads, long keys, long width, int threads)
{
    ROWS_IN_PARALLEL
    for (long row = 0; row < batch * tokens; row++) {
        long angle = (shared ? row % tokens : row) * width;
        bfloat16 *of_row = to + row * (heads + 2 * keys) * width;
        turn(of_row, q + row * heads * width, cos + angle, sin + angle, heads, width, -1);
        turn(of_row + heads * width, k + row * keys * width, cos + angle, sin + angle, keys, width, -1);
        memcpy(of_row + (heads + keys) * width, v + row * keys * width, keys * width * sizeof *to);
    }
}

ALWAYS __m512 sigmoid(__m512 x) { return _mm512_div_ps(one(1), _mm512_add_ps(one(1), power_of_two(_mm512_mul_ps(x, one(-1.44269504f))))); }

/* both [rows, 2 width], gate before up. */
void swiglu(const bfloat16 *both, bfloat16 *to, long rows, long width, int threads)
{
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        const bfloat16 *gate = both + row * 2 * width, *up = gate + width;
        for (long n = 0; n < width; n += LANES) {
            __m512 wide = read(gate + n);
            write(to + row * width + n, _mm512_mul_ps(_mm512_mul_ps(wide, sigmoid(wide)), read(up + n)));
        }
    }
}

void swiglu_back(const bfloat16 *grad, const bfloat16 *both, bfloat16 *to_both, bfloat16 *product, long rows, long width, int threads)
{
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        const bfloat16 *gate = both + row * 2 * width, *up = gate + width;
        bfloat16 *to_gate = to_both + row * 2 * width, *to_up = to_gate + width;
        for (long n = 0; n < width; n += LANES) {
            __m512 wide = read(gate + n), of_up = read(up + n), of_product = read(grad + row * width + n), share = sigmoid(wide);
            __m512 active = _mm512_mul_ps(wide, share), slope = _mm512_fmadd_ps(active, _mm512_sub_ps(one(1), share), share);
            write(to_gate + n, _mm512_mul_ps(_mm512_mul_ps(of_product, of_up), slope));
            write(to_up + n, _mm512_mul_ps(of_product, active));
            write(product + row * width + n, _mm512_mul_ps(active, of_up));
        }
    }
}
