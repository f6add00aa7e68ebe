// Updates of flat parameters, element by element: see `src/flat.rs`.

#include "grid.h"

// b <- mu b + (g + lambda p), then p <- p - rate b.
KERNEL sgd(float *values, const float *gradients, float *momenta, size count, float rate,
           float momentum, float decay) {
    EACH_THREAD {
        size at = (size)block_x * THREADS + thread;
        if (at < count) {
            float direction = momentum * momenta[at] + (gradients[at] + decay * values[at]);
            momenta[at] = direction;
            values[at] -= rate * direction;
        }
    }
}

// m <- beta_1 m + (1 - beta_1) g, v <- beta_2 v + (1 - beta_2) g^2, p <- p - rate m / (root sqrt(v) +
// epsilon); rate and root hold the corrections for the step.
KERNEL adam(float *values, const float *gradients, float *first, float *second, size count, float rate,
            float root, float beta_1, float complement_1, float beta_2, float complement_2, float epsilon,
            float decay) {
    EACH_THREAD {
        size at = (size)block_x * THREADS + thread;
        if (at < count) {
            float gradient = gradients[at] + decay * values[at];
            float mean = beta_1 * first[at] + complement_1 * gradient;
            float square = beta_2 * second[at] + complement_2 * gradient * gradient;
            first[at] = mean;
            second[at] = square;
            values[at] -= rate * mean / (sqrtf(square) * root + epsilon);
        }
    }
}

// t <- t + share (o - t).
KERNEL follow(float *target, const float *online, size count, float share) {
    EACH_THREAD {
        size at = (size)block_x * THREADS + thread;
        if (at < count) target[at] += share * (online[at] - target[at]);
    }
}
