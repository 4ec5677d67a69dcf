// Attention of few queries over cached keys and values, each head of which serves a group of query heads.
//
// Sums go over the keys in order, so that a query gets the same bits whatever hidden keys lie between those that it sees.

#include <float.h>
#include <stdlib.h>

#include "vectors.h"

#define MOST (REGISTERS > 16 ? 4 : 2) // queries at once, at most 4
#define SPAN 4 // vectors of a value at once: MOST * SPAN sums in registers

struct head {
    const float *query, *key, *value, *mask;
    float *out, *scores;
    long query_row, key_row, value_row, mask_row, out_row, keys, width, room;
    float scale;
};

INLINE void attend_rows(const int rows, const struct head *h)
{
    for (long key = 0; key < h->keys; key++) {
        vector sums[4];
        for (int row = 0; row < rows; row++)
            sums[row] = (vector){0};
        for (long at = 0; at < h->width; at += LANES) {
            vector part = load(h->key + key * h->key_row + at);
            for (int row = 0; row < rows; row++)
                sums[row] = fused(part, load(h->query + row * h->query_row + at), sums[row]);
        }
        for (int row = 0; row < rows; row++)
            h->scores[row * h->room + key] =
                total(sums[row]) * h->scale + (h->mask ? h->mask[row * h->mask_row + key] : 0);
    }
    float whole_of[4];
    for (int row = 0; row < rows; row++) {
        float *scores = h->scores + row * h->room;
        for (long key = h->keys; key < h->room; key++)
            scores[key] = -FLT_MAX;
        vector highest = load(scores);
        for (long key = LANES; key < h->room; key += LANES)
            highest = most(highest, load(scores + key));
        float top = highest[0];
        for (int lane = 1; lane < LANES; lane++)
            top = highest[lane] > top ? highest[lane] : top;
        for (long key = 0; key < h->room; key += LANES)
            store(scores + key, exponential(load(scores + key) - top));
        whole_of[row] = 0;
    }
    for (long key = 0; key < h->keys; key++)
        for (int row = 0; row < rows; row++)
            whole_of[row] += h->scores[row * h->room + key];
    for (long at = 0; at < h->width; at += SPAN * LANES) {
        vector sums[4][SPAN];
        int span = h->width - at < SPAN * LANES ? (h->width - at) / LANES : SPAN;
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < SPAN; part++)
                sums[row][part] = (vector){0};
        if (span == SPAN)
            for (long key = 0; key < h->keys; key++)
                for (int part = 0; part < SPAN; part++) {
                    vector value = load(h->value + key * h->value_row + at + part * LANES);
                    for (int row = 0; row < rows; row++)
                        sums[row][part] = fused(value, all(h->scores[row * h->room + key]), sums[row][part]);
                }
        else
            for (long key = 0; key < h->keys; key++)
                for (int part = 0; part < span; part++) {
                    vector value = load(h->value + key * h->value_row + at + part * LANES);
                    for (int row = 0; row < rows; row++)
                        sums[row][part] = fused(value, all(h->scores[row * h->room + key]), sums[row][part]);
                }
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < span; part++)
                store(h->out + row * h->out_row + at + part * LANES, sums[row][part] / whole_of[row]);
    }
}

#define OF(n) static __attribute__((noinline)) void attend_##n(const struct head *h) { attend_rows(n, h); }
OF(1) OF(2) OF(3) OF(4)
static void (*const attend_of[])(const struct head *) = {attend_1, attend_2, attend_3, attend_4};

// Keys from the last that any of the rows sees on are left out: a cache is as wide as the longest of its sequences.
static long seen(const float *mask, long mask_row, long rows, long keys)
{
    for (long key = keys; key > 0; key--)
        for (long row = 0; row < rows; row++)
            if (mask[row * mask_row + key - 1] > -FLT_MAX / 2)
                return key;
    return keys;
}

struct place { long sequence, head, row; }; // strides in elements

// query and out [sequences, heads, rows, width]; key, value [sequences, heads / group, keys, width]; mask
// [sequences, rows, keys] is added to the scores, or NULL. Width is a multiple of LANES.
void attend(
    const float *query, struct place of_query, const float *key, struct place of_key, const float *value,
    struct place of_value, const float *mask, struct place of_mask, float *out, struct place of_out, long sequences,
    long heads, long group, long rows, long keys, long width, float scale, int threads)
{
    long most_room = (keys + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scores = malloc(sizeof(float) * MOST * most_room);
#pragma omp for schedule(static)
        for (long both = 0; both < sequences * heads; both++) {
            long sequence = both / heads, at = both % heads;
            for (long row = 0; row < rows; row += MOST) {
                long now = rows - row < MOST ? rows - row : MOST;
                const float *hidden = mask ? mask + sequence * of_mask.sequence + row * of_mask.row : NULL;
                long used = hidden ? seen(hidden, of_mask.row, now, keys) : keys;
                struct head head = {
                    query + sequence * of_query.sequence + at * of_query.head + row * of_query.row,
                    key + sequence * of_key.sequence + at / group * of_key.head,
                    value + sequence * of_value.sequence + at / group * of_value.head, hidden,
                    out + sequence * of_out.sequence + at * of_out.head + row * of_out.row, scores,
                    of_query.row, of_key.row, of_value.row, of_mask.row, of_out.row, used, width,
                    (used + LANES - 1) / LANES * LANES, scale};
                attend_of[now - 1](&head);
            }
        }
        free(scores);
    }
}
