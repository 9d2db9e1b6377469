// Maps written a whole pixel at a time: each block takes a tile of pixels, each thread a column of ROWS pixels in it.
//
// A warp takes 32 such columns. A thread fetches once what several of its pixels read. Threads beyond the picture's
// right edge do not return, but repeat the last column, since neighbouring lanes store for each other.
#pragma once

#include "common.cuh"

constexpr int ROWS = 4, TILE_COLUMNS = 32;  // as in pixels.py; each of a block's 8 warps has ROWS rows

// This thread's first pixel. `inside` tells whether the column lies in the picture; all lanes of a warp have the same
// rows, which may lie below the picture.
__device__ __forceinline__ Pixel column_of_tile(int width) {
    const int x = (int)(blockIdx.x * TILE_COLUMNS + threadIdx.x % TILE_COLUMNS);
    const int y = (int)(blockIdx.y * (blockDim.x / TILE_COLUMNS) + threadIdx.x / TILE_COLUMNS) * ROWS;
    return {(int)blockIdx.z, y, x < width ? x : width - 1, x < width};
}

constexpr int PIECE = 16;  // bytes of a store

__device__ __forceinline__ uint4 exchanged(uint4 mine) {  // with the neighbouring lane
    return {__shfl_xor_sync(0xffffffffu, mine.x, 1), __shfl_xor_sync(0xffffffffu, mine.y, 1),
            __shfl_xor_sync(0xffffffffu, mine.z, 1), __shfl_xor_sync(0xffffffffu, mine.w, 1)};
}

// Word by word: a selection between two uint4 as a whole would become two branches.
__device__ __forceinline__ uint4 chosen(bool one, uint4 a, uint4 b) {
    return {one ? a.x : b.x, one ? a.y : b.y, one ? a.z : b.z, one ? a.w : b.w};
}

// Stores a column's pixels in a dense channels-last map, one after the other: their values, then zeros up to CHANNELS.
// All lanes of a warp must construct it and call write() together.
//
// Memory is written in sectors of 32 bytes. So lanes 2i and 2i + 1 together store 32 bytes of the one's pixel at once,
// then of the other's: each lane passes its neighbour the piece that the neighbour stores.
template <class T, int CHANNELS>
class Pixels {
    static constexpr int EACH = PIECE / (int)sizeof(T), PIECES = CHANNELS / EACH;
    static_assert(CHANNELS % EACH == 0 && (PIECES == 1 || PIECES % 2 == 0), "whole pieces");

    T* place;     // of this lane's first piece in the first of the two pixels
    bool second;  // whether this lane's own pixel is the second of them
    bool first_inside, second_inside;
    int row;

public:
    __device__ __forceinline__ Pixels(T* map, const Pixel& p, int height, int width) : row(width * CHANNELS) {
        place = map + (((long long)p.n * height + p.y) * width + p.x) * CHANNELS;
        second = threadIdx.x % 2 != 0;
        first_inside = second_inside = p.inside;
        if (PIECES == 1) return;
        const bool beside = __shfl_xor_sync(0xffffffffu, (int)p.inside, 1) != 0;
        if (second && p.inside) place -= CHANNELS;  // beyond the edge it is the first's place already
        if (second) first_inside = beside, place += EACH;
        else second_inside = beside;
    }

    template <int COUNT>
    __device__ __forceinline__ void write(const float (&values)[COUNT]) {
        static_assert(COUNT <= CHANNELS, "values beyond the pixel");
        uint4 pieces[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            T rounded[EACH];
#pragma unroll
            for (int k = 0; k < EACH; ++k) {
                const int c = i * EACH + k;
                store(rounded + k, c < COUNT ? values[c < COUNT ? c : 0] : 0.0f);
            }
            memcpy(pieces + i, rounded, PIECE);
        }
        if (PIECES == 1 && first_inside) __stwb((uint4*)place, pieces[0]);
#pragma unroll
        for (int i = 0; i + 1 < PIECES; i += 2) {
            const uint4 other = exchanged(chosen(second, pieces[i], pieces[i + 1]));
            uint4* const to = (uint4*)(place + i * EACH);
            if (first_inside) __stwb(to, chosen(second, other, pieces[i]));
            if (second_inside) __stwb(to + PIECES, chosen(second, pieces[i + 1], other));
        }
        place += row;
    }
};
