// A convolution with its bias and LeakyReLU, on tensor cores, channels last: out = f(w * x + bias), rounded once.
//
// A block of 4 warps computes a tile of 16 x 4 ROWS pixels, OUTPUTS channels of each. A warp has ROWS rows of the tile;
// the 16 pixels of such a row are the 16 rows of one matrix product. The product's columns are output channels, and the
// summed dimension (k) is filter row, filter column and input channel. A filter row is read 8 values at a time, as it
// lies in the tile's input in shared memory, wherever the pixel's values begin: a *half step*. A tensor core product
// takes two of them. Where a filter row's length is not a multiple of 8, its last half step ends in the next pixel, and
// where the number of half steps is odd, the last is taken twice: the weights there are zero.
//
// CHANNELS is the smallest number that holds the real inputs (4 of 8, 12 of 16): the padding is not fetched. Maps of
// more than 16 channels go through two buffers, CHANNELS at a time. What lies outside the picture or the map is zero.
//
// Weights come from the caches in the order in which the lanes need them (`pack` in convolution.py), always one step
// ahead. `pack` also gives a lane neighbouring output channels, which it stores at once.
//
// A 4x4 deconvolution of stride 2: each pixel gives 2x2 results, and each of the four depends on 2x2 of the pixel's 3x3
// neighbours. So it is a 3x3 convolution with four times the outputs, in which 20 of 36 products are skipped, because
// their weights are zero.
#include "tensor_core.cuh"

constexpr int WARPS = 4, COLUMNS = 16, TOGETHER = 8;

template <int BYTES>
struct Word;
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

// One store: the compiler was seen to split a plain copy, of the struct or of a word, into stores of 2 or 4 bytes.
template <class T, int COUNT>
__device__ __forceinline__ void put(T* place, const Several<T, COUNT>& values) {
    typename Word<sizeof values>::type word;
    memcpy(&word, &values, sizeof word);
    __stwb((decltype(word)*)place, word);
}

struct Steps {  // offsets from a pixel to one a few rows and columns away, in elements
    int y, x;
    __device__ __forceinline__ Steps(int y, int x) : y(y), x(x) {}
    __device__ __forceinline__ long long to(int down, int right) const { return (long long)down * y + right * x; }
};

template <int KERNEL, int STRIDE, int CHANNELS, int OUTPUTS, int ROWS, int ENLARGES>
struct Layout {
    static constexpr int HALVES = (KERNEL * CHANNELS + TOGETHER - 1) / TOGETHER;  // half steps of a filter row
    static constexpr int STEPS = (KERNEL * HALVES + 1) / 2;
    static constexpr int TILES = OUTPUTS / 8, PAIRS = TILES / 2;  // products side by side, 8 columns each
    static constexpr int RUN = ENLARGES ? 4 : 8;  // neighbouring channels of a lane
    static constexpr int UNROLLED = ENLARGES ? STEPS : ROWS == 4 ? 3 : 1;  // as registers allow

    // A row of the tile. The half steps of eight neighbouring pixels are read at once, 16 bytes each, and must lie in
    // different banks. So if CHANNELS is a multiple of 8, the row is stored 8 channels at a time (a part), and with a
    // stride of 2 even and odd columns separately (a phase): what is read at once is then 128 contiguous bytes. With 4
    // or 12 channels and a stride of 2, half steps that are read at once lie 16 or 48 bytes apart, which is as good.
    static constexpr bool BY_EIGHTS = CHANNELS % TOGETHER == 0;
    static constexpr int APART = BY_EIGHTS ? TOGETHER : STRIDE * CHANNELS;  // from one output's pixel to the next's
    static constexpr int WIDTH = BY_EIGHTS  // pixels, including those of the last half step
        ? (COLUMNS - 1) * STRIDE + KERNEL
        : ((COLUMNS - 1) * APART + HALVES * TOGETHER + CHANNELS - 1) / CHANNELS;
    static constexpr int PHASE = (WIDTH + STRIDE - 1) / STRIDE * TOGETHER, PARTS = BY_EIGHTS ? CHANNELS / TOGETHER : 1;
    static constexpr int PITCH =
        BY_EIGHTS ? PARTS * STRIDE * PHASE : (WIDTH * CHANNELS + TOGETHER - 1) / TOGETHER * TOGETHER;
    static constexpr int HEIGHT = (WARPS * ROWS - 1) * STRIDE + KERNEL;
    static constexpr int BUFFER = HEIGHT * PITCH;  // elements
    static constexpr int PIECE = BY_EIGHTS ? TOGETHER : 4;  // fetched at once
    static constexpr int PIECES = WIDTH * CHANNELS / PIECE, TURNS = (HEIGHT * PIECES + 32 * WARPS - 1) / (32 * WARPS);
    static constexpr int AT_ONCE = CHANNELS < 16 ? 4 : 1;  // unrolled, as registers allow
    static_assert(BY_EIGHTS || APART == 8 || APART == 24, "half steps are aligned, and in different banks");

    static __device__ __forceinline__ int place_of(int column, int channel) {
        return BY_EIGHTS ? (channel / TOGETHER * STRIDE + column % STRIDE) * PHASE + column / STRIDE * TOGETHER
                         : column * CHANNELS + channel;
    }
    static __device__ __forceinline__ int half_step(int h) {  // its offset from the pixel's first half step
        const int real = h < KERNEL * HALVES ? h : KERNEL * HALVES - 1;
        const int inside = real % HALVES * TOGETHER;  // values of the filter row before it
        return real / HALVES * PITCH + (BY_EIGHTS ? place_of(inside / CHANNELS, inside % CHANNELS) : inside);
    }
    // For a deconvolution: whether one of the 3x3 neighbours contributes to one of the 2x2 results.
    static __device__ __forceinline__ bool meet(int neighbour, int pair) {
        const int dy = neighbour / 3, dx = neighbour % 3;
        return !ENLARGES || ((pair / 2 ? dy >= 1 : dy <= 1) && (pair % 2 ? dx >= 1 : dx <= 1));
    }
    static_assert(!ENLARGES || (KERNEL == 3 && CHANNELS == 16 && OUTPUTS == 64), "a step is one neighbour");
};

template <class T, int KERNEL, int STRIDE, int CHANNELS, int OUTPUTS, int ROWS, int ENLARGES>
__device__ __forceinline__ void convolution(
    View<const T> x, const T* weights, const float* bias, View<T> out, View<T> also, int twice, int channels,
    int height, int width, int out_height, int out_width, int groups, int padding, float slope
) {
    using L = Layout<KERNEL, STRIDE, CHANNELS, OUTPUTS, ROWS, ENLARGES>;
    constexpr int BUFFERS = CHANNELS == 16 ? 2 : 1;
    SHARED(uint4, memory, BUFFERS * L::BUFFER * 2 / 16);
    T* const buffers = (T*)memory;

    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = (int)blockIdx.x % groups, column = (int)blockIdx.x / groups * COLUMNS;  // groups share their input
    const int row = (int)blockIdx.y * WARPS * ROWS, n = (int)blockIdx.z;
    const int chunks = BUFFERS == 1 ? 1 : (channels + CHANNELS - 1) / CHANNELS;

    // --- fetching CHANNELS of the tile's input; offsets within a row fit in 31 bits ---
    const int top = row * STRIDE - padding, left = column * STRIDE - padding, next_y = (int)x.y, next_x = (int)x.x;
    const T* const picture = x.data + n * x.n;
    const auto fetch = [&](int first, T* to) {
#pragma unroll(L::AT_ONCE)
        for (int turn = 0; turn < L::TURNS; ++turn) {
            const int k = turn * 32 * WARPS + (int)threadIdx.x;
            if (k >= L::HEIGHT * L::PIECES) break;
            const int i = k / L::PIECES, j = k % L::PIECES * L::PIECE / CHANNELS, channel = k * L::PIECE % CHANNELS;
            const int y = top + i, from_x = left + j;
            const bool inside = (unsigned)y < (unsigned)height && (unsigned)from_x < (unsigned)width  // nor negative
                && first + channel < channels;
            const T* const source = picture + (inside ? (long long)y * next_y + (from_x * next_x + first + channel) : 0);
            T* const target = to + i * L::PITCH + L::place_of(j, channel);
            if (L::PIECE == 8) fetch_16(target, source, inside);
            else fetch_8(target, source, inside);
        }
        fetch_end();
    };

    // --- the weights of one step: 16 bytes per lane for each pair of products ---
    const uint4* w = (const uint4*)weights + (long long)group * chunks * L::STEPS * L::PAIRS * 32 + lane;
    uint4 next[L::PAIRS];
#pragma unroll
    for (int p = 0; p < L::PAIRS; ++p) next[p] = __ldg(w + p * 32);

    // --- sums begin with the bias; a lane's RUN neighbouring channels come from RUN / 2 products ---
    constexpr int RUNS = L::TILES * 2 / L::RUN, FROM_RUN_TO_RUN = ENLARGES ? 0 : 4 * L::RUN;
    const int channel = group * (ENLARGES ? OUTPUTS / 4 : OUTPUTS) + t * L::RUN;  // first of this lane
    float sums[ROWS][L::TILES][4];
#pragma unroll
    for (int q = 0; q < L::TILES * 2; ++q) {
        const float first = bias[channel + q / L::RUN * FROM_RUN_TO_RUN + q % L::RUN];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r][q / 2][q % 2] = sums[r][q / 2][2 + q % 2] = first;
    }

    const int pixel = warp * ROWS * STRIDE * L::PITCH + lane % 16 * L::APART;  // of the first row
    fetch(0, buffers);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        fetch_wait<0>();
        __syncthreads();  // this chunk has arrived, and no thread reads the one before any more
        if (BUFFERS == 2 && chunk + 1 < chunks)
            fetch((chunk + 1) * CHANNELS, buffers + (chunk + 1) % BUFFERS * L::BUFFER);
        const T* const buffer = buffers + chunk % BUFFERS * L::BUFFER;
#pragma unroll(L::UNROLLED)
        for (int s = 0; s < L::STEPS; ++s) {
            const int place = pixel + (lane < 16 ? L::half_step(2 * s) : L::half_step(2 * s + 1));
            unsigned a[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) load_matrices<false>(a[r], buffer + place + r * STRIDE * L::PITCH);
            w += L::PAIRS * 32;
#pragma unroll
            for (int p = 0; p < L::PAIRS; ++p) {
                const unsigned even[2] = {next[p].x, next[p].y}, odd[2] = {next[p].z, next[p].w};
                if (L::meet((s + 1) % L::STEPS, p)) next[p] = __ldg(w + p * 32);  // one more step lies behind the last
                if (!L::meet(s, p)) continue;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    multiply_add<T>(sums[r][2 * p], a[r], even);
                    multiply_add<T>(sums[r][2 * p + 1], a[r], odd);
                }
            }
        }
    }

    // --- LeakyReLU and rounding: a warp stores 8 neighbouring pixels at once, the channels of each from 4 lanes ---
    constexpr int SCALE = ENLARGES ? 2 : 1;
    const int y = row + warp * ROWS, own_x = column + g;  // of the first pixel
    const Steps of_out((int)out.y, (int)out.x), of_also((int)also.y, (int)also.x);
    T* const target = out.at(n, 0, SCALE * y, SCALE * own_x) + channel;
    T* const second = also.at(n, 0, SCALE * y, SCALE * own_x) + channel;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            if (y + r >= out_height || own_x + 8 * side >= out_width) continue;
#pragma unroll
            for (int q = 0; q < RUNS; ++q) {
                Several<T, L::RUN> all;
#pragma unroll
                for (int k = 0; k < L::RUN; ++k) {
                    const float value = sums[r][q * L::RUN / 2 + k / 2][2 * side + k % 2];
                    store(all.values + k, fmaxf(value, value * slope));
                }
                const int down = SCALE * r + (ENLARGES ? q / 2 : 0), right = SCALE * 8 * side + (ENLARGES ? q % 2 : 0);
                put(target + of_out.to(down, right) + q * FROM_RUN_TO_RUN, all);
                if (twice) put(second + of_also.to(down, right) + q * FROM_RUN_TO_RUN, all);
            }
        }
    }
}

// BLOCKS: at least so many are resident on a multiprocessor, which limits the registers of each thread.
#define ENTRY_OF(type, T, KERNEL, STRIDE, CHANNELS, OUTPUTS, ROWS, ENLARGES, BLOCKS)                                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                 \
        convolution_##KERNEL##_##STRIDE##_##CHANNELS##_##OUTPUTS##_##ROWS##_##ENLARGES##_##type(                     \
            VIEW(const T, x), const T* weights, const float* bias, VIEW(T, out), VIEW(T, also), int twice,           \
            int channels, int height, int width, int out_height, int out_width, int groups, int padding, float slope \
        ) {                                                                                                          \
        convolution<T, KERNEL, STRIDE, CHANNELS, OUTPUTS, ROWS, ENLARGES>(                                           \
            AS_VIEW(const T, x), weights, bias, AS_VIEW(T, out), AS_VIEW(T, also), twice, channels, height, width,   \
            out_height, out_width, groups, padding, slope                                                            \
        );                                                                                                           \
    }
#define ENTRIES(...) ENTRY_OF(half, __half, __VA_ARGS__) ENTRY_OF(bfloat16, __nv_bfloat16, __VA_ARGS__)
ENTRIES(7, 2, 4, 64, 4, 0, 2)
ENTRIES(7, 2, 8, 64, 4, 0, 2)
ENTRIES(7, 2, 12, 64, 4, 0, 2)
ENTRIES(3, 1, 8, 64, 2, 0, 4)
ENTRIES(3, 1, 16, 64, 2, 0, 4)
ENTRIES(3, 1, 16, 64, 4, 1, 2)
