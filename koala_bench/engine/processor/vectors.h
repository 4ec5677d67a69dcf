// Vectors of the width that the processor has, and the exponential.
#pragma once
#if defined(__FMA__)
#include <immintrin.h>
#endif
#include <stddef.h>

#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX__)
#define LANES 8
#define REGISTERS 16
#else
#define LANES 4
#define REGISTERS 16
#endif

#ifndef __has_builtin // gcc before 10
#define __has_builtin(name) 0
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); // anywhere in memory
typedef int whole __attribute__((vector_size(4 * LANES)));
typedef unsigned short upper __attribute__((vector_size(2 * LANES))); // halves of as many numbers

INLINE vector load(const float *place) { return (vector)*(const loose *)place; }
INLINE void store(float *place, vector value) { *(loose *)place = (loose)value; }

INLINE vector all(float number) { return number - (vector){0}; }

// a * b + c, rounded once where the processor can. Compilers are told not to choose (-ffp-contract=off): they choose one
// way in one function and the other way in the next, and a row would not get the same bits in both.
INLINE vector fused(vector a, vector b, vector c)
{
#if defined(__FMA__) && LANES == 16
    return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && LANES == 8
    return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vector least(vector a, vector b)
{
    whole first = a < b;
    return (vector)((first & (whole)a) | (~first & (whole)b));
}

INLINE vector most(vector a, vector b) { return -least(-a, -b); }

// The sum of all lanes, the upper half added to the lower again and again.
INLINE float total(vector value)
{
#if __has_builtin(__builtin_shufflevector) && LANES == 8
    value += __builtin_shufflevector(value, value, 4, 5, 6, 7, 0, 1, 2, 3);
    value += __builtin_shufflevector(value, value, 2, 3, 0, 1, 2, 3, 0, 1);
    return value[0] + value[1];
#elif __has_builtin(__builtin_shufflevector) && LANES == 16
    value += __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    value += __builtin_shufflevector(value, value, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    value += __builtin_shufflevector(value, value, 2, 3, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1);
    return value[0] + value[1];
#else
    float sums[LANES];
    store(sums, value);
    for (int step = LANES / 2; step; step /= 2)
        for (int lane = 0; lane < step; lane++)
            sums[lane] += sums[lane + step];
    return sums[0];
#endif
}

// e ** x by halving the range (Cody and Waite) and the Taylor polynomial of degree 7; 0 below -87.
INLINE vector exponential(vector x)
{
    const float log2 = 1.44269504f, high = 0.693359375f, low = -2.12194440e-4f, magic = 12582912.0f; // 1.5 * 2 ** 23
    whole kept = x >= -87.0f;
    x = least(most(x, all(-87.0f)), all(88.0f));
    vector times = fused(x, all(log2), all(magic)) - magic;
    vector y = fused(times, all(-low), fused(times, all(-high), x));
    vector sum = fused(y, all(1.0f / 5040), all(1.0f / 720));
    sum = fused(sum, y, all(1.0f / 120));
    sum = fused(sum, y, all(1.0f / 24));
    sum = fused(sum, y, all(1.0f / 6));
    sum = fused(sum, y, all(0.5f));
    sum = fused(sum, y, all(1.0f));
    sum = fused(sum, y, all(1.0f));
    whole power = (__builtin_convertvector(times, whole) + 127) << 23;
    return (vector)((whole)(sum * (vector)power) & kept);
}
