// A flow head: a 3x3 or 5x5 convolution of a channels-last map of half precision to two float channels, and its bias.
//
// With two outputs a convolution is bound by reading. So every pixel is read once (but for what strips share), straight
// into the rows of a matrix product whose columns are the filter: column (ky, kx, output). The product of the pixels of
// row r with the columns of ky is what r contributes to row r + REACH - ky of the result. It is added to what the rows
// before contributed to that row: at the next row of pixels the sums of each ky become those of ky + 1. After the last
// ky they hold, for every pixel, its contribution to each of its neighbours in the row (kx); these are added up through
// shared memory.
//
// A warp walks down a strip of 32 columns, of which it computes all but REACH on either side. A block has 4 warps:
// `splits` warps each take a share of one strip's channels, which are added up in that same last step, and 4 / splits
// strips lie side by side. The block covers `rows` rows of the result.
//
// Channels go 32 at a time, a *chunk*. Lane (g, t) fetches channels 8t to 8t + 7 of pixels g, g + 8, g + 16, g + 24
// into shared memory and reads them back itself, some steps later: no barrier is needed. It does not matter which
// channel is which k of a product as long as both operands agree, so these 16 bytes serve unchanged as the lane's
// operands of two products. So do the weights, which are packed (kernels/flow_head.py) as (chunk, tile of 8 columns,
// lane, 8 channels) and read by all warps.
#include "tensor_core.cuh"

constexpr int WARPS = 4, COLUMNS = 32, CHUNK = 32;
constexpr int STAGES = 3;  // chunks that a warp has shared memory for; all but one are in flight
constexpr int PITCH = COLUMNS + 4;  // floats; with it the four t of a warp use different banks

// Tiles of columns. 3x3: one for each ky, with columns (kx, output) and two columns of zeros. 5x5: one for each ky, for
// kx = 0 to 3, then two with columns (ky, output), for kx = 4: lane t has ky = t in the first, 4 + t in the second.
template <int KERNEL>
struct Sums {
    static constexpr int TILES = KERNEL == 3 ? 3 : 7;
    float of[2][TILES][4];  // by half of the 32 pixels, tile, and index in multiply_add's d

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) of[m][tile][i] = 0;
    }

    // The sums of each ky become those of ky + 1: to a row of the result, the next row of pixels is one filter row on.
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

    // Stores the sums of the last ky as (kx, output, pixel).
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

    // --- fetching, always STAGES - 1 chunks ahead, row by row; what lies outside is zero ---
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
            fetch(stage == 0 ? STAGES - 1 : stage - 1);  // into the stage that was read in the previous turn
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

        // --- row y of the result is complete: the shares of a strip's warps are added up, by one of them in turn ---
        const int y = row - REACH;
        if (y >= first_row) {
            float* const here = given + buffer * WARPS * OF_WARP;
            sums.give(here + warp * OF_WARP, lane);
            __syncthreads();  // one a row: with two buffers no warp writes to what another still reads
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
            __syncwarp();  // all lanes must take part in the next product
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

// --- the excess at the borders of a 5x5 head that is merged from two layers ------------------------------------------
//
// The border of a picture is four lines: the first row, the last row, then the left and the right column between them.
// A line is cut into runs of RUN pixels, of which a warp takes 4. Lane (run, output, t) has channels 8t to 8t + 7 of
// each chunk, and uses their weights for all pixels of its run. `splits` warps of a block share the chunks, and one of
// them adds up their sums.
//
// `along`: (side, filter place along it, output, channel), the sides being above, below, left and right; `corners`:
// (corner, output, channel), above left, above right, below left, below right. The corners' pixels belong to the rows;
// only they also lie at a side across their line.
constexpr int BORDER_WARPS = 8, RUN = 4, TAPS = 5;  // as in flow_head.py

// A lane's channels: 8 of every `step`, from `first` on, below `all`.
struct Channels {
    int first, step, all;
};

// Adds the products of a pixel's 8 channels and their weights.
template <class T>
__device__ __forceinline__ void add_product(float& sum, const uint4& pixel, const float4& low, const float4& high) {
    Several<T, 8> of;
    memcpy(&of, &pixel, sizeof of);
    const T* const x = of.values;
    sum += widened(x[0]) * low.x + widened(x[1]) * low.y + widened(x[2]) * low.z + widened(x[3]) * low.w;
    sum += widened(x[4]) * high.x + widened(x[5]) * high.y + widened(x[6]) * high.z + widened(x[7]) * high.w;
}

// Adds the excess of one side, for one output, at COUNT neighbours in a line: from `pixel` on, at `place` of `size`.
template <int COUNT, class T>
__device__ __forceinline__ void add_side(
    float (&sums)[COUNT], const T* pixel, long long step, int place, int size, const float* filter, Channels channels
) {
#pragma unroll 1
    for (int c = channels.first; c < channels.all; c += channels.step) {
        uint4 near[COUNT + TAPS - 1];  // these and the weights are in flight before the first is needed
#pragma unroll
        for (int i = 0; i < COUNT + TAPS - 1; ++i) {
            const int away = i - TAPS / 2;
            const bool inside = place + away >= 0 && place + away < size;
            near[i] = inside ? __ldg((const uint4*)(pixel + away * step + c)) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            const float4* const by = (const float4*)(filter + k * 2 * channels.all + c);
            const float4 low = __ldg(by), high = __ldg(by + 1);
#pragma unroll
            for (int r = 0; r < COUNT; ++r) add_product<T>(sums[r], near[r + k], low, high);
        }
    }
}

template <class T>
__device__ __forceinline__ void take_off_borders(
    View<const T> x, const float* along, const float* along_constants, const float* corners,
    const float* corner_constants, float* out, int all_channels, int height, int width, int splits
) {
    SHARED(float, given, BORDER_WARPS * 32);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, t = lane % 4, output = lane / 4 % 2;
    const int share = warp % splits, n = (int)blockIdx.y;
    const Channels channels = {(share * 4 + t) * 8, splits * CHUNK, all_channels};
    const bool adds_constants = share == 0 && t == 0;  // one lane of each run and output

    // --- which pixels ---
    const int rows = min(height, 2), columns = min(width, 2);
    const int of_row = (width + RUN - 1) / RUN, of_column = (height - rows + RUN - 1) / RUN;  // runs
    const int run = ((int)blockIdx.x * (BORDER_WARPS / splits) + warp / splits) * 4 + lane / 8;
    const int after = run - rows * of_row;
    const bool there = run < rows * of_row + columns * of_column, in_row = after < 0;
    const int y = in_row ? run / of_row * (height - 1) : 1 + after % max(of_column, 1) * RUN;  // of the first
    const int first = in_row ? run % of_row * RUN : after / max(of_column, 1) * (width - 1);   // its column
    const int count = !there ? 0 : in_row ? width - first : height - 1 - y;  // may be more than RUN
    const unsigned at_row = (y == 0) | (y == height - 1) << 1, at_column = (first == 0) | (first == width - 1) << 1;
    const unsigned beside = !there ? 0 : in_row ? at_row : at_column << 2;  // bit mask of the sides this line lies at
    const T* const pixel = x.at(n, 0, y, first);

    // --- the head's result, loaded early. Lane t reads and writes pixel t of its run ---
    static_assert(RUN == 4, "a lane a pixel");
    float* const place = out + (((long long)n * 2 + output) * height + y) * width + first + (in_row ? t : t * width);
    const bool writes = share == 0 && t < count;
    const float before = writes ? *place : 0;

    float sums[RUN] = {};
#pragma unroll 1
    for (int side = 0; side < 4; ++side) {
        if (!(beside >> side & 1)) continue;
        const float* const filter = along + (side * TAPS * 2 + output) * all_channels;
        add_side(sums, pixel, in_row ? x.x : x.y, in_row ? first : y, in_row ? width : height, filter, channels);
        const float constant = adds_constants ? along_constants[side * 2 + output] : 0;
#pragma unroll
        for (int r = 0; r < RUN; ++r) sums[r] += constant;
    }

    // --- the ends of rows also lie at a side across, and at corners, which are counted twice ---
#pragma unroll 1
    for (int end = 0; end < 2; ++end) {
        const int r = end ? width - 1 - first : -first;  // which pixel of the run
        if (!in_row || r < 0 || r >= RUN) continue;
        const T* const here = pixel + r * x.x;
        float sum[1] = {}, again = 0;
        add_side(sum, here, x.y, y, height, along + ((2 + end) * TAPS * 2 + output) * all_channels, channels);
        if (adds_constants) sum[0] += along_constants[(2 + end) * 2 + output];
#pragma unroll 1
        for (int corner = end; corner < 4; corner += 2) {
            if (!(beside >> corner / 2 & 1)) continue;
            for (int c = channels.first; c < channels.all; c += channels.step) {
                const float4* const by = (const float4*)(corners + (corner * 2 + output) * all_channels + c);
                add_product<T>(again, __ldg((const uint4*)(here + c)), __ldg(by), __ldg(by + 1));
            }
            if (adds_constants) again += corner_constants[corner * 2 + output];
        }
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (i == r) sums[i] += sum[0] - again;
    }

    // --- adding up over the four lanes that share a run's output, then over the warps ---
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        float sum = sums[r];
        for (int other = 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (t == r) given[warp * 32 + lane] = sum;
    }
    __syncthreads();
    if (!writes) return;
    float sum = 0;
    for (int other = 0; other < splits; ++other) sum += given[(warp + other) * 32 + lane];
    *place = before - sum;
}

#define BORDERS_ENTRY(name, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * BORDER_WARPS, 2) flow_head_borders_##name(                       \
        VIEW(const T, x), const float* along, const float* along_constants, const float* corners,                      \
        const float* corner_constants, float* out, int channels, int height, int width, int splits                     \
    ) {                                                                                                                \
        take_off_borders<T>(                                                                                           \
            AS_VIEW(const T, x), along, along_constants, corners, corner_constants, out, channels, height, width,      \
            splits                                                                                                     \
        );                                                                                                             \
    }
BORDERS_ENTRY(half, __half)
BORDERS_ENTRY(bfloat16, __nv_bfloat16)
