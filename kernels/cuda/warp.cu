// Backward warping: each pixel fetched from where the flow points, bilinear, the border repeated; and both gradients.
//
// One thread computes one pixel of the output, all channels of it. Neighbouring threads take neighbouring x, then y,
// then the batch. Flow is smooth, so a warp's four loads per channel fall on a few runs of memory.
//
// Coordinates are always float. The pixel's own coordinate is whole and only added to the flow's whole part: at
// x = 4000 their sum as a float would be off by 1e-4.
#include "common.cuh"

// The two neighbours along one axis, held inside the image, and the weight of the second. NaN fails every comparison
// and lives on in the weight.
struct Neighbours {
    int first, second;
    float part;
};

__device__ __forceinline__ int held(int place, int size) { return place < 0 ? 0 : place < size ? place : size - 1; }

__device__ __forceinline__ Neighbours neighbours(int place, float shift, int size) {
    const float limit = (float)(size + 1);  // beyond one image size everything is border
    if (shift > limit) shift = limit;
    if (shift < -limit) shift = -limit;
    const float whole = floorf(shift);
    const int first = place + (whole == whole ? (int)whole : 0);
    return {held(first, size), held(first + 1, size), shift - whole};
}

struct Corners {
    long long top_left, top_right, bottom_left, bottom_right;  // offsets in elements
    float left, right, top, bottom;                            // weights
};

template <class T>
__device__ __forceinline__ Corners corners(const Pixel& p, View<const float> flow, View<T> image, int height, int width) {
    const Neighbours h = neighbours(p.x, *flow.at(p.n, 0, p.y, p.x), width);
    const Neighbours v = neighbours(p.y, *flow.at(p.n, 1, p.y, p.x), height);
    const long long top = v.first * image.y, bottom = v.second * image.y;
    const long long left = h.first * image.x, right = h.second * image.x;
    return {top + left, top + right, bottom + left, bottom + right, 1 - h.part, h.part, 1 - v.part, v.part};
}

template <class T>
__device__ __forceinline__ void warp(
    View<const T> image, View<const float> flow, View<T> out, int batch, int channels, int height, int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const Corners at = corners(p, flow, image, height, width);
    const float top_left = at.left * at.top, top_right = at.right * at.top;
    const float bottom_left = at.left * at.bottom, bottom_right = at.right * at.bottom;
    const T* plane = image.at(p.n, 0, 0, 0);
    T* place = out.at(p.n, 0, p.y, p.x);
    for (int c = 0; c < channels; ++c, plane += image.c, place += out.c) {
        float sum = widened(plane[at.top_left]) * top_left;
        sum += widened(plane[at.top_right]) * top_right;
        sum += widened(plane[at.bottom_left]) * bottom_left;
        sum += widened(plane[at.bottom_right]) * bottom_right;
        store(place, sum);
    }
}

// Gradient for the image: each pixel of the output gives its four sources their shares. ``out`` is float and zero
// before; the order of the additions is the hardware's, so the last bits may differ from run to run.
template <class T>
__device__ __forceinline__ void warp_image_gradient(
    View<const T> grad, View<const float> flow, View<float> out, int batch, int channels, int height, int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const Corners at = corners(p, flow, out, height, width);
    const T* value = grad.at(p.n, 0, p.y, p.x);
    float* plane = out.at(p.n, 0, 0, 0);
    for (int c = 0; c < channels; ++c, plane += out.c, value += grad.c) {
        const float wide = widened(*value);
        atomicAdd(plane + at.top_left, wide * (at.left * at.top));
        atomicAdd(plane + at.top_right, wide * (at.right * at.top));
        atomicAdd(plane + at.bottom_left, wide * (at.left * at.bottom));
        atomicAdd(plane + at.bottom_right, wide * (at.right * at.bottom));
    }
}

// Gradient for the flow: the slope of the image between the four neighbours.
template <class T>
__device__ __forceinline__ void warp_flow_gradient(
    View<const T> grad, View<const T> image, View<const float> flow, View<float> out, int batch, int channels, int height,
    int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const Corners at = corners(p, flow, image, height, width);
    const T* value = grad.at(p.n, 0, p.y, p.x);
    const T* plane = image.at(p.n, 0, 0, 0);
    float top_left = 0, top_right = 0, bottom_left = 0, bottom_right = 0;
    for (int c = 0; c < channels; ++c, plane += image.c, value += grad.c) {
        const float wide = widened(*value);
        top_left += widened(plane[at.top_left]) * wide;
        top_right += widened(plane[at.top_right]) * wide;
        bottom_left += widened(plane[at.bottom_left]) * wide;
        bottom_right += widened(plane[at.bottom_right]) * wide;
    }
    *out.at(p.n, 0, p.y, p.x) = (top_right - top_left) * at.top + (bottom_right - bottom_left) * at.bottom;
    *out.at(p.n, 1, p.y, p.x) = (bottom_left - top_left) * at.left + (bottom_right - top_right) * at.right;
}

#define SIZES int batch, int channels, int height, int width
#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) warp_##name(                                                   \
        VIEW(const T, image), VIEW(const float, flow), VIEW(T, out), SIZES                                           \
    ) {                                                                                                              \
        warp<T>(                                                                                                     \
            AS_VIEW(const T, image), AS_VIEW(const float, flow), AS_VIEW(T, out), batch, channels, height, width     \
        );                                                                                                           \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) warp_image_gradient_##name(                                    \
        VIEW(const T, grad), VIEW(const float, flow), VIEW(float, out), SIZES                                        \
    ) {                                                                                                              \
        warp_image_gradient<T>(                                                                                      \
            AS_VIEW(const T, grad), AS_VIEW(const float, flow), AS_VIEW(float, out), batch, channels, height, width  \
        );                                                                                                           \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) warp_flow_gradient_##name(                                     \
        VIEW(const T, grad), VIEW(const T, image), VIEW(const float, flow), VIEW(float, out), SIZES                  \
    ) {                                                                                                              \
        warp_flow_gradient<T>(                                                                                       \
            AS_VIEW(const T, grad), AS_VIEW(const T, image), AS_VIEW(const float, flow), AS_VIEW(float, out), batch, \
            channels, height, width                                                                                  \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
