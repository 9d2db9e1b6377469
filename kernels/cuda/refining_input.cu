// The input of a network that refines a flow: both frames, the second one warped by the flow, the flow, and the norm of
// the first frame minus the warped one.
//
// One thread computes one column of 4 pixels, which depend on the same 3 rows of the quarter-size flow.
#include "pixels.cuh"
#include "sampling.cuh"

constexpr int CHANNELS = 12, ROOM = 16;

// The two of `size` quarter-size values between which a pixel lies (half-pixel centres), and the weight of the second.
struct Between {
    int first, second;
    float part;
};

__device__ __forceinline__ Between between(int place, int size) {
    const float at = fmaxf(((float)place + 0.5f) * 0.25f - 0.5f, 0.0f);
    const int first = (int)at;
    return {first, first + 1 < size ? first + 1 : first, at - (float)first};
}

template <class T>
__device__ __forceinline__ void refining_input(
    const float* frames, View<const float> flow, T* out, int height, int width, float scale, float unscale
) {
    const Pixel p = column_of_tile(width);
    if (p.y >= height) return;
    const int quarter = p.y / 4, last = height / 4 - 1;
    const int rows[3] = {quarter > 0 ? quarter - 1 : 0, quarter, quarter < last ? quarter + 1 : last};
    const Between h = between(p.x, width / 4);
    float around[3][2];  // the flow in pixels at this column, in these rows
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float* const row = flow.at(p.n, c, rows[i], 0);
            around[i][c] = (1 - h.part) * (row[h.first * flow.x] * scale) + h.part * (row[h.second * flow.x] * scale);
        }
    }
    const long long plane = (long long)height * width;
    const float* own = frames + p.n * 6 * plane + (long long)p.y * width + p.x;
    Pixels<T, ROOM> room(out, p, height, width);
#pragma unroll
    for (int r = 0; r < ROWS; ++r, own += width) {
        // The first two pixels lie above the centre of their flow value, the others below it; the picture's first two
        // count as lying at the centre.
        const bool above = r < 2 && quarter > 0;
        const float part = r < 2 ? above ? 0.625f + 0.25f * r : 0.0f : 0.25f * r - 0.375f;
        const float right = (1 - part) * around[above ? 0 : 1][0] + part * around[above ? 1 : 2][0];
        const float down = (1 - part) * around[above ? 0 : 1][1] + part * around[above ? 1 : 2][1];
        const int here = (p.y + r) * width + p.x;
        const Corners<int> at = corners(p.x, p.y + r, right, down, height, width, width, 1).from(here);
        float values[CHANNELS], squares = 0;
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            values[c] = own[c * plane];
            values[3 + c] = own[(3 + c) * plane];
            values[6 + c] = sampled(own + (3 + c) * plane, at);
            const float apart = values[c] - values[6 + c];
            squares += apart * apart;
        }
        values[9] = right * unscale;
        values[10] = down * unscale;
        values[11] = sqrtf(squares);
        room.write(values);
    }
}

#define ENTRIES(name, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) refining_input_##name(                                  \
        const float* frames, VIEW(const float, flow), T* out, int height, int width, float scale,             \
        float unscale                                                                                         \
    ) {                                                                                                       \
        refining_input<T>(frames, AS_VIEW(const float, flow), out, height, width, scale, unscale);            \
    }
FOR_EACH_TYPE(ENTRIES)
