// Linear layers of few rows, out = x @ weight.T + bias + other, bound by the memory that the weights come from.
//
// Weights [count, width] are stored as blocks of LANES outputs, [blocks, width, LANES], so that each thread reads one
// straight stream. An output is the sum of its even and its odd columns, each in order, however many rows there are:
// a row gets the same bits alone and among others.

#include "vectors.h"

#define MOST 6 // rows at once: two sums of each, in registers; more was slower where there are 32 registers too
#define AHEAD 64 // columns to prefetch: the processor's own prefetching stops at each page
#define WORTH 65536 // multiplications from which on a second thread pays

int lanes(void) { return LANES; }

INLINE void block(
    const int rows, const float *x, long width, const float *weight, const float *bias, const float *other, float *out,
    long count, long used)
{
    vector even[MOST], odd[MOST];
    for (int row = 0; row < rows; row++)
        even[row] = odd[row] = (vector){0};
    long column = 0;
    for (; column + 1 < width; column += 2) {
        const float *place = weight + column * LANES;
        vector first = *(const vector *)place, second = *(const vector *)(place + LANES);
        __builtin_prefetch(place + AHEAD * LANES);
        __builtin_prefetch(place + (AHEAD + 1) * LANES);
        for (int row = 0; row < rows; row++) {
            even[row] += first * x[row * width + column];
            odd[row] += second * x[row * width + column + 1];
        }
    }
    if (column < width)
        for (int row = 0; row < rows; row++)
            even[row] += *(const vector *)(weight + column * LANES) * x[row * width + column];
    for (int row = 0; row < rows; row++) {
        vector sum = even[row] + odd[row];
        for (int lane = 0; lane < LANES; lane++)
            if (lane < used)
                out[row * count + lane] = sum[lane] + (bias ? bias[lane] : 0) + (other ? other[row * count + lane] : 0);
    }
}

// One function for each number of rows, so that the compiler keeps all sums of each in registers.
#define OF(n) static __attribute__((noinline)) void block_of_##n( \
    const float *x, long width, const float *weight, const float *bias, const float *other, float *out, long count, \
    long used) { block(n, x, width, weight, bias, other, out, count, used); }
OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
static void (*const block_of[])(
    const float *, long, const float *, const float *, const float *, float *, long, long) = {
    block_of_1, block_of_2, block_of_3, block_of_4, block_of_5, block_of_6};

// x [rows, width], bias [count] or NULL, other [rows, count] or NULL, out [rows, count].
void linear(
    const float *x, long rows, long width, const float *weight, long count, const float *bias, const float *other,
    float *out, int threads)
{
    long blocks = (count + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width * count > WORTH)
    for (long at = 0; at < blocks; at++) {
        long start = at * LANES, used = count - start < LANES ? count - start : LANES;
        for (long row = 0; row < rows; row += MOST) {
            long now = rows - row < MOST ? rows - row : MOST;
            block_of[now - 1](
                x + row * width, width, weight + start * width, bias ? bias + start : NULL,
                other ? other + row * count + start : NULL, out + row * count + start, count, used);
        }
    }
}
