/* What a LoRA adds to a group of linear layers that read the same input, forward and backward; `lora_linear.py` says what each computes.
   bfloat16 in memory, float32 between. */

#include "packed.h"

enum { PANEL = 2 * MOST * LANES, AT_ONCE = 1024 }; /* columns and rows that are packed at a time for gradients */

/* h [rows, ranks] = x a' * scale; y [rows, outputs] += h b', layer by layer, and `residual` [rows, outputs] where there is one. 1 without
   memory, else 0, like the next two. */
int lora_forward(const bfloat16 *x, const Group *g, bfloat16 *h, bfloat16 *y, const bfloat16 *residual, long rows, int threads)
{
    long far_a = span(g->inputs / 2), far_b = span(g->ranks / 2);
    uint32_t *a = room_for(g->ranks * far_a), *b = room_for(g->outputs * far_b);
    if (!a || !b) return free(a), free(b), 1;
    THREADS
    {
        pack_forward(g, a, b, far_a, far_b);
        SHARED
        for (long row = 0; row < rows; row += ROWS) {
            long many = least(ROWS, rows - row);
            low_forward(h + row * g->ranks, x + row * g->inputs, g, a, many);
            for (LAYERS) {
                const Left of_h = {(const uint32_t *)(h + row * g->ranks + l->ranks_before), g->ranks / 2, 1};
                long at = row * g->outputs + l->outputs_before;
                const More more = {NULL, residual ? residual + at : NULL};
                strip((To){y + at, NULL, g->outputs}, of_h, b + l->outputs_before * far_b, l->rank / 2, many, l->outputs, 1, more, 1);
            }
        }
    }
    free(a), free(b);
    return 0;
}

/* to_h [rows, ranks] = grad b * scale, layer by layer; to_x [rows, inputs], where it is there, += to_h a. */
int lora_to_input(const bfloat16 *grad, const Group *g, bfloat16 *to_h, bfloat16 *to_x, long rows, int threads)
{
    long far_a = span(g->ranks / 2), far_b = span(g->outputs / 2);
    uint32_t *a = room_for(g->inputs * far_a), *b = room_for(g->ranks * far_b);
    if (!a || !b) return free(a), free(b), 1;
    THREADS
    {
        pack_to_input(g, a, b, far_b);
        SHARED
        for (long row = 0; row < rows; row += ROWS) {
            long many = least(ROWS, rows - row);
            low_to_input(to_h + row * g->ranks, grad + row * g->outputs, g, b, far_b, many);
            if (!to_x) continue;
            const Left of_h = {(const uint32_t *)(to_h + row * g->ranks), g->ranks / 2, 1};
            strip((To){to_x + row * g->inputs, NULL, g->inputs}, of_h, a, g->ranks / 2, many, g->inputs, 1, (More){0}, 1);
        }
    }
    free(a), free(b);
    return 0;
}

/* of_a += to_h' x, times `factor` [inputs] where there is one; of_b += grad' h; layer by layer. So many rows, and columns of x and
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
                        strip(to, packed_row(panel, row, words), beside, words, ROWS, l->rank, 1, (More){0}, 1);
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
