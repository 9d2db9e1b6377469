// A convolution's bias and LeakyReLU, stored where the next layers read it, and optionally once more somewhere else.
//
// One thread computes 8 neighbouring channels of one pixel. Neighbouring threads take the next 8 channels, then the
// next x: with channels last, as convolutions give them, a warp reads and writes runs of 512 bytes of half precision.
// Every block stays in one row of one picture, so only the block's index has to be divided by the height. Where the
// channels do not lie side by side, fewer than 8 are left, or the address is not a multiple of 16 bytes, it goes value
// by value.
//
// `out` may be `x` itself: each thread reads the very values that it then overwrites.
#include "common.cuh"

constexpr int TOGETHER = 8;

__device__ __forceinline__ bool aligned(const void* place) { return (unsigned long long)place % 16 == 0; }

template <class T>
__device__ __forceinline__ void read(const T* place, long long step, int count, float* wide) {
    if (step == 1 && count == TOGETHER && aligned(place)) {
        const auto all = *(const Several<T, TOGETHER>*)place;
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) wide[k] = widened(all.values[k]);
        return;
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) wide[k] = k < count ? widened(place[k * step]) : 0;
}

template <class T>
__device__ __forceinline__ void write(T* place, long long step, int count, const float* wide) {
    if (step == 1 && count == TOGETHER && aligned(place)) {
        Several<T, TOGETHER> all;
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) store(all.values + k, wide[k]);
        *(Several<T, TOGETHER>*)place = all;
        return;
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k)
        if (k < count) store(place + k * step, wide[k]);
}

__device__ __forceinline__ int rest(int channels, int first) {
    const int count = channels - first;
    return count < 0 ? 0 : count < TOGETHER ? count : TOGETHER;
}

// `out` takes the first out_channels of x's channels, `also` the first also_channels; if that is 0, it is not touched.
template <class T>
__device__ __forceinline__ void bias_leaky_relu(
    View<const T> x, const float* bias, View<T> out, View<T> also, int channels, int out_channels, int also_channels,
    int height, int width, float slope
) {
    const int groups = (channels + TOGETHER - 1) / TOGETHER, in_row = width * groups;
    const int blocks = (in_row + (int)blockDim.x - 1) / (int)blockDim.x;  // per row
    const int row = (int)blockIdx.x / blocks, place = (int)blockIdx.x % blocks * (int)blockDim.x + (int)threadIdx.x;
    if (place >= in_row) return;
    const int first = place % groups * TOGETHER, column = place / groups, n = row / height, y = row % height;
    float wide[TOGETHER], added[TOGETHER];
    read(x.at(n, first, y, column), x.c, rest(channels, first), wide);
    read(bias + first, 1, rest(channels, first), added);
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
        wide[k] += added[k];
        if (wide[k] < 0) wide[k] *= slope;
    }
    write(out.at(n, first, y, column), out.c, rest(out_channels, first), wide);
    write(also.at(n, first, y, column), also.c, rest(also_channels, first), wide);
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) bias_leaky_relu_##name(                                        \
        VIEW(const T, x), const float* bias, VIEW(T, out), VIEW(T, also), int channels, int out_channels,            \
        int also_channels, int height, int width, float slope                                                        \
    ) {                                                                                                              \
        bias_leaky_relu<T>(                                                                                          \
            AS_VIEW(const T, x), bias, AS_VIEW(T, out), AS_VIEW(T, also), channels, out_channels, also_channels,     \
            height, width, slope                                                                                     \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
