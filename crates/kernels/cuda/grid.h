// One source for two compilers.
//
// nvcc makes PTX of it. A C compiler makes of each kernel a function that computes one block, whose
// place in the grid stands in `block_x` and `block_y`: so the tests run it on machines without a GPU.
// Hence nothing but what both languages have in common, no `return` before the end of a kernel, and
// nothing kept from one EACH_THREAD to the next but in SHARED memory.

#pragma once

// Threads of a block, and how the kernels of norms arrange them: 32 neighbouring channels of 8 rows.
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
// Once by every thread of the block; when it ends, all have written what they wrote.
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

// What values are stored as; sums and parameters are f32 throughout.
#ifdef BF16

typedef unsigned short number;

INSIDE float wide(number x) {
    union { unsigned bits; float value; } all;
    all.bits = (unsigned)x << 16;
    return all.value;
}

// To the nearest, of two equally near the even one; a NaN stays one.
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
