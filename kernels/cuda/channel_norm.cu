// Length of each pixel's vector of channels, and its gradient.
//
// One thread computes one pixel, all channels of it. Neighbouring threads take neighbouring x, then y, then the batch:
// with NCHW each load of a warp is one run of memory; with channels last each thread walks along its own run, and the
// cache serves the rest of it.
#include "common.cuh"

template <class T>
__device__ __forceinline__ void channel_norm(View<const T> x, View<T> out, int batch, int channels, int height, int width) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const T* value = x.at(p.n, 0, p.y, p.x);
    float sum = 0;
    for (int c = 0; c < channels; ++c, value += x.c) {
        const float wide = widened(*value);
        sum += wide * wide;
    }
    store(out.at(p.n, 0, p.y, p.x), sqrtf(sum));
}

// The gradient is x / (length + 1e-9) times the incoming one: the small term keeps it zero where x is zero.
template <class T>
__device__ __forceinline__ void channel_norm_backward(
    View<const T> grad, View<const T> x, View<const T> norm, View<T> out, int batch, int channels, int height, int width
) {
    const Pixel p = this_pixel(batch, height, width);
    if (!p.inside) return;
    const float factor = widened(*grad.at(p.n, 0, p.y, p.x)) / (widened(*norm.at(p.n, 0, p.y, p.x)) + 1e-9f);
    const T* value = x.at(p.n, 0, p.y, p.x);
    T* place = out.at(p.n, 0, p.y, p.x);
    for (int c = 0; c < channels; ++c, value += x.c, place += out.c) store(place, widened(*value) * factor);
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) channel_norm_##name(                                           \
        VIEW(const T, x), VIEW(T, out), int batch, int channels, int height, int width                               \
    ) {                                                                                                              \
        channel_norm<T>(AS_VIEW(const T, x), AS_VIEW(T, out), batch, channels, height, width);                       \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) channel_norm_backward_##name(                                  \
        VIEW(const T, grad), VIEW(const T, x), VIEW(const T, norm), VIEW(T, out), int batch, int channels,           \
        int height, int width                                                                                        \
    ) {                                                                                                              \
        channel_norm_backward<T>(                                                                                    \
            AS_VIEW(const T, grad), AS_VIEW(const T, x), AS_VIEW(const T, norm), AS_VIEW(T, out), batch, channels,   \
            height, width                                                                                            \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
