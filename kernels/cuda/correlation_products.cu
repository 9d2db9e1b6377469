// Cost volume of half-precision maps, channels last, on tensor cores: the same result as correlation.cu, for two radii.
//
// Only pixels whose x and y agree modulo the stride are compared: they form a *phase*, a picture of its own, in which
// neighbouring displacements are neighbouring pixels. For 16 pixels in a row of a's phase, and a row of b's phase,
//
//     16 x channels of a   times   channels x (16 + 2 RADIUS) of b   =   16 x (16 + 2 RADIUS)
//
// contains all costs of these pixels for one dy: pixel m with dx is in row m, column m + dx. The rest is discarded.
//
// A warp owns 16 pixels of each of OWN rows of a, with all their channels in registers. It goes through the rows of b
// and multiplies each by all the rows that it owns, for which it has a different dy each. The warps of a block own rows
// below each other and pixels beside each other, and share the rows of b, which come through STAGES buffers in shared
// memory, CHANNELS at a time. The rows of b that the same pixels need are divided among `shares` blocks, so that a
// small picture keeps a whole GPU busy.
//
// The order in which channels are summed does not matter. So lane t of four takes channels 8t to 8t + 7 of 32, for a as
// for b, in one 16-byte read; each of two products of depth 16 gets four of them, in the places where it expects
// channels 2t, 2t + 1, 2t + 8, 2t + 9.
//
// Rows of b beyond the picture are not multiplied: there the result is 0 even where a is not finite.
#include "tensor_core.cuh"

constexpr int DOWN = 2, ACROSS = 2, OWN = 2;  // warps of a block, and rows that each owns
constexpr int STAGES = 3;                     // 47 kB of shared memory; registers: nearly all that BLOCKS allow
constexpr int WARPS = DOWN * ACROSS, THREADS = 32 * WARPS, BLOCKS = 8 / WARPS, TILE = 16 * ACROSS, ROWS = OWN * DOWN;
constexpr int CHANNELS = 128, CHUNKS = 2;           // per stage, and the most stages that a pixel's channels fill
constexpr int WORDS = 8, UNITS = CHANNELS / WORDS;  // elements in 16 bytes; 16-byte units of a pixel in a stage
static_assert(THREADS % UNITS == 0 && THREADS / UNITS % 2 == 0, "a thread's columns are all odd, or all even");

struct Problem {
    int channels, height, width, stride, shares;
};

// Copies every STEP-th value from shared memory to every step-th place, the first `count` of TURNS. `to` advances by
// addition: with a 64-bit product for each place, every store becomes a branch that waits for that product and for its
// own value.
template <int TURNS, int STEP, class T>
__device__ __forceinline__ void write(const T* from, T* to, long long step, int count) {
    constexpr int AT_ONCE = 8;  // values in flight from shared memory, as registers allow
#pragma unroll
    for (int first = 0; first < TURNS; first += AT_ONCE) {
        T values[AT_ONCE];
#pragma unroll
        for (int turn = first; turn < first + AT_ONCE && turn < TURNS; ++turn) values[turn - first] = from[turn * STEP];
#pragma unroll
        for (int turn = first; turn < first + AT_ONCE && turn < TURNS; ++turn, to += step)
            if (turn < count) *to = values[turn - first];
    }
}

template <class T, int RADIUS>
__device__ __forceinline__ void correlation(
    View<const T> a, View<const T> b, View<T> out, Problem size, float scale, float slope
) {
    constexpr int SIDE = 2 * RADIUS + 1, NEEDED = TILE + 2 * RADIUS;  // columns of b
    constexpr int GROUPS = (16 + 2 * RADIUS + 7) / 8;                 // of 8 columns in a warp's product
    constexpr int PITCH = 8 * GROUPS, STAGE = (TILE - 16 + PITCH) * UNITS;  // the last columns are never fetched
    using Pair = Several<T, 2>;
    SHARED(uint4, stages, STAGES * STAGE);
    SHARED(Pair, results, WARPS * 16 * PITCH / 2);

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int phase_x = (int)(blockIdx.x % size.stride), first_column = (int)(blockIdx.x / size.stride) * TILE;
    const int phase_y = (int)(blockIdx.y % size.stride), first_row = (int)(blockIdx.y / size.stride) * ROWS;
    const int share = (int)(blockIdx.z % size.shares), n = (int)(blockIdx.z / size.shares);
    const int columns = (size.width - phase_x + size.stride - 1) / size.stride;  // of the phase
    const int rows = (size.height - phase_y + size.stride - 1) / size.stride;
    const int chunks = (size.channels + CHANNELS - 1) / CHANNELS;
    const int own_column = first_column + warp % ACROSS * 16, own_row = first_row + warp / ACROSS * OWN;

    // --- this block's rows of b, counted in the phase; some lie beyond its ends, where the result is 0 ---
    const int length = (ROWS + 2 * RADIUS + size.shares - 1) / size.shares;
    const int first = first_row - RADIUS + share * length;
    const int last = min(min(first + length, first_row + ROWS + RADIUS), rows + RADIUS);
    const int end = min(last, rows);  // of the rows inside

    // --- what this thread fetches: 16 bytes of every (THREADS / UNITS)th column ---
    const int unit = thread % UNITS, fetched = thread / UNITS, fetched_column = first_column + fetched - RADIUS;
    const int kept = fetched * UNITS + (unit ^ fetched % 2 * 4);  // odd columns swap halves, so that banks differ
    const long long pitch = b.x * size.stride;
    int coming_row = max(first, 0), coming_chunk = 0;
    const T* coming = b.at(n, unit * WORDS, coming_row * size.stride + phase_y, fetched_column * size.stride + phase_x);
    const auto fetch_into = [&](int stage) {
        if (coming_row < end) {
            const bool filled = coming_chunk * CHANNELS + unit * WORDS < size.channels;
#pragma unroll
            for (int i = 0; i < NEEDED; i += THREADS / UNITS) {
                const bool inside = filled && fetched_column + i >= 0 && fetched_column + i < columns;
                if (fetched + i < NEEDED)
                    fetch_16(stages + stage * STAGE + kept + i * UNITS, coming + i * pitch, inside);
            }
            coming += CHANNELS;
            if (++coming_chunk == chunks) {
                coming_chunk = 0, ++coming_row;
                coming += b.y * size.stride - chunks * CHANNELS;
            }
        }
        fetch_end();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch_into(stage);

    // --- what this thread owns: pixels g and g + 8 of the warp's 16, channels 8t to 8t + 7 of each 32 ---
    unsigned owned[OWN][CHUNKS * CHANNELS / 16][4];
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int row = own_row + i, column = own_column + g + 8 * m;
            const T* const pixel = a.at(n, WORDS * t, row * size.stride + phase_y, column * size.stride + phase_x);
            const int count = row < rows && column < columns ? size.channels - WORDS * t : 0;
#pragma unroll
            for (int k = 0; k < CHUNKS * CHANNELS / 32; ++k) {
                const uint4 words = 32 * k < count ? *(const uint4*)(pixel + 32 * k) : uint4{0, 0, 0, 0};
                owned[i][2 * k][m] = words.x, owned[i][2 * k][m + 2] = words.y;
                owned[i][2 * k + 1][m] = words.z, owned[i][2 * k + 1][m + 2] = words.w;
            }
        }

    // --- what it writes per turn: all dx of one pixel, one per lane; or two dx of 16 pixels, the middle dx twice ---
    Pair* const own_results = results + warp * 16 * PITCH / 2;
    const bool by_pixel = out.c < out.x;
    const int m = by_pixel ? 0 : lane % 16, dx = by_pixel ? min(lane, SIDE - 1) : lane / 16 * RADIUS;
    const int count = by_pixel ? (lane < SIDE ? columns - own_column : 0) : own_column + m < columns ? SIDE : 0;
    const T* const from = own_results->values + m * (PITCH + 1) + dx;
    T* const target = out.at(n, dx, own_row * size.stride + phase_y, (own_column + m) * size.stride + phase_x);

    // --- the rows of b, one after another ---
    const int mine = (warp % ACROSS * 16 + g) * UNITS + t;  // place in a stage of this lane's column g of the product
    int stage = 0;
    for (int row = first; row < last; ++row) {
        float sums[OWN][GROUPS][4] = {};
        if (row >= 0 && row < rows) {
            const bool meets = own_row < rows && row + RADIUS >= own_row && row - RADIUS < own_row + OWN;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                if (chunk == chunks) break;
                fetch_wait<STAGES - 2>();
                __syncthreads();  // this stage has arrived, and no thread reads the one before it any more
                fetch_into(stage == 0 ? STAGES - 1 : stage - 1);
                const uint4* const columns_of_b = stages + stage * STAGE + mine;
                stage = stage + 1 == STAGES ? 0 : stage + 1;
                if (!meets) continue;
#pragma unroll
                for (int k = 0; k < CHANNELS / 32; ++k) {
                    const int step = 2 * (chunk * (CHANNELS / 32) + k);
                    uint4 terms[GROUPS];
#pragma unroll
                    for (int c = 0; c < GROUPS; ++c) terms[c] = columns_of_b[8 * c * UNITS + (4 * k ^ g % 2 * 4)];
#pragma unroll
                    for (int c = 0; c < GROUPS; ++c)
#pragma unroll
                        for (int i = 0; i < OWN; ++i)
                            multiply_add<T>(sums[i][c], owned[i][step], {terms[c].x, terms[c].y});
#pragma unroll
                    for (int c = 0; c < GROUPS; ++c)
#pragma unroll
                        for (int i = 0; i < OWN; ++i)
                            multiply_add<T>(sums[i][c], owned[i][step + 1], {terms[c].z, terms[c].w});
                }
            }
        }

        // --- each product's band goes through shared memory, so that neighbouring lanes write neighbouring values ---
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int dy = row - own_row - i + RADIUS;  // counted from 0
            if (own_row + i >= rows || dy < 0 || dy >= SIDE) continue;
#pragma unroll
            for (int c = 0; c < GROUPS; ++c)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float low = sums[i][c][2 * half] * scale, high = sums[i][c][2 * half + 1] * scale;
                    Pair pair;
                    store(pair.values, low < 0 ? low * slope : low);
                    store(pair.values + 1, high < 0 ? high * slope : high);
                    own_results[(g + 8 * half) * (PITCH / 2) + 4 * c + t] = pair;
                }
            __syncwarp();
            T* const to = target + (long long)dy * SIDE * out.c + (long long)i * size.stride * out.y;
            if (by_pixel) write<16, PITCH + 1>(from, to, out.x * size.stride, count);
            else write<RADIUS + 1, 1>(from, to, out.c, count);
            __syncwarp();  // read, before the next results are written
        }
    }
}

#define PRODUCTS(name, T, radius)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) correlation_products_##radius##_##name(            \
        VIEW(const T, a), VIEW(const T, b), VIEW(T, out), int channels, int height, int width, int stride,           \
        int shares, float scale, float slope                                                                         \
    ) {                                                                                                              \
        const Problem size = {channels, height, width, stride, shares};                                              \
        correlation<T, radius>(AS_VIEW(const T, a), AS_VIEW(const T, b), AS_VIEW(T, out), size, scale, slope);       \
    }
PRODUCTS(half, __half, 10)
PRODUCTS(half, __half, 4)
PRODUCTS(bfloat16, __nv_bfloat16, 10)
PRODUCTS(bfloat16, __nv_bfloat16, 4)
