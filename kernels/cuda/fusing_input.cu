// What the network that fuses two flows is given: the first frame, both flows, their lengths, and for each of them how far
// the first frame is from the second one seen through it.
//
// One thread computes one pixel, from the frames and from the flows at a quarter of their size, and stores all of it.
#include "pixels.cuh"
#include "sampling.cuh"

constexpr int CHANNELS = 11, ROOM = 16;

struct Flow {
    float u, v;
};

// The nearest of a flow at a quarter of the size, in pixels.
__device__ __forceinline__ Flow nearest(View<const float> flow, const Pixel& p, float scale) {
    const float* const place = flow.at(p.n, 0, p.y / 4, p.x / 4);
    return {place[0] * scale, place[flow.c] * scale};
}

__device__ __forceinline__ float length(Flow flow) { return sqrtf(flow.u * flow.u + flow.v * flow.v); }

// How far three values are from what the planes hold where the flow points.
__device__ __forceinline__ float error_of(
    Flow flow, const float* values, const float* planes, long long plane, const Pixel& p, int height, int width
) {
    const Corners<int> at = corners(p.x, p.y, flow.u, flow.v, height, width, width, 1);
    float squares = 0;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const float apart = values[c] - sampled(planes + c * plane, at);
        squares += apart * apart;
    }
    return sqrtf(squares);
}

template <class T>
__device__ __forceinline__ void fusing_input(
    const float* frames, View<const float> small, View<const float> large, T* out, int height, int width,
    float small_scale, float large_scale
) {
    const Pixel p = pixel_of_tile(height, width);
    const Flow a = nearest(small, p, small_scale), b = nearest(large, p, large_scale);
    const long long plane = (long long)height * width;
    const float* const first = frames + p.n * 6 * plane;
    const float* const second = first + 3 * plane;
    float values[CHANNELS];
#pragma unroll
    for (int c = 0; c < 3; ++c) values[c] = first[c * plane + p.y * width + p.x];
    values[3] = a.u;
    values[4] = a.v;
    values[5] = b.u;
    values[6] = b.v;
    values[7] = length(a);
    values[8] = length(b);
    values[9] = error_of(a, values, second, plane, p, height, width);
    values[10] = error_of(b, values, second, plane, p, height, width);
    write_pixel<ROOM>(out, p, height, width, values);
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
