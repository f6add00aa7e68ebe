// Batch norm with the residual sum and the ReLU that follow it: y = relu((z - mean) inverse w + b + residual).
//
// Values are (rows, channels), with one row per pixel of each image. A block processes CHANNELS channels of
// one part of the rows; each thread processes every LANES-th row of one channel. Sums over all rows are
// computed in two steps, within parts and then over parts, in an order that depends on the shape alone.

#include "grid.h"

typedef struct {
    size rows, channels;
    // Rows of a part; the last one may have fewer.
    size rows_of_part;
} Extent;

INSIDE size channel_of(unsigned thread) { return (size)block_x * CHANNELS + thread % CHANNELS; }
INSIDE size first_row(Extent e) { return (size)block_y * e.rows_of_part; }

INSIDE size end_row(Extent e) {
    size end = first_row(e) + e.rows_of_part;
    return end < e.rows ? end : e.rows;
}

// Mean and sum of squared deviations of each part, (parts, 2, channels). The first row is subtracted before
// squares are summed, so that a mean far from zero costs no digits.
KERNEL moments_of_parts(const number *z, float *parts, Extent e) {
    SHARED float sums[THREADS], squares[THREADS];
    EACH_THREAD {
        size channel = channel_of(thread);
        float sum = 0, square = 0;
        if (channel < e.channels) {
            float shift = wide(z[first_row(e) * e.channels + channel]);
            for (size row = first_row(e) + thread / CHANNELS; row < end_row(e); row += LANES) {
                float deviation = wide(z[row * e.channels + channel]) - shift;
                sum += deviation;
                square += deviation * deviation;
            }
        }
        sums[thread] = sum;
        squares[thread] = square;
    }
    EACH_THREAD {
        size channel = channel_of(thread);
        if (thread < CHANNELS && channel < e.channels) {
            float sum = 0, square = 0, count = (float)(end_row(e) - first_row(e));
            for (unsigned lane = 0; lane < LANES; lane++) {
                sum += sums[lane * CHANNELS + thread];
                square += squares[lane * CHANNELS + thread];
            }
            float centred = square - sum * sum / count;
            size at = (size)block_y * 2 * e.channels + channel;
            parts[at] = wide(z[first_row(e) * e.channels + channel]) + sum / count;
            parts[at + e.channels] = centred > 0 ? centred : 0;
        }
    }
}

// Joins a set of values with another, by count, mean and sum of squared deviations (Chan, Golub &
// LeVeque 1983, Eq. 2.1).
INSIDE void join(double *count, double *mean, double *square, double n, double m, double s) {
    double all = *count + n;
    if (n == 0) return;
    double difference = m - *mean;
    *mean += difference * n / all;
    *square += s + difference * difference * *count * n / all;
    *count = all;
}

// The moments of the whole batch, (4, channels): mean, 1 / sqrt(variance + epsilon), and the running mean and
// variance after it.
KERNEL moments(const float *parts, const float *running_mean, const float *running_variance,
               float *result, Extent e, float epsilon, float momentum) {
    SHARED double counts[THREADS], means[THREADS], squares[THREADS];
    EACH_THREAD {
        size channel = channel_of(thread);
        double count = 0, mean = 0, square = 0;
        if (channel < e.channels) {
            size part = thread / CHANNELS;
            for (; part * e.rows_of_part < e.rows; part += LANES) {
                size left = e.rows - part * e.rows_of_part;
                size at = part * 2 * e.channels + channel;
                join(&count, &mean, &square, (double)(left < e.rows_of_part ? left : e.rows_of_part),
                     parts[at], parts[at + e.channels]);
            }
        }
        counts[thread] = count;
        means[thread] = mean;
        squares[thread] = square;
    }
    EACH_THREAD {
        size channel = channel_of(thread);
        if (thread < CHANNELS && channel < e.channels) {
            double count = 0, mean = 0, square = 0;
            for (unsigned lane = 0; lane < LANES; lane++) {
                unsigned at = lane * CHANNELS + thread;
                join(&count, &mean, &square, counts[at], means[at], squares[at]);
            }
            float variance = (float)(square / count), unbiased = (float)(square / (count - 1));
            float before = running_mean[channel], before_variance = running_variance[channel];
            result[channel] = (float)mean;
            result[e.channels + channel] = 1 / sqrtf(variance + epsilon);
            result[2 * e.channels + channel] = before + momentum * ((float)mean - before);
            result[3 * e.channels + channel] = before_variance + momentum * (unbiased - before_variance);
        }
    }
}

// - residual: 0 if there is none.
KERNEL apply(const number *z, const number *residual, const float *mean, const float *inverse,
             const float *weight, const float *bias, number *y, Extent e, unsigned relu) {
    EACH_THREAD {
        size channel = channel_of(thread);
        if (channel < e.channels) {
            float centre = mean[channel], scale = weight[channel] * inverse[channel];
            float shift = bias[channel];
            for (size row = first_row(e) + thread / CHANNELS; row < end_row(e); row += LANES) {
                size at = row * e.channels + channel;
                float value = (wide(z[at]) - centre) * scale + shift;
                if (residual) value += wide(residual[at]);
                y[at] = narrow(relu && value < 0 ? 0 : value);
            }
        }
    }
}

// The gradient after the backward pass of a ReLU with output y; unchanged if there is none (y = 0).
INSIDE float passed(const number *gradient, const number *y, size at) {
    return !y || wide(y[at]) > 0 ? wide(gradient[at]) : 0;
}

// The sums of g and of g (z - mean) inverse of each part, (parts, 2, channels): its contributions to the
// gradients of bias and weight.
KERNEL gradients_of_parts(const number *gradient, const number *y, const number *z, const float *mean,
                          const float *inverse, float *parts, Extent e) {
    SHARED float sums[THREADS], products[THREADS];
    EACH_THREAD {
        size channel = channel_of(thread);
        float sum = 0, product = 0;
        if (channel < e.channels) {
            float centre = mean[channel], scale = inverse[channel];
            for (size row = first_row(e) + thread / CHANNELS; row < end_row(e); row += LANES) {
                size at = row * e.channels + channel;
                float g = passed(gradient, y, at);
                sum += g;
                product += g * ((wide(z[at]) - centre) * scale);
            }
        }
        sums[thread] = sum;
        products[thread] = product;
    }
    EACH_THREAD {
        size channel = channel_of(thread);
        if (thread < CHANNELS && channel < e.channels) {
            float sum = 0, product = 0;
            for (unsigned lane = 0; lane < LANES; lane++) {
                sum += sums[lane * CHANNELS + thread];
                product += products[lane * CHANNELS + thread];
            }
            size at = (size)block_y * 2 * e.channels + channel;
            parts[at] = sum;
            parts[at + e.channels] = product;
        }
    }
}

// The sum of all parts, (2, channels): the gradients of bias and weight.
KERNEL gradients(const float *parts, float *result, Extent e) {
    SHARED double sums[THREADS], products[THREADS];
    EACH_THREAD {
        size channel = channel_of(thread);
        double sum = 0, product = 0;
        if (channel < e.channels) {
            size part = thread / CHANNELS;
            for (; part * e.rows_of_part < e.rows; part += LANES) {
                size at = part * 2 * e.channels + channel;
                sum += parts[at];
                product += parts[at + e.channels];
            }
        }
        sums[thread] = sum;
        products[thread] = product;
    }
    EACH_THREAD {
        size channel = channel_of(thread);
        if (thread < CHANNELS && channel < e.channels) {
            double sum = 0, product = 0;
            for (unsigned lane = 0; lane < LANES; lane++) {
                sum += sums[lane * CHANNELS + thread];
                product += products[lane * CHANNELS + thread];
            }
            result[channel] = (float)sum;
            result[e.channels + channel] = (float)product;
        }
    }
}

// The gradients of z and of the residual. That of z is w inverse (g - sums / rows - x products / rows) with
// x = (z - mean) inverse if mean and inverse are those of the batch, else w inverse g.
//
// - sums: the result of `gradients`, or 0 for running statistics.
// - of_input, of_residual: 0 if not wanted.
KERNEL gradients_of_values(const number *gradient, const number *y, const number *z, const float *mean,
                           const float *inverse, const float *weight, const float *sums,
                           number *of_input, number *of_residual, Extent e) {
    EACH_THREAD {
        size channel = channel_of(thread);
        if (channel < e.channels) {
            float centre = mean[channel], unit = inverse[channel], scale = weight[channel] * unit;
            float sum = sums ? sums[channel] / (float)e.rows : 0;
            float product = sums ? sums[e.channels + channel] / (float)e.rows : 0;
            for (size row = first_row(e) + thread / CHANNELS; row < end_row(e); row += LANES) {
                size at = row * e.channels + channel;
                float g = passed(gradient, y, at), x = (wide(z[at]) - centre) * unit;
                if (of_input) of_input[at] = narrow(scale * (g - sum - x * product));
                if (of_residual) of_residual[at] = narrow(g);
            }
        }
    }
}
