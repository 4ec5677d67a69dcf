// Linear layers of few rows, out = x @ weight.T + bias + other, bound by the memory that the weights come from.
//
// Weights [count, width] are stored as blocks of LANES outputs, [blocks, width, LANES], so that each thread reads one
// straight stream; in bfloat16 where that loses nothing. An output is the sum of its even and its odd columns, each in order, however many rows there are:
// a row gets the same bits alone and among others.

#include "vectors.h"

#if REGISTERS > 16 // rows at once: two sums of each, in registers
#define MOST 10
#define EACH(of) of(1) of(2) of(3) of(4) of(5) of(6) of(7) of(8) of(9) of(10)
#else
#define MOST 6
#define EACH(of) of(1) of(2) of(3) of(4) of(5) of(6)
#endif
// Columns to prefetch, since the processor's own prefetching stops at each page. A few rows wait for the memory, and
// take the next columns into the first cache; with more, arithmetic and memory take as long as one another and run side
// by side only if columns come into the second cache well before their turn. Rows that take several turns at a block
// find it there at all but the first one, so each turn takes its share of the next block.
#define FEW 5 // of half the bytes half as many
#define NEAR 64
#define FAR 600
#define LINE 64 // bytes that come at once
#define WORTH 65536 // multiplications from which on a second thread pays

int lanes(void) { return LANES; }

// The weights of LANES outputs at a column.
INLINE vector weights_at(const int half, const void *weights, long column)
{
    if (half) // bfloat16 is the upper half of float32
        return (vector)(__builtin_convertvector(((const upper *)weights)[column], whole) << 16);
    return ((const vector *)weights)[column];
}

INLINE void block(
    const int rows, const int half, const float *x, long width, const void *weights, const float *bias,
    const float *other, float *out, long count, long used, const char *next, long share)
{
    const long size = LANES * (half ? sizeof(short) : sizeof(float));
    vector even[MOST], odd[MOST];
    for (int row = 0; row < rows; row++)
        even[row] = odd[row] = (vector){0};
    long column = 0;
    for (; column + 1 < width; column += 2) {
        vector first = weights_at(half, weights, column), second = weights_at(half, weights, column + 1);
        const char *place = (const char *)weights + column * size;
        if (next) {
            for (long at = 0; at < share; at += LINE)
                __builtin_prefetch(next + at, 0, 2);
            next += share;
        } else if (rows * (half ? 2 : 1) <= FEW) {
            __builtin_prefetch(place + NEAR * size);
            __builtin_prefetch(place + (NEAR + 1) * size);
        } else {
            __builtin_prefetch(place + FAR * size, 0, 2);
            __builtin_prefetch(place + (FAR + 1) * size, 0, 2);
        }
        for (int row = 0; row < rows; row++) {
            even[row] = fused(first, all(x[row * width + column]), even[row]);
            odd[row] = fused(second, all(x[row * width + column + 1]), odd[row]);
        }
    }
    if (column < width)
        for (int row = 0; row < rows; row++)
            even[row] = fused(weights_at(half, weights, column), all(x[row * width + column]), even[row]);
    for (int row = 0; row < rows; row++) {
        vector sum = even[row] + odd[row];
        for (int lane = 0; lane < LANES; lane++)
            if (lane < used)
                out[row * count + lane] = sum[lane] + (bias ? bias[lane] : 0) + (other ? other[row * count + lane] : 0);
    }
}

// One function for each number of rows, so that the compiler keeps all sums of each in registers.
#define ARGUMENTS const float *x, long width, const void *weights, const float *bias, const float *other, float *out, \
    long count, long used, const char *next, long share
#define OF(n) \
    static __attribute__((noinline)) void block_of_##n(ARGUMENTS) \
    { block(n, 0, x, width, weights, bias, other, out, count, used, next, share); } \
    static __attribute__((noinline)) void half_of_##n(ARGUMENTS) \
    { block(n, 1, x, width, weights, bias, other, out, count, used, next, share); }
EACH(OF)
#define NAMES(n) {block_of_##n, half_of_##n},
static void (*const block_of[][2])(ARGUMENTS) = {EACH(NAMES)};

// x [rows, width], bias [count] or NULL, other [rows, count] or NULL, out [rows, count]; half: weights in bfloat16.
void linear(
    const float *x, long rows, long width, const void *weights, int half, long count, const float *bias,
    const float *other, float *out, int threads)
{
    if (rows == 0)
        return;
    long blocks = (count + LANES - 1) / LANES, times = (rows + MOST - 1) / MOST, most = (rows + times - 1) / times;
    long column = LANES * (half ? sizeof(short) : sizeof(float)), share = 2 * column / times; // of two columns
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width * count > WORTH)
    for (long at = 0; at < blocks; at++) {
        long start = at * LANES, used = count - start < LANES ? count - start : LANES;
        const char *place = (const char *)weights + at * width * column, *next = times > 1 ? place + width * column : NULL;
        for (long row = 0; row < rows; row += most) {
            long now = rows - row < most ? rows - row : most;
            block_of[now - 1][half](
                x + row * width, width, place, bias ? bias + start : NULL,
                other ? other + row * count + start : NULL, out + row * count + start, count, used, next, share);
            if (next)
                next += width / 2 * share;
        }
    }
}
