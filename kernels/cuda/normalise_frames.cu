// Two frames minus the mean of their means, divided by 255, written wherever networks read them from.
//
// One thread computes one column of 4 pixels of both frames, and stores each pixel up to three times: in six planes of
// float, as one pixel of a channels-last map, and as one pixel in each half of a batch of twice as many maps.
#include "pixels.cuh"

constexpr int ROOM = 8;
constexpr float LEVELS = 255;

template <class T>
__device__ __forceinline__ void normalise_frames(
    View<const float> first, View<const float> second, const float* first_mean, const float* second_mean, float* planes,
    T* pair, T* both, int batch, int height, int width
) {
    Pixel p = column_of_tile(width);
    float means[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) means[c] = (first_mean[3 * p.n + c] + second_mean[3 * p.n + c]) / 2;
    const long long plane = (long long)height * width;
    Pixels<T, ROOM> of_pair(pair, p, height, width), of_first(both, p, height, width);
    Pixels<T, ROOM> of_second(both, {p.n + batch, p.y, p.x, p.inside}, height, width);
    for (int r = 0; r < ROWS && p.y < height; ++r, ++p.y) {
        float one[3], other[3];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            one[c] = (*first.at(p.n, c, p.y, p.x) - means[c]) * (1 / LEVELS);
            other[c] = (*second.at(p.n, c, p.y, p.x) - means[c]) * (1 / LEVELS);
        }
        const float values[6] = {one[0], one[1], one[2], other[0], other[1], other[2]};
        if (planes && p.inside) {
            float* const place = planes + p.n * 6 * plane + (long long)p.y * width + p.x;
#pragma unroll
            for (int c = 0; c < 6; ++c) place[c * plane] = values[c];
        }
        if (pair) of_pair.write(values);
        if (both) {
            of_first.write(one);
            of_second.write(other);
        }
    }
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) normalise_frames_##name(                                       \
        VIEW(const float, first), VIEW(const float, second), const float* first_mean, const float* second_mean,      \
        float* planes, T* pair, T* both, int batch, int height, int width                                            \
    ) {                                                                                                              \
        normalise_frames<T>(                                                                                         \
            AS_VIEW(const float, first), AS_VIEW(const float, second), first_mean, second_mean, planes, pair, both,  \
            batch, height, width                                                                                     \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
