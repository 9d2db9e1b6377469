// Flow to Middlebury colours; before that, if no scale is given, the length of each picture's longest vector.
//
// In both kernels one thread computes every (blocks * 256)th pixel of one picture, so that neighbouring threads read
// and write neighbouring pixels, and a block fetches the wheel once for many pixels.
#include "common.cuh"

constexpr int COLUMNS = 56, TABLE = 6 * COLUMNS;  // of the wheel: how far R, G, B lie below 255, then their slopes

// Product and sum must not be fused: both kernels have to find exactly the same length for the longest vector.
__device__ __forceinline__ float magnitude(float u, float v) {
    return sqrtf(__fadd_rn(__fmul_rn(u, u), __fmul_rn(v, v)));
}

struct Longest {
    float length;

    __device__ __forceinline__ Longest with(Longest other) const { return {fmaxf(length, other.length)}; }
};

template <class T>
__device__ __forceinline__ void flow_longest(View<const T> flow, float* longest, int height, int width, int blocks) {
    const Share share = share_of_picture(blocks);
    const long long pixels = (long long)height * width;
    Longest mine = {0};
    for (long long i = share.first; i < pixels; i += share.stride) {
        const float u = widened(*flow.at(share.n, 0, i / width, i % width));
        const float v = widened(*flow.at(share.n, 1, i / width, i % width));
        if (is_known(u, v)) mine = mine.with({magnitude(u, v)});
    }
    const Longest all = total_of_block(mine);
    if (threadIdx.x == 0) raise(longest + share.n, all.length);
}

// scales: one per picture, in pixels; 0 (nothing moves) stands for 1. beyond_shade: brightness of longer vectors.
template <class T>
__device__ __forceinline__ void flow_color(
    View<const T> flow, View<unsigned char> out, const float* table, const float* scales, int height, int width,
    int blocks, float beyond_shade
) {
    SHARED(float, wheel, TABLE);
    for (int i = (int)threadIdx.x; i < TABLE; i += BLOCK) wheel[i] = table[i];
    __syncthreads();
    const Share share = share_of_picture(blocks);
    const long long pixels = (long long)height * width;
    const float scale = scales[share.n] > 0 ? scales[share.n] : 1.0f;
    for (long long i = share.first; i < pixels; i += share.stride) {
        const long long y = i / width, x = i % width;
        const float u = widened(*flow.at(share.n, 0, y, x)), v = widened(*flow.at(share.n, 1, y, x));
        const bool known = is_known(u, v);
        const float radius = known ? magnitude(u, v) / scale : 0.0f;
        // Half a turn is added to the angle, so that it starts at 0 for motion to the right; a full turn is 54 columns.
        const float turn = known ? (atan2f(-v, -u) * 0.318309886f + 1) * 27 : 0.0f;
        const float held = fminf(fmaxf(turn, 0.0f), (float)(COLUMNS - 1)), column = floorf(held);
        const float saturation = fminf(radius, 1.0f), shade = !known ? 0.0f : radius > 1 ? beyond_shade : 1.0f;
        for (int c = 0; c < 3; ++c) {
            const float* const entry = wheel + c * COLUMNS + (int)column;
            const float missing = entry[0] + (held - column) * entry[3 * COLUMNS];
            *out.at(share.n, c, y, x) = (unsigned char)((255 - saturation * missing) * shade);
        }
    }
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) flow_longest_##name(                                           \
        VIEW(const T, flow), float* longest, int height, int width, int blocks                                       \
    ) {                                                                                                              \
        flow_longest<T>(AS_VIEW(const T, flow), longest, height, width, blocks);                                     \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) flow_color_##name(                                             \
        VIEW(const T, flow), VIEW(unsigned char, out), const float* table, const float* scales, int height,          \
        int width, int blocks, float beyond_shade                                                                    \
    ) {                                                                                                              \
        flow_color<T>(                                                                                               \
            AS_VIEW(const T, flow), AS_VIEW(unsigned char, out), table, scales, height, width, blocks, beyond_shade  \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
