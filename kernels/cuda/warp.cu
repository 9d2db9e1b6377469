// Backward warping: each pixel sampled where the flow points, bilinear, the border repeated; and both gradients.
//
// One thread computes one pixel of the output, all channels of it. Neighbouring threads take neighbouring x, then y,
// then the batch. Flow is smooth, so the four loads per channel of a warp (of threads) fall on a few runs of memory.
#include "sampling.cuh"

template <class T>
__device__ __forceinline__ Corners<long long> corners_of(
    const Pixel& p, View<const float> flow, View<T> image, int height, int width
) {
    const float u = *flow.at(p.n, 0, p.y, p.x), v = *flow.at(p.n, 1, p.y, p.x);
    return corners(p.x, p.y, u, v, height, width, image.y, image.x);
}

template <class T>
__device__ __forceinline__ void warp(
    View<const T> image, View<const float> flow, View<T> out, int batch, int channels, int height, int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const Corners<long long> at = corners_of(p, flow, image, height, width);
    const T* plane = image.at(p.n, 0, 0, 0);
    T* place = out.at(p.n, 0, p.y, p.x);
    for (int c = 0; c < channels; ++c, plane += image.c, place += out.c) store(place, sampled(plane, at));
}

__device__ __forceinline__ bool is_known(const Pixel& p, View<const float> flow) {
    const float u = *flow.at(p.n, 0, p.y, p.x), v = *flow.at(p.n, 1, p.y, p.x);
    return u == u && v == v;
}

// Gradient for the image: each output pixel adds its share to its four source pixels, unless its flow is NaN. ``out``
// is float and must be zero at first; the hardware orders the additions, so the last bits may differ from run to run.
template <class T>
__device__ __forceinline__ void warp_image_gradient(
    View<const T> grad, View<const float> flow, View<float> out, int batch, int channels, int height, int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside || !is_known(p, flow)) return;
    const Corners<long long> at = corners_of(p, flow, out, height, width);
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

// Gradient for the flow: the slope of the image between the four neighbours; zero where the flow is NaN.
template <class T>
__device__ __forceinline__ void warp_flow_gradient(
    View<const T> grad, View<const T> image, View<const float> flow, View<float> out, int batch, int channels, int height,
    int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const Corners<long long> at = corners_of(p, flow, image, height, width);
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
    const bool known = is_known(p, flow);
    const float along_x = (top_right - top_left) * at.top + (bottom_right - bottom_left) * at.bottom;
    const float along_y = (bottom_left - top_left) * at.left + (bottom_right - top_right) * at.right;
    *out.at(p.n, 0, p.y, p.x) = known ? along_x : 0;
    *out.at(p.n, 1, p.y, p.x) = known ? along_y : 0;
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
