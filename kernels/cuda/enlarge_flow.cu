// Learned upsampling of flow by two: a transposed convolution, two channels to two, 4x4, stride 2, padding 1.
//
// Along each axis the output pixels 2i - 1 and 2i depend on the input values i and i - 1: the first with weights 0 and
// 2, the second with weights 1 and 3. One thread computes the 2x2 pixels that depend on the same 2x2 values; at the
// border only one or two of them exist.
#include "common.cuh"

constexpr int TILE_COLUMNS = 32;  // a block's 8 warps take one row of these each, as enlarge_flow.py assumes

template <class T>
__device__ __forceinline__ void write_flow(View<T> out, int n, int y, int x, float u, float v) {
    T* const place = out.at(n, 0, y, x);
    if (out.c == 1 && (unsigned long long)place % sizeof(Several<T, 2>) == 0) {
        Several<T, 2> both;
        store(both.values, u);
        store(both.values + 1, v);
        *(Several<T, 2>*)place = both;
        return;
    }
    store(place, u);
    store(place + out.c, v);
}

template <class T>
__device__ __forceinline__ void enlarge_flow(
    View<const float> flow, const float4* weight, const float* bias, View<T> out, int height, int width
) {
    const int n = (int)blockIdx.z, j = (int)(blockIdx.x * TILE_COLUMNS + threadIdx.x % TILE_COLUMNS);
    const int i = (int)(blockIdx.y * (blockDim.x / TILE_COLUMNS) + threadIdx.x / TILE_COLUMNS);
    if (i > height || j > width) return;
    float sums[2][2][2];  // rows 2i - 1 and 2i, columns likewise, u and v
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[k / 4][k / 2 % 2][k % 2] = bias[k % 2];
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const int y = i - below;
        if (y < 0 || y >= height) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float* const row = flow.at(n, c, y, 0);
            const float right = j < width ? row[j * flow.x] : 0.0f, left = j > 0 ? row[(j - 1) * flow.x] : 0.0f;
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // output channel, and parity of the row of weights
                const int to = k / 2, odd = k % 2;
                const float4 by = weight[8 * c + 4 * to + 2 * below + odd];  // (in 2, out 2, rows 4) of 4 columns
                sums[odd][0][to] += right * by.x + left * by.z;
                sums[odd][1][to] += right * by.y + left * by.w;
            }
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int y = 2 * i - 1 + k / 2, x = 2 * j - 1 + k % 2;
        if (y < 0 || y >= 2 * height || x < 0 || x >= 2 * width) continue;
        write_flow(out, n, y, x, sums[k / 2][k % 2][0], sums[k / 2][k % 2][1]);
    }
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) enlarge_flow_##name(                                           \
        VIEW(const float, flow), const float4* weight, const float* bias, VIEW(T, out), int height, int width        \
    ) {                                                                                                              \
        enlarge_flow<T>(AS_VIEW(const float, flow), weight, bias, AS_VIEW(T, out), height, width);                   \
    }
FOR_EACH_TYPE(ENTRIES)
