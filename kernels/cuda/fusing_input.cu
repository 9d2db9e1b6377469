// The input of the network that fuses two flows: the first frame, both flows, their lengths, and for each flow the norm
// of the first frame minus the second one warped by it.
//
// One thread computes one column of 4 pixels, which all take the same value of each quarter-size flow. So the first row
// that a pixel needs of the second frame is the last that the pixel above it has fetched.
#include "pixels.cuh"
#include "sampling.cuh"

constexpr int CHANNELS = 11, ROOM = 16;

struct Flow {
    float u, v;
};

// The nearest value of a quarter-size flow, in pixels.
__device__ __forceinline__ Flow nearest(View<const float> flow, const Pixel& p, float scale) {
    const float* const place = flow.at(p.n, 0, p.y / 4, p.x / 4);
    return {place[0] * scale, place[flow.c] * scale};
}

__device__ __forceinline__ float length(Flow flow) { return sqrtf(flow.u * flow.u + flow.v * flow.v); }

// For each pixel, the norm of the first frame minus the second one sampled where the flow points. `second`: the address
// of the first pixel in the second frame's first plane.
__device__ __forceinline__ void errors_of(
    Flow flow, const float (&first)[ROWS][3], const float* second, const Pixel& p, int height, int width,
    float (&errors)[ROWS]
) {
    const Shift across = shift_of(flow.u, width), down = shift_of(flow.v, height);
    const int left = held(p.x + across.whole, width) - p.x, right = held(p.x + across.whole + 1, width) - p.x;
    float squares[ROWS] = {};
#pragma unroll
    for (int c = 0; c < 3; ++c, second += (long long)height * width) {
        float seen[ROWS + 1];
#pragma unroll
        for (int r = 0; r <= ROWS; ++r) {
            const int row = (held(p.y + down.whole + r, height) - p.y) * width;
            seen[r] = second[row + left] * (1 - across.part) + second[row + right] * across.part;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float apart = first[r][c] - (seen[r] * (1 - down.part) + seen[r + 1] * down.part);
            squares[r] += apart * apart;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) errors[r] = sqrtf(squares[r]);
}

template <class T>
__device__ __forceinline__ void fusing_input(
    const float* frames, View<const float> small, View<const float> large, T* out, int height, int width,
    float small_scale, float large_scale
) {
    const Pixel p = column_of_tile(width);
    if (p.y >= height) return;
    const Flow a = nearest(small, p, small_scale), b = nearest(large, p, large_scale);
    const long long plane = (long long)height * width;
    const float* const own = frames + p.n * 6 * plane + (long long)p.y * width + p.x;
    float first[ROWS][3], errors_a[ROWS], errors_b[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < 3; ++c) first[r][c] = own[c * plane + r * width];
    errors_of(a, first, own + 3 * plane, p, height, width, errors_a);
    errors_of(b, first, own + 3 * plane, p, height, width, errors_b);
    const float length_a = length(a), length_b = length(b);
    Pixels<T, ROOM> room(out, p, height, width);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float values[CHANNELS] = {first[r][0], first[r][1], first[r][2], a.u,         a.v,        b.u,
                                        b.v,         length_a,    length_b,    errors_a[r], errors_b[r]};
        room.write(values);
    }
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) fusing_input_##name(                                           \
        const float* frames, VIEW(const float, small), VIEW(const float, large), T* out, int height, int width,      \
        float small_scale, float large_scale                                                                         \
    ) {                                                                                                              \
        fusing_input<T>(                                                                                             \
            frames, AS_VIEW(const float, small), AS_VIEW(const float, large), out, height, width, small_scale,       \
            large_scale                                                                                              \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
