// Bilinear sampling at a displaced pixel, the border repeated: shared by all kernels that warp.
//
// Displacements are always float. The pixel's own coordinate is an integer and is added to the flow's integer part
// only: at x = 4000 the sum of both as a float would be off by 1e-4.
#pragma once

#include "common.cuh"

// A displacement along one axis: whole pixels, rounded down, and the fraction. NaN fails every comparison and remains
// in the fraction.
struct Shift {
    int whole;
    float part;
};

__device__ __forceinline__ Shift shift_of(float shift, int size) {
    const float limit = (float)(size + 1);  // beyond one image size everything is border
    if (shift > limit) shift = limit;
    if (shift < -limit) shift = -limit;
    const float whole = floorf(shift);
    return {whole == whole ? (int)whole : 0, shift - whole};
}

__device__ __forceinline__ int held(int place, int size) { return max(0, min(place, size - 1)); }

// The two neighbours along one axis, clamped to the image, and the weight of the second.
struct Neighbours {
    int first, second;
    float part;
};

__device__ __forceinline__ Neighbours neighbours(int place, float shift, int size) {
    const Shift by = shift_of(shift, size);
    return {held(place + by.whole, size), held(place + by.whole + 1, size), by.part};
}

template <class Offset>  // an integer type wide enough for offsets within one plane
struct Corners {
    Offset top_left, top_right, bottom_left, bottom_right;  // in elements
    float left, right, top, bottom;                         // weights

    // The same, as offsets from `place` instead of the plane's beginning.
    __device__ __forceinline__ Corners from(Offset place) const {
        return {top_left - place, top_right - place, bottom_left - place, bottom_right - place, left, right, top, bottom};
    }
};

// Those of the pixel (x, y) displaced by (u, v), in planes whose rows and columns are so many elements apart.
template <class Offset>
__device__ __forceinline__ Corners<Offset> corners(
    int x, int y, float u, float v, int height, int width, Offset row, Offset column
) {
    const Neighbours across = neighbours(x, u, width), down = neighbours(y, v, height);
    const Offset top = down.first * row, bottom = down.second * row;
    const Offset left = across.first * column, right = across.second * column;
    return {top + left,      top + right, bottom + left, bottom + right, 1 - across.part, across.part,
            1 - down.part, down.part};
}

template <class T, class Offset>
__device__ __forceinline__ float sampled(const T* place, const Corners<Offset>& at) {
    float sum = widened(place[at.top_left]) * (at.left * at.top);
    sum += widened(place[at.top_right]) * (at.right * at.top);
    sum += widened(place[at.bottom_left]) * (at.left * at.bottom);
    sum += widened(place[at.bottom_right]) * (at.right * at.bottom);
    return sum;
}
