// Operations on each row by itself: RMS norm and gate.

#include <math.h>

#include "vectors.h"

// out = weight * x / sqrt(mean(x ** 2) + eps), x and out [rows, width], weight [width].
void rms_norm(const float *x, const float *weight, float eps, float *out, long rows, long width)
{
    for (long row = 0; row < rows; row++, x += width, out += width) {
        vector squares = {0};
        long at = 0;
        for (; at + LANES <= width; at += LANES) {
            vector part = load(x + at);
            squares += part * part;
        }
        float sum = total(squares);
        for (; at < width; at++)
            sum += x[at] * x[at];
        float scale = 1 / sqrtf(sum / width + eps);
        for (at = 0; at + LANES <= width; at += LANES)
            store(out + at, load(x + at) * scale * load(weight + at));
        for (; at < width; at++)
            out[at] = x[at] * scale * weight[at];
    }
}

// out = a / (1 + e ** -a) * b, of x = [a, b] [rows, 2 * width], out [rows, width]; width is a multiple of LANES.
void gate(const float *x, float *out, long rows, long width)
{
    for (long row = 0; row < rows; row++, x += 2 * width, out += width)
        for (long at = 0; at < width; at += LANES) {
            vector a = load(x + at);
            store(out + at, a / (exponential(-a) + 1.0f) * load(x + width + at));
        }
}
