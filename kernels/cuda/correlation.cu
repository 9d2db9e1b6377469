// Cost volume: out[dy, dx, y, x] = scale times the sum over c of a[c, y, x] b[c, y + dy, x + dx], zero where b ends,
// then a LeakyReLU; and the gradients of its values before that.
//
// Forward. Displacements are multiples of a stride, so only pixels whose x (or y) agree modulo the stride are compared:
// they form a *phase*, in which neighbouring displacements are neighbouring columns. A block computes, for one phase in
// y,
//
//     ROWS rows of a  x  64 pixels of a row  x  SHIFTS neighbouring dy  x  COLUMNS neighbouring dx,
//
// for which it needs ROWS rows of a and ROWS + SHIFTS - 1 rows of b. One thread computes one (row, dy) for 4
// neighbouring pixels of one phase in x and all COLUMNS dx: from 4 values of a and COLUMNS + 3 of b, both read from
// shared memory four at a time, it makes 4 COLUMNS products in registers. 16 threads (LANES) cover the 64 pixels. With
// a stride of 2 the block holds both phases in x, so that it reads contiguous runs of global memory; with any other
// stride it holds one phase.
//
// Channels go through two buffers in shared memory, CHANNELS at a time: while one is worked on, each warp fetches one
// row for the other. There are as many rows as warps: ROWS of a, the rest of b.
#include "common.cuh"

constexpr int PIXELS = 4, LANES = 16, ROWS = 3, SHIFTS = 7, B_ROWS = ROWS + SHIFTS - 1, CHANNELS = 3;
constexpr int TILE = PIXELS * LANES, THREADS = 32 * (ROWS + B_ROWS);  // 384: 12 warps allow 168 registers per thread
static_assert(THREADS >= LANES * ROWS * SHIFTS, "the last one and a half warps only fetch");

struct Problem {
    int batch, channels, height, width, radius, stride;
};

template <class T, int COLUMNS>
__device__ __forceinline__ void correlation(
    View<const T> a, View<const T> b, View<T> out, Problem size, float scale, float slope
) {
    constexpr int A_PITCH = TILE, B_PITCH = TILE + 2 * (COLUMNS - 1);  // of one row with all its phases, in floats
    constexpr int BUFFER = CHANNELS * (ROWS * A_PITCH + B_ROWS * B_PITCH), FETCHES = (B_PITCH + 31) / 32;
    static_assert(A_PITCH % 4 == 0 && B_PITCH % 4 == 0 && (TILE / 2 + COLUMNS - 1) % 4 == 0, "float4 is aligned");
    SHARED(float4, memory, 2 * BUFFER / 4);
    float* const buffers = (float*)memory;

    const int side = 2 * size.radius + 1, thread = threadIdx.x;
    const int phases = size.stride == 2 ? 2 : 1;  // in x, in this block
    const int chunks = (side + COLUMNS - 1) / COLUMNS, groups = (side + SHIFTS - 1) / SHIFTS;

    const int others = size.stride / phases;  // blocks whose pixels interleave with this one's, including it
    const int first_x = (int)(blockIdx.x % others) * phases;
    const int first_column = (int)(blockIdx.x / others) * (TILE / phases);  // of a phase
    const int first_y = (int)(blockIdx.y % size.stride);
    const int first_row = (int)(blockIdx.y / size.stride) * ROWS;  // of a phase
    const int first_dx = (int)(blockIdx.z % chunks) * COLUMNS;     // counted from 0
    const int first_dy = (int)(blockIdx.z / chunks % groups) * SHIFTS;
    const int n = (int)(blockIdx.z / chunks / groups);

    // --- what this thread fetches: every 32nd pixel of its warp's row ---
    const int warp = thread / 32, lane = thread % 32;
    const bool of_a = warp < ROWS;
    const int fetched_row = of_a ? first_row + warp : first_row + warp - ROWS + first_dy - size.radius;
    const int fetched_column = of_a ? first_column : first_column + first_dx - size.radius;
    const int fetched_y = fetched_row * size.stride + first_y;
    const int span = of_a ? A_PITCH : TILE + phases * (COLUMNS - 1);  // pixels of the row
    const int phase_pitch = span / phases;
    const int place = of_a ? warp * A_PITCH : CHANNELS * ROWS * A_PITCH + (warp - ROWS) * B_PITCH;
    const int channel_pitch = of_a ? ROWS * A_PITCH : B_ROWS * B_PITCH;
    const View<const T> from = of_a ? a : b;
    const T* const row = from.at(n, 0, fetched_row >= 0 && fetched_y < size.height ? fetched_y : 0, 0);
    const bool row_inside = fetched_row >= 0 && fetched_y < size.height;

    // --- what this thread computes ---
    const bool computes = thread < LANES * ROWS * SHIFTS;
    const int lane16 = thread % LANES, shift = thread / LANES % SHIFTS, own_row = thread / LANES / SHIFTS;
    const int phase = lane16 / (LANES / phases), column = lane16 % (LANES / phases) * PIXELS;
    const int a_place = own_row * A_PITCH + phase * (TILE / phases) + column;
    const int b_place = CHANNELS * ROWS * A_PITCH + (own_row + shift) * B_PITCH
        + phase * (TILE / phases + COLUMNS - 1) + column;

    float sums[COLUMNS][PIXELS] = {};
    T next[CHANNELS][FETCHES];

    const auto fetch = [&](int first_channel) {
#pragma unroll
        for (int f = 0; f < FETCHES; ++f) {
            const int p = lane + 32 * f;
            const int x = (fetched_column + p / phases) * size.stride + first_x + p % phases;
            const bool inside = row_inside && p < span && x >= 0 && x < size.width;
            const T* const source = row + (inside ? x * from.x : 0);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                const int channel = first_channel + c;
                if (inside && channel < size.channels) next[c][f] = source[channel * from.c];
                else store(&next[c][f], 0.0f);
            }
        }
    };
    const auto keep = [&](float* buffer) {
#pragma unroll
        for (int f = 0; f < FETCHES; ++f) {
            const int p = lane + 32 * f;
            if (p >= span) continue;
            float* const target = buffer + place + p % phases * phase_pitch + p / phases;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) target[c * channel_pitch] = widened(next[c][f]);
        }
    };

    fetch(0);
    keep(buffers);
    __syncthreads();
    for (int first = 0, turn = 0; first < size.channels; first += CHANNELS, turn ^= 1) {
        const bool more = first + CHANNELS < size.channels;
        if (more) fetch(first + CHANNELS);
        const float* const buffer = buffers + turn * BUFFER;
#pragma unroll 1
        for (int c = 0; c < CHANNELS && computes; ++c) {
            const float4 four = *(const float4*)(buffer + a_place + c * ROWS * A_PITCH);
            const float pixels[PIXELS] = {four.x, four.y, four.z, four.w};
            float window[COLUMNS + PIXELS - 1];
#pragma unroll
            for (int i = 0; i < COLUMNS + PIXELS - 1; i += 4) {
                const float4 part = *(const float4*)(buffer + b_place + c * B_ROWS * B_PITCH + i);
                window[i] = part.x, window[i + 1] = part.y, window[i + 2] = part.z, window[i + 3] = part.w;
            }
#pragma unroll
            for (int k = 0; k < COLUMNS; ++k)
#pragma unroll
                for (int j = 0; j < PIXELS; ++j) sums[k][j] += pixels[j] * window[k + j];
        }
        if (more) keep(buffers + (turn ^ 1) * BUFFER);
        __syncthreads();  // the one buffer is full, and no thread reads the other any more
    }

    const int dy = first_dy + shift, y = (first_row + own_row) * size.stride + first_y;
    if (!computes || dy >= side || y >= size.height) return;
#pragma unroll
    for (int j = 0; j < PIXELS; ++j) {
        const int x = (first_column + column + j) * size.stride + first_x + phase;
        if (x >= size.width) break;
        T* const target = out.at(n, (long long)dy * side + first_dx, y, x);
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
            if (first_dx + k >= side) break;
            const float mean = sums[k][j] * scale;
            store(target + k * out.c, mean < 0 ? mean * slope : mean);
        }
    }
}

// Backward: the gradient for one of the maps, from the other map. One thread computes GROUP neighbouring channels of
// one pixel; neighbouring threads take neighbouring pixels, blockIdx.y is the group of channels. Each displacement
// pairs the pixel with one of the other map (for b: on the opposite side), and with the volume's gradient at the pixel
// of a.
constexpr int GROUP = 8;

template <class T>
__device__ __forceinline__ void correlation_gradient(
    View<const T> grad, View<const T> other, View<T> out, Problem size, float scale, int of_b
) {
    const Pixel p = this_pixel(size.batch, size.height, size.width);
    if (!p.inside) return;
    const int side = 2 * size.radius + 1, first = (int)blockIdx.y * GROUP;
    const int last = size.channels - first < GROUP ? size.channels - first - 1 : GROUP - 1;  // of this group
    float sums[GROUP] = {};
    for (int j = 0; j < side; ++j) {
        const int dy = (j - size.radius) * size.stride, y = of_b ? p.y - dy : p.y + dy;
        if (y < 0 || y >= size.height) continue;
        for (int i = 0; i < side; ++i) {
            const int dx = (i - size.radius) * size.stride, x = of_b ? p.x - dx : p.x + dx;
            if (x < 0 || x >= size.width) continue;
            const float weight = widened(*grad.at(p.n, j * side + i, of_b ? y : p.y, of_b ? x : p.x)) * scale;
            const T* const source = other.at(p.n, first, y, x);
#pragma unroll
            for (int c = 0; c < GROUP; ++c) sums[c] += weight * widened(source[(c < last ? c : last) * other.c]);
        }
    }
    T* const target = out.at(p.n, first, p.y, p.x);
#pragma unroll
    for (int c = 0; c < GROUP; ++c)
        if (c <= last) store(target + c * out.c, sums[c]);
}

#define SIZES int batch, int channels, int height, int width, int radius, int stride
#define SIZE (Problem{batch, channels, height, width, radius, stride})
#define FORWARD(name, T, columns)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) correlation_##columns##_##name(                         \
        VIEW(const T, a), VIEW(const T, b), VIEW(T, out), SIZES, float scale, float slope                            \
    ) {                                                                                                              \
        correlation<T, columns>(AS_VIEW(const T, a), AS_VIEW(const T, b), AS_VIEW(T, out), SIZE, scale, slope);      \
    }
#define ENTRIES(name, T)                                                                                             \
    FORWARD(name, T, 21)                                                                                             \
    FORWARD(name, T, 9)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) correlation_gradient_##name(                                   \
        VIEW(const T, grad), VIEW(const T, other), VIEW(T, out), SIZES, float scale, int of_b                        \
    ) {                                                                                                              \
        correlation_gradient<T>(                                                                                     \
            AS_VIEW(const T, grad), AS_VIEW(const T, other), AS_VIEW(T, out), SIZE, scale, of_b                      \
        );                                                                                                           \
    }
FOR_EACH_TYPE(ENTRIES)
