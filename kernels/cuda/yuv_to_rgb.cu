// A decoder's surface (NV12, P010 and similar) to planar RGB with the networks' padding around it, in one pass.
//
// One thread computes one pixel of the padded picture, all three planes of it. Neighbouring threads take neighbouring
// x, then y, so that luma is read and each plane written in runs; the four chroma samples around a pixel are shared
// with its neighbours and come from the cache.
#include "common.cuh"

// Coefficients that turn stored values into RGB from 0 to 255; kernels/yuv_to_rgb.py derives them.
struct Coefficients {
    float black, luma_scale, grey, red_cr, green_cb, green_cr, blue_cb;
};

// The two samples around a pixel along one axis, and the weight of the second.
struct Between {
    int before, after;
    float part;
};

__device__ __forceinline__ Between between(int pixel, int samples, float scale) {
    const float last = (float)(samples - 1);
    const float place = fminf(fmaxf((pixel + 0.5f) * scale - 0.5f, 0.0f), last);
    const int before = (int)place;
    return {before, before + 1 < samples ? before + 1 : before, place - (float)before};
}

// The place in the picture for a place along a padded axis: the padding, half of it on each side, repeats the edge.
__device__ __forceinline__ int inside(int place, int inner, int outer) {
    const int moved = place - (outer - inner) / 2;
    return moved < 0 ? 0 : moved < inner ? moved : inner - 1;
}

__device__ __forceinline__ unsigned char level(float x) { return (unsigned char)fminf(fmaxf(rintf(x), 0.0f), 255.0f); }

template <class T>
__device__ __forceinline__ void yuv_to_rgb(
    View<const T> luma, View<const T> chroma, View<unsigned char> out, const Coefficients& k, int height, int width,
    int chroma_height, int chroma_width, int out_height, int out_width, float scale_y, float scale_x
) {
    const Pixel p = this_pixel(1, out_height, out_width);
    if (!p.inside) return;
    const int row = inside(p.y, height, out_height), column = inside(p.x, width, out_width);
    const Between v = between(row, chroma_height, scale_y), h = between(column, chroma_width, scale_x);
    float mixed[2];  // Cb, Cr
    for (int c = 0; c < 2; ++c) {
        const float top_left = (float)*chroma.at(0, c, v.before, h.before) - k.grey;
        const float top_right = (float)*chroma.at(0, c, v.before, h.after) - k.grey;
        const float bottom_left = (float)*chroma.at(0, c, v.after, h.before) - k.grey;
        const float bottom_right = (float)*chroma.at(0, c, v.after, h.after) - k.grey;
        const float left = top_left * (1 - v.part) + bottom_left * v.part;
        const float right = top_right * (1 - v.part) + bottom_right * v.part;
        mixed[c] = left * (1 - h.part) + right * h.part;
    }
    const float y = ((float)*luma.at(0, 0, row, column) - k.black) * k.luma_scale;
    *out.at(0, 0, p.y, p.x) = level(y + k.red_cr * mixed[1]);
    *out.at(0, 1, p.y, p.x) = level(y + k.green_cb * mixed[0] + k.green_cr * mixed[1]);
    *out.at(0, 2, p.y, p.x) = level(y + k.blue_cb * mixed[0]);
}

#define ENTRY_OF(name, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) yuv_to_rgb_##name(                                             \
        VIEW(const T, luma), VIEW(const T, chroma), VIEW(unsigned char, out), int height, int width,                 \
        int chroma_height, int chroma_width, int out_height, int out_width, float scale_y, float scale_x,            \
        float black, float luma_scale, float grey, float red_cr, float green_cb, float green_cr, float blue_cb       \
    ) {                                                                                                              \
        yuv_to_rgb<T>(                                                                                               \
            AS_VIEW(const T, luma), AS_VIEW(const T, chroma), AS_VIEW(unsigned char, out),                           \
            Coefficients{black, luma_scale, grey, red_cr, green_cb, green_cr, blue_cb}, height, width,               \
            chroma_height, chroma_width, out_height, out_width, scale_y, scale_x                                     \
        );                                                                                                           \
    }
ENTRY_OF(8, unsigned char)
ENTRY_OF(16, unsigned short)
