// Flow to integer steps, with a count of the vectors that could not be kept and the largest error.
//
// One thread computes every (blocks * 256)th pixel of one picture, both components: neighbouring threads read and
// write neighbouring pixels. A step is a power of two, so scaling is exact both ways, and so is the error.
#include "common.cuh"

struct Found {
    int unknown, beyond_range;  // vectors
    float worst;                // pixels

    __device__ __forceinline__ Found with(Found other) const {
        return {unknown + other.unknown, beyond_range + other.beyond_range, fmaxf(worst, other.worst)};
    }
};

// limit: the largest number of steps that is kept. fill: stored where a vector is not kept. found, 0 at first: for each
// picture the unknown vectors, then for each those beyond range, then for each the bits of the largest error.
template <class T, class Steps>
__device__ __forceinline__ void quantise(
    View<const T> flow, View<Steps> out, int* found, int batch, int height, int width, int blocks, float step,
    float per_step, float limit, int fill
) {
    const Share share = share_of_picture(blocks);
    const long long pixels = (long long)height * width;
    Found mine = {0, 0, 0};
    for (long long i = share.first; i < pixels; i += share.stride) {
        const long long y = i / width, x = i % width;
        const float u = widened(*flow.at(share.n, 0, y, x)), v = widened(*flow.at(share.n, 1, y, x));
        const float steps_u = rintf(u * per_step), steps_v = rintf(v * per_step);
        const bool known = is_known(u, v), kept = known && fabsf(steps_u) <= limit && fabsf(steps_v) <= limit;
        const Steps stored_u = kept ? (Steps)steps_u : (Steps)fill, stored_v = kept ? (Steps)steps_v : (Steps)fill;
        *out.at(share.n, 0, y, x) = stored_u;
        *out.at(share.n, 1, y, x) = stored_v;
        if (kept) {
            const float off_u = fabsf((float)stored_u * step - u), off_v = fabsf((float)stored_v * step - v);
            mine = mine.with({0, 0, fmaxf(off_u, off_v)});
        } else {
            mine = mine.with({known ? 0 : 1, known ? 1 : 0, 0});
        }
    }
    const Found all = total_of_block(mine);
    if (threadIdx.x != 0) return;
    if (all.unknown) atomicAdd(found + share.n, all.unknown);
    if (all.beyond_range) atomicAdd(found + batch + share.n, all.beyond_range);
    raise((float*)(found + 2 * batch + share.n), all.worst);
}

#define ENTRY_OF(name, T, bits, Steps)                                                                               \
    extern "C" __global__ void __launch_bounds__(256) quantise_##bits##_##name(                                      \
        VIEW(const T, flow), VIEW(Steps, out), int* found, int batch, int height, int width, int blocks, float step, \
        float per_step, float limit, int fill                                                                        \
    ) {                                                                                                              \
        quantise<T, Steps>(                                                                                          \
            AS_VIEW(const T, flow), AS_VIEW(Steps, out), found, batch, height, width, blocks, step, per_step, limit, \
            fill                                                                                                     \
        );                                                                                                           \
    }
#define ENTRIES(name, T) ENTRY_OF(name, T, 16, short) ENTRY_OF(name, T, 32, int)
FOR_EACH_TYPE(ENTRIES)
