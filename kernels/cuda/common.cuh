// What the kernels share: element types that are summed in float, strided tensors, entry points for each element type,
// the assignment of threads to pixels and of blocks to pictures.
//
// Every .cu file here compiles by itself (nvcc -std=c++17, or NVRTC) and instantiates every kernel that the library
// launches. Entry points are `extern "C"`, named after the operation and the element type: warp_float, warp_half, ...
//
// The tests also compile these files for a CPU, where the threads of a block take turns. This requires that
//   - shared memory is declared with SHARED;
//   - no thread returns before a barrier that others reach;
//   - what exists only on a GPU (PTX) has an equivalent in plain C++, as in tensor_core.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef SHARED  // the tests define their own, which poisons and fences the memory
#define SHARED(type, name, count) __shared__ type name[count]
#endif

// --- element types: read wide, sum wide, round once --------------------------------------------------------------

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* place, float x) { *place = x; }
__device__ __forceinline__ void store(__half* place, float x) { *place = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* place, float x) { *place = __float2bfloat16_rn(x); }

// Neighbouring values that are loaded or stored at once. Aligned to their total size, but to no more than 16 bytes.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Several {
    T values[COUNT];
};

#define FOR_EACH_TYPE(ENTRY) ENTRY(float, float) ENTRY(half, __half) ENTRY(bfloat16, __nv_bfloat16)

// --- tensors: (N, C, H, W) with a stride for each axis, in elements; any order in memory --------------------------

template <class T>
struct View {
    T* data;
    long long n, c, y, x;

    __device__ __forceinline__ T* at(long long in, long long ic, long long iy, long long ix) const {
        return data + in * n + ic * c + iy * y + ix * x;
    }
};

// A view as five parameters of an entry point, and the view made from them.
#define VIEW(T, name) T *name##_data, long long name##_n, long long name##_c, long long name##_y, long long name##_x
#define AS_VIEW(T, name) (View<T>{name##_data, name##_n, name##_c, name##_y, name##_x})

// --- one thread per pixel: along x, then y, then the batch --------------------------------------------------------

struct Pixel {
    int n, y, x;
    bool inside;  // the last block's threads may lie beyond the last pixel
};

__device__ __forceinline__ Pixel this_pixel(int batch, int height, int width) {
    const long long number = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = number / width;
    return {(int)(row / height), (int)(row % height), (int)(number % width), number < (long long)batch * height * width};
}

// --- pictures: `blocks` blocks share the pixels of each, so that their results can be combined ---------------------

constexpr int BLOCK = 256;  // threads per block, in all kernels that use what follows

struct Share {
    int n;             // picture
    long long first;   // this thread's first pixel
    long long stride;  // from one of its pixels to the next
};

__device__ __forceinline__ Share share_of_picture(int blocks) {
    const int n = (int)(blockIdx.x / blocks), block = (int)(blockIdx.x % blocks);
    return {n, (long long)block * BLOCK + threadIdx.x, (long long)blocks * BLOCK};
}

// The values of all threads of the block, combined by V::with; thread 0 gets the total. All threads must call it, once.
template <class V>
__device__ __forceinline__ V total_of_block(V mine) {
    SHARED(V, parts, BLOCK);
    const int thread = (int)threadIdx.x;
    parts[thread] = mine;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) parts[thread] = parts[thread].with(parts[thread + half]);
    }
    return thread == 0 ? parts[0] : mine;  // the others must not read parts[0]: thread 0 has just written it
}

// Atomic maximum of non-negative floats, whose bits as integers have the same order. *place must be 0 at first.
__device__ __forceinline__ void raise(float* place, float x) { atomicMax((int*)place, __float_as_int(x)); }

// --- vectors of flow -------------------------------------------------------------------------------------------------

constexpr float UNKNOWN_ABOVE = 1e9f;  // pixels, as in engine/data.py

// NaN fails every comparison.
__device__ __forceinline__ bool is_known(float u, float v) {
    return fabsf(u) <= UNKNOWN_ABOVE && fabsf(v) <= UNKNOWN_ABOVE;
}
