// Dense channels-last maps of few channels, a whole pixel at a time: a tile of pixels for each block, one for each thread.
//
// A warp takes 32 pixels of one row, a block 8 rows of them: what neighbouring rows fetch of the same places comes from
// the cache. Threads beyond the picture go on, with the pixel at its edge, since neighbours store for each other.
#pragma once

#include "common.cuh"

constexpr int TILE_ROWS = 8, TILE_COLUMNS = 32;  // as in launch.py

// `blockIdx.x` runs along x, then y, then the batch. `inside` tells whether the pixel is this thread's own.
__device__ __forceinline__ Pixel pixel_of_tile(int height, int width) {
    const int across = (width + TILE_COLUMNS - 1) / TILE_COLUMNS, down = (height + TILE_ROWS - 1) / TILE_ROWS;
    const int row_of_tiles = (int)blockIdx.x / across, n = row_of_tiles / down;
    const int x = (int)blockIdx.x % across * TILE_COLUMNS + (int)threadIdx.x % TILE_COLUMNS;
    const int y = row_of_tiles % down * TILE_ROWS + (int)threadIdx.x / TILE_COLUMNS;
    return {n, y < height ? y : height - 1, x < width ? x : width - 1, y < height && x < width};
}

constexpr int PIECE = 16;  // bytes of a store

__device__ __forceinline__ uint4 exchanged(uint4 mine) {  // with the neighbouring lane
    return {__shfl_xor_sync(0xffffffffu, mine.x, 1), __shfl_xor_sync(0xffffffffu, mine.y, 1),
            __shfl_xor_sync(0xffffffffu, mine.z, 1), __shfl_xor_sync(0xffffffffu, mine.w, 1)};
}

// Stores the pixel: its values, then zeros up to CHANNELS. All threads of a tile come here.
//
// Memory takes 32 bytes at a time. So lanes 2i and 2i + 1 store one pixel together, 32 bytes of it at once, then the
// other: each gives its neighbour what that one stores.
template <int CHANNELS, int COUNT, class T>
__device__ __forceinline__ void write_pixel(T* map, const Pixel& p, int height, int width, const float (&values)[COUNT]) {
    constexpr int EACH = PIECE / (int)sizeof(T), PIECES = CHANNELS / EACH;
    static_assert(CHANNELS % EACH == 0 && COUNT <= CHANNELS && (PIECES == 1 || PIECES % 2 == 0), "whole pieces");
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
    T* const own = map + (((long long)p.n * height + p.y) * width + p.x) * CHANNELS;
    if (PIECES == 1) {
        if (p.inside) *(uint4*)own = pieces[0];
        return;
    }
    const int second = (int)threadIdx.x % 2;  // whether this lane is the second of the two
    const bool inside = p.inside, beside = __shfl_xor_sync(0xffffffffu, (int)inside, 1) != 0;
    T* const pair = own - (second && inside ? CHANNELS : 0);  // a second one beyond the edge stands at the first's
#pragma unroll
    for (int i = 0; i + 1 < PIECES; i += 2) {
        const uint4 other = exchanged(second ? pieces[i] : pieces[i + 1]);
        T* const place = pair + (i + second) * EACH;
        if (second ? beside : inside) *(uint4*)place = second ? other : pieces[i];
        if (second ? inside : beside) *(uint4*)(place + CHANNELS) = second ? pieces[i + 1] : other;
    }
}
