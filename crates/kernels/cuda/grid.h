// One source for two compilers.
//
// nvcc compiles it to PTX. A C compiler turns each kernel into a function that computes one block, whose
// position in the grid is in `block_x` and `block_y`: so the tests run it on machines without a GPU.
// Therefore: only what both languages have in common, no `return` before the end of a kernel, and no state
// between two EACH_THREAD except in SHARED memory.

#pragma once

// Threads per block, and their arrangement in the kernels of norms: 32 adjacent channels of 8 rows.
#define THREADS 256
#define CHANNELS 32
#define LANES (THREADS / CHANNELS)

typedef unsigned long long size;

#ifdef __CUDACC__

#define KERNEL extern "C" __global__ void
#define INSIDE static __device__ __forceinline__
#define SHARED __shared__
#define block_x blockIdx.x
#define block_y blockIdx.y
// Executed by every thread of the block; all writes are visible when it ends.
#define EACH_THREAD for (unsigned thread = threadIdx.x, go = 1; go; go = 0, __syncthreads())

#else

#include <math.h>

unsigned block_x, block_y;
const unsigned threads = THREADS;
#define KERNEL void
#define INSIDE static inline
#define SHARED static
#define EACH_THREAD for (unsigned thread = 0; thread < THREADS; thread++)

#endif

// The type of stored values; sums and parameters are always f32.
#ifdef BF16

typedef unsigned short number;

INSIDE float wide(number x) {
    union { unsigned bits; float value; } all;
    all.bits = (unsigned)x << 16;
    return all.value;
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
INSIDE number narrow(float x) {
    union { float value; unsigned bits; } all;
    all.value = x;
    if ((all.bits & 0x7fffffffu) > 0x7f800000u) return (number)((all.bits >> 16) | 64u);
    return (number)((all.bits + 0x7fffu + ((all.bits >> 16) & 1u)) >> 16);
}

#else

typedef float number;

INSIDE float wide(number x) { return x; }
INSIDE number narrow(float x) { return x; }

#endif
