// Two frames less their mean, over 255, to wherever networks read them from.
//
// One thread computes one pixel of both frames, and stores it up to three times: as six planes of float, as one pixel of
// a channels-last map, and as one pixel in each half of a batch of twice as many.
#include "pixels.cuh"

constexpr int ROOM = 8;
constexpr float LEVELS = 255;

template <class T>
__device__ __forceinline__ void normalise_frames(
    View<const float> first, View<const float> second, const float* mean, float* planes, T* pair, T* both, int batch,
    int height, int width
) {
    const Pixel p = pixel_of_tile(height, width);
    float values[6], other[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        values[c] = (*first.at(p.n, c, p.y, p.x) - mean[3 * p.n + c]) * (1 / LEVELS);
        values[3 + c] = other[c] = (*second.at(p.n, c, p.y, p.x) - mean[3 * p.n + c]) * (1 / LEVELS);
    }
    if (planes && p.inside) {
        const long long plane = (long long)height * width;
        float* const place = planes + p.n * 6 * plane + (long long)p.y * width + p.x;
#pragma unroll
        for (int c = 0; c < 6; ++c) place[c * plane] = values[c];
    }
    if (pair) write_pixel<ROOM>(pair, p, height, width, values);
    if (both) {
        const float(&one)[3] = *(const float(*)[3])values;
        write_pixel<ROOM>(both, p, height, width, one);
        write_pixel<ROOM>(both, {p.n + batch, p.y, p.x, p.inside}, height, width, other);
    }
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) normalise_frames_##name(                                       \
        VIEW(const float, first), VIEW(const float, second), const float* mean, float* planes, T* pair, T* both,     \
        int batch, int height, int width                                                                             \
    ) {                                                                                                              \
        normalise_frames<T>(                                                                                         \
            AS_VIEW(const float, first), AS_VIEW(const float, second), mean, planes, pair, both, batch, height,      \
            width                                                                                                    \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
