// A learned doubling of flow: a transposed convolution, two channels to two, 4x4, stride 2, padding 1.
//
// One thread computes one pixel. Along each axis it has two taps: a pixel 2i sees the values i and i - 1 by the weights 1
// and 3, a pixel 2i - 1 those by the weights 0 and 2.
#include "pixels.cuh"

template <class T>
struct alignas(2 * sizeof(T)) Two {  // one store
    T values[2];
};

template <class T>
__device__ __forceinline__ void enlarge_flow(
    View<const float> flow, const float* weight, const float* bias, View<T> out, int height, int width
) {
    const Pixel p = pixel_of_tile(2 * height, 2 * width);
    if (!p.inside) return;
    float u = bias[0], v = bias[1];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int y = (p.y + 1) / 2 - j, row = (p.y + 1) % 2 + 2 * j;
        if (y < 0 || y >= height) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int x = (p.x + 1) / 2 - i, column = (p.x + 1) % 2 + 2 * i;
            if (x < 0 || x >= width) continue;
            const float* const value = flow.at(p.n, 0, y, x);
            const float* const tap = weight + 4 * row + column;  // (from 2, to 2, 4, 4)
            u += value[0] * tap[0] + value[flow.c] * tap[32];
            v += value[0] * tap[16] + value[flow.c] * tap[48];
        }
    }
    T* const place = out.at(p.n, 0, p.y, p.x);
    if (out.c == 1 && (unsigned long long)place % sizeof(Two<T>) == 0) {
        Two<T> both;
        store(both.values, u);
        store(both.values + 1, v);
        *(Two<T>*)place = both;
        return;
    }
    store(place, u);
    store(place + out.c, v);
}

#define ENTRIES(name, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) enlarge_flow_##name(                                           \
        VIEW(const float, flow), const float* weight, const float* bias, VIEW(T, out), int height, int width         \
    ) {                                                                                                              \
        enlarge_flow<T>(AS_VIEW(const float, flow), weight, bias, AS_VIEW(T, out), height, width);                   \
    }
FOR_EACH_TYPE(ENTRIES)
