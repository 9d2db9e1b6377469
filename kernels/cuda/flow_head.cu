// A flow head: a 3x3 or 5x5 convolution of a channels-last map of a half type to two float channels, and its bias.
//
// With two outputs a convolution is all reading. So every pixel is read once (but for what strips share), straight into
// the rows of a matrix product whose columns are the filter: column (ky, kx, output). A product of the pixels of row r
// with the columns of ky is what r gives to row r + REACH - ky of the result; it is added to what the rows before gave
// to that one, since the sums of a ky go on as those of ky + 1 at the next row. After the last ky they hold, for every
// pixel, what it gives to each of its neighbours in the row (kx), which are added up through shared memory.
//
// A warp walks down a strip of 32 columns, of which it gives all but REACH on either side. A block has 4 warps: strips
// side by side, or `splits` warps that each take a share of one strip's channels, added up in that same last step. The
// block covers `rows` rows of the result.
//
// Channels go 32 at a time, a *chunk*. Lane (g, t) fetches channels 8t to 8t + 7 of pixels g, g + 8, g + 16, g + 24 and
// reads them back itself, some steps later: no barrier. Which channel is which of a product's k does not matter as long
// as both sides agree, so these 16 bytes are the lane's operands of two products as they are. So are the weights, which
// are packed (kernels/flow_head.py) as (chunk, tile of 8 columns, lane, 8 channels), and which all warps read.
#include "tensor_core.cuh"

constexpr int WARPS = 4, COLUMNS = 32, CHUNK = 32;
constexpr int STAGES = 3;  // chunks that a warp has memory for; all but one are on their way
constexpr int PITCH = COLUMNS + 4;  // floats: the four t of a warp meet different banks

// Tiles of columns. 3x3: one for each ky, of the columns (kx, output) and two of zeros. 5x5: one for each ky, for kx
// from 0 to 3, then two whose columns are (ky, output), for kx = 4: lane t has ky = t in the first, 4 + t in the second.
template <int KERNEL>
struct Sums {
    static constexpr int TILES = KERNEL == 3 ? 3 : 7;
    float of[2][TILES][4];  // by half of the 32 pixels, tile, and place as multiply_add has it

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) of[m][tile][i] = 0;
    }

    // The sums of each ky become those of ky + 1: the next row of pixels is one nearer to the end of the filter.
    __device__ __forceinline__ void go_on(int lane) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int ky = KERNEL - 1; ky > 0; --ky) of[m][ky][i] = of[m][ky - 1][i];
                of[m][0][i] = 0;
                if constexpr (KERNEL == 5) {
                    const float before = __shfl_sync(0xffffffffu, of[m][5][i], lane % 4 == 0 ? lane + 3 : lane - 1);
                    of[m][5][i] = lane % 4 == 0 ? 0 : before;
                    of[m][6][i] = lane % 4 == 0 ? before : 0;
                }
            }
    }

    // What the last ky holds, as (kx, output, pixel).
    __device__ __forceinline__ void give(float* given, int lane) const {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = m * 16 + i / 2 * 8 + g;
                if (t < KERNEL) given[(t * 2 + i % 2) * PITCH + column] = of[m][KERNEL - 1][i];
                if (KERNEL == 5 && t == 0) given[(4 * 2 + i % 2) * PITCH + column] = of[m][TILES - 1][i];
            }
    }
};

template <class T, int KERNEL>
__device__ __forceinline__ void flow_head(
    View<const T> x, const T* weights, const float* bias, float* out, int channels, int height, int width, int splits,
    int rows
) {
    constexpr int REACH = KERNEL / 2, GIVES = COLUMNS - 2 * REACH, TILES = Sums<KERNEL>::TILES;
    constexpr int OF_CHUNK = COLUMNS * CHUNK / 8, OF_WARP = KERNEL * 2 * PITCH;
    SHARED(uint4, fetched, WARPS * STAGES * OF_CHUNK);
    SHARED(float, given, 2 * WARPS * OF_WARP);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int share = warp % splits, strip = (int)blockIdx.x * (WARPS / splits) + warp / splits;
    const int n = (int)blockIdx.z, first_row = (int)blockIdx.y * rows, last_row = min(first_row + rows, height);
    const int chunks = (channels + CHUNK - 1) / CHUNK;
    const int first_chunk = share * chunks / splits, last_chunk = (share + 1) * chunks / splits;

    // --- fetching: always STAGES - 1 chunks ahead, row by row; what lies outside is zero ---
    uint4* const mine = fetched + warp * STAGES * OF_CHUNK + lane;
    const int column_of_0 = strip * GIVES - REACH + g, step = 8 * (int)x.x;  // of this lane's pixels
    unsigned inside = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) inside |= (column_of_0 + i * 8 >= 0 && column_of_0 + i * 8 < width) << i;
    int ahead_row = first_row - REACH, ahead_chunk = first_chunk;
    const T* from = x.at(n, 0, ahead_row, column_of_0);
    const auto fetch = [&](int stage) {
        const int channel = ahead_chunk * CHUNK + t * 8;
        const bool there = ahead_row >= 0 && ahead_row < min(last_row + REACH, height) && channel < channels;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            fetch_16(mine + stage * OF_CHUNK + i * 32, from + i * step + channel, there && inside >> i & 1);
        fetch_end();
        if (++ahead_chunk == last_chunk) ahead_chunk = first_chunk, ++ahead_row, from += x.y;
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);

    Sums<KERNEL> sums;
    sums.clear();
    int stage = 0, buffer = 0;
    for (int row = first_row - REACH; row < last_row + REACH; ++row) {
        for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
            fetch_wait<STAGES - 2>();
            uint4 pixels[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pixels[i] = mine[stage * OF_CHUNK + i * 32];
            fetch(stage == 0 ? STAGES - 1 : stage - 1);  // the one that was read in the last turn
            stage = stage == STAGES - 1 ? 0 : stage + 1;
            const uint4* const columns = (const uint4*)weights + chunk * TILES * 32 + lane;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 by = __ldg(columns + tile * 32);
                const unsigned first[2] = {by.x, by.y}, second[2] = {by.z, by.w};
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const uint4 low = pixels[2 * m], high = pixels[2 * m + 1];
                    const unsigned a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
                    multiply_add<T>(sums.of[m][tile], a, first);
                    multiply_add<T>(sums.of[m][tile], b, second);
                }
            }
        }

        // --- row y of the result is complete: its warps' shares are added up by one of them in turn ---
        const int y = row - REACH;
        if (y >= first_row) {
            float* const here = given + buffer * WARPS * OF_WARP;
            sums.give(here + warp * OF_WARP, lane);
            __syncthreads();  // one a row: with two buffers nobody writes to what is still read
            const int column = strip * GIVES + lane;
            if ((y - first_row) % splits == share && lane < GIVES && column < width) {
#pragma unroll
                for (int output = 0; output < 2; ++output) {
                    float sum = __ldg(bias + output);
                    for (int other = warp - share; other < warp - share + splits; ++other)
#pragma unroll
                        for (int kx = 0; kx < KERNEL; ++kx)
                            sum += here[other * OF_WARP + (kx * 2 + output) * PITCH + lane + kx];
                    out[(((long long)n * 2 + output) * height + y) * width + column] = sum;
                }
            }
            __syncwarp();  // products are made by all lanes together
            buffer ^= 1;
        }
        sums.go_on(lane);
    }
}

#define HEAD_ENTRY(kernel, name, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, kernel == 3 ? 4 : 3) flow_head_##kernel##_##name(         \
        VIEW(const T, x), const T* weights, const float* bias, float* out, int channels, int height, int width,        \
        int splits, int rows                                                                                           \
    ) {                                                                                                                \
        flow_head<T, kernel>(AS_VIEW(const T, x), weights, bias, out, channels, height, width, splits, rows);          \
    }
HEAD_ENTRY(3, half, __half)
HEAD_ENTRY(3, bfloat16, __nv_bfloat16)
HEAD_ENTRY(5, half, __half)
HEAD_ENTRY(5, bfloat16, __nv_bfloat16)

// --- what a 5x5 head that stands for two layers adds too much at the borders -----------------------------------------
//
// A warp a pixel of the border, which are numbered: the first row, the last, then the rows between, left and right. Its
// lanes share the channels, 8 each. `along`: (side, place along it, output, channel), the sides being above, below, left
// and right; `corners`: (corner, output, channel), above left, above right, below left, below right.

template <class T>
__device__ __forceinline__ void add_products(
    float (&sums)[2], const Several<T, 8>& pixel, const float* weights, int channels
) {
    const T* const values = pixel.values;
#pragma unroll
    for (int output = 0; output < 2; ++output)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const float4 by = __ldg((const float4*)(weights + output * channels) + part);
            sums[output] += widened(values[part * 4]) * by.x + widened(values[part * 4 + 1]) * by.y +
                            widened(values[part * 4 + 2]) * by.z + widened(values[part * 4 + 3]) * by.w;
        }
}

template <class T>
__device__ __forceinline__ void take_off_borders(
    View<const T> x, const float* along, const float* along_constants, const float* corners,
    const float* corner_constants, float* out, int batch, int channels, int height, int width
) {
    const int lane = (int)threadIdx.x % 32, rows = min(height, 2), columns = min(width, 2);
    const int border = rows * width + (height - rows) * columns;
    const long long number = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int n = (int)(number / border), p = (int)(number % border);
    if (n >= batch) return;  // the whole warp
    const bool in_rows = p < rows * width;
    const int y = in_rows ? p / width * (height - 1) : 1 + (p - rows * width) / columns;
    const int column = in_rows ? p % width : (p - rows * width) % columns * (width - 1);

    float sums[2] = {0, 0}, again[2] = {0, 0}, constants[2] = {0, 0};  // again: a corner is taken off with two sides
    const unsigned beyond = (y == 0) | (y == height - 1) << 1 | (column == 0) << 2 | (column == width - 1) << 3;
    const T* const middle = x.at(n, 0, y, column);
#pragma unroll 1
    for (int side = 0; side < 4; ++side) {
        if (!(beyond >> side & 1)) continue;
        const int step_y = side / 2, step_x = 1 - side / 2;
        const long long step = step_y ? x.y : x.x;
#pragma unroll 1
        for (int c = lane * 8; c < channels; c += 32 * 8) {
            Several<T, 8> pixels[5];  // all on their way before the first is needed
#pragma unroll
            for (int k = 0; k < 5; ++k) {
                const int from_y = y + (k - 2) * step_y, from_x = column + (k - 2) * step_x;
                if (from_y >= 0 && from_y < height && from_x >= 0 && from_x < width) {
                    pixels[k] = *(const Several<T, 8>*)(middle + (k - 2) * step + c);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) store(pixels[k].values + i, 0);
                }
            }
#pragma unroll
            for (int k = 0; k < 5; ++k)
                add_products(sums, pixels[k], along + (side * 5 + k) * 2 * channels + c, channels);
        }
        for (int output = 0; output < 2; ++output) constants[output] += along_constants[side * 2 + output];
    }
#pragma unroll 1
    for (int corner = 0; corner < 4; ++corner) {
        if (!(beyond >> corner / 2 & 1) || !(beyond >> (2 + corner % 2) & 1)) continue;
        for (int c = lane * 8; c < channels; c += 32 * 8) {
            const Several<T, 8> pixel = *(const Several<T, 8>*)(middle + c);
            add_products(again, pixel, corners + corner * 2 * channels + c, channels);
        }
        for (int output = 0; output < 2; ++output) constants[output] -= corner_constants[corner * 2 + output];
    }
#pragma unroll
    for (int output = 0; output < 2; ++output) {
        float sum = sums[output] - again[output];
        for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (lane == 0) out[(((long long)n * 2 + output) * height + y) * width + column] -= sum + constants[output];
    }
}

#define BORDERS_ENTRY(name, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) flow_head_borders_##name(                                        \
        VIEW(const T, x), const float* along, const float* along_constants, const float* corners,                      \
        const float* corner_constants, float* out, int batch, int channels, int height, int width                      \
    ) {                                                                                                                \
        take_off_borders<T>(                                                                                           \
            AS_VIEW(const T, x), along, along_constants, corners, corner_constants, out, batch, channels, height,      \
            width                                                                                                      \
        );                                                                                                             \
    }
BORDERS_ENTRY(half, __half)
BORDERS_ENTRY(bfloat16, __nv_bfloat16)
