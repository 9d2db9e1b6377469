// What a network that refines a flow is given: both frames, the second one seen through the flow, the flow, and how far
// the first frame is from what is seen.
//
// One thread computes one pixel, from the frames and from the flow at a quarter of their size, and stores all of it.
#include "pixels.cuh"
#include "sampling.cuh"

constexpr int CHANNELS = 12, ROOM = 16;

// Between which two of `size` values a pixel lies that is a quarter as large, centres in the middle, and the weight of
// the second.
struct Between {
    int first, second;
    float part;
};

__device__ __forceinline__ Between between(int place, int size) {
    const float at = fmaxf(((float)place + 0.5f) * 0.25f - 0.5f, 0.0f);
    const int first = (int)at;
    return {first, first + 1 < size ? first + 1 : first, at - (float)first};
}

__device__ __forceinline__ float enlarged(View<const float> flow, int n, int c, Between h, Between v, float scale) {
    const float* const top = flow.at(n, c, v.first, 0);
    const float* const bottom = flow.at(n, c, v.second, 0);
    const long long left = h.first * flow.x, right = h.second * flow.x;
    const float above = (1 - h.part) * (top[left] * scale) + h.part * (top[right] * scale);
    const float below = (1 - h.part) * (bottom[left] * scale) + h.part * (bottom[right] * scale);
    return (1 - v.part) * above + v.part * below;
}

template <class T>
__device__ __forceinline__ void refining_input(
    const float* frames, View<const float> flow, T* out, int height, int width, float scale
) {
    const Pixel p = pixel_of_tile(height, width);
    const Between h = between(p.x, width / 4), v = between(p.y, height / 4);
    const float right = enlarged(flow, p.n, 0, h, v, scale), down = enlarged(flow, p.n, 1, h, v, scale);
    const Corners<int> at = corners(p.x, p.y, right, down, height, width, width, 1);
    const long long plane = (long long)height * width;
    const float* const first = frames + p.n * 6 * plane;
    const float* const second = first + 3 * plane;
    const int here = p.y * width + p.x;
    float values[CHANNELS], squares = 0;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        values[c] = first[c * plane + here];
        values[3 + c] = second[c * plane + here];
        values[6 + c] = sampled(second + c * plane, at);
        const float apart = values[c] - values[6 + c];
        squares += apart * apart;
    }
    values[9] = right / scale;
    values[10] = down / scale;
    values[11] = sqrtf(squares);
    write_pixel<ROOM>(out, p, height, width, values);
}

#define ENTRIES(name, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) refining_input_##name(                                  \
        const float* frames, VIEW(const float, flow), T* out, int height, int width, float scale              \
    ) {                                                                                                       \
        refining_input<T>(frames, AS_VIEW(const float, flow), out, height, width, scale);                     \
    }
FOR_EACH_TYPE(ENTRIES)
