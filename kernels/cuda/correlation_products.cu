// Cost volume of half type maps whose channels lie together, by tensor cores: what correlation.cu says, for two radii.
//
// Pixels whose x and y agree modulo the stride meet only each other: they form a *phase*, a picture of its own, where
// neighbouring displacements are neighbouring pixels. For 8 pixels of one of its rows in a and one of its rows in b,
//
//     (8 + 2 RADIUS) columns of b   times   channels   times   8 pixels of a
//
// holds all that these pixels have for one dy: pixel m with dx stands in row m + dx, column m. The rest is for nothing.
//
// A warp owns 8 pixels of each of OWN rows of a, with all their channels in registers. Rows of b go past it: it
// multiplies each with all that it owns, where each own row meets it with another dy. The warps of a block own rows
// below each other and pixels beside each other, and share the rows of b, which come through STAGES buffers in shared
// memory, CHANNELS at a time. `shares` blocks share the rows of b that the same pixels need, so that a small picture
// keeps a whole GPU busy.
//
// Where channels of the result lie together, those of TOGETHER dy are written at once: 8 bytes a lane.
//
// Rows of b beyond the picture are not multiplied: there the result is 0 even where a is not finite.
#include "tensor_core.cuh"

constexpr int DOWN = 2, ACROSS = 4, OWN = 2, PIXELS = 8;  // warps of a block; rows, and pixels of each, a warp owns
constexpr int STAGES = 4, BLOCKS = 2;                     // 47 kB of shared memory; of registers all but a few
constexpr int WARPS = DOWN * ACROSS, THREADS = 32 * WARPS, TILE = PIXELS * ACROSS, ROWS = OWN * DOWN;
constexpr int CHANNELS = 64, CHUNKS = 4;            // of a stage, and how many stages' a pixel has at most
constexpr int WORDS = 8, UNITS = CHANNELS / WORDS;  // elements of 16 bytes; 16 bytes of a pixel in a stage
constexpr int TOGETHER = 4;
static_assert(THREADS % UNITS == 0 && THREADS / UNITS % 2 == 0, "a thread's columns are all odd, or all even");

struct Problem {
    int channels, height, width, stride, shares;
    int in_words;  // whether the result's channels lie together, TOGETHER of them at a multiple of their bytes
};

struct Target {
    long long first;  // place of the first pixel a warp owns, there of the first dx and dy
    int pixels[OWN];  // of each row, inside the picture
    int dy;           // of its first row with the first row of b
};

// TURNS values from shared memory, each STEP behind the one before it, to places that are `step` apart: the first
// `count`. Place by place: with a product of 64 bits for each, every store becomes a branch that waits for its value.
template <int TURNS, int STEP, class T>
__device__ __forceinline__ void write(const T* from, T* to, long long step, int count) {
    constexpr int AT_ONCE = 16 / sizeof(T) < TURNS ? 32 / sizeof(T) : TURNS;  // on their way, as registers allow
#pragma unroll
    for (int first = 0; first < TURNS; first += AT_ONCE) {
        T values[AT_ONCE];
#pragma unroll
        for (int turn = 0; turn < AT_ONCE; ++turn) values[turn] = from[(first + turn) * STEP];
#pragma unroll
        for (int turn = 0; turn < AT_ONCE; ++turn, to += step)
            if (first + turn < count) *to = values[turn];
    }
}

// The same place in the next stage of so many elements.
template <class Place>
__device__ __forceinline__ Place next(Place place, int stage) {
    return place + stage < STAGES * stage ? place + stage : place - (STAGES - 1) * stage;
}

template <class T, int RADIUS>
__device__ __forceinline__ void correlation(
    View<const T> a, View<const T> b, View<T> out, Problem size, float scale, float slope
) {
    constexpr int SIDE = 2 * RADIUS + 1, NEEDED = TILE + 2 * RADIUS;  // columns of b
    constexpr int MEETS = PIXELS + 2 * RADIUS, PARTS = (MEETS + 15) / 16;  // a warp's, and products of 16 that hold them
    constexpr int STAGE = NEEDED * UNITS, PITCH = TOGETHER * SIDE;         // values of a pixel until they are written
    using Words = Several<T, TOGETHER>;
    // The last product ends where the warp's columns do, so it may have some of the one before it.
    const auto start_of = [](int part) { return part + 1 < PARTS ? 16 * part : MEETS - 16; };
    SHARED(uint4, stages, STAGES * STAGE);
    SHARED(Words, results, WARPS * OWN * PIXELS * SIDE);
    SHARED(Target, targets, WARPS);  // kept here for want of registers

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int phase_x = (int)(blockIdx.x % size.stride), first_column = (int)(blockIdx.x / size.stride) * TILE;
    const int phase_y = (int)(blockIdx.y % size.stride), first_row = (int)(blockIdx.y / size.stride) * ROWS;
    const int share = (int)(blockIdx.z % size.shares), n = (int)(blockIdx.z / size.shares);
    const int columns = (size.width - phase_x + size.stride - 1) / size.stride;  // of the phase
    const int rows = (size.height - phase_y + size.stride - 1) / size.stride;
    const int own_column = first_column + warp % ACROSS * PIXELS, own_row = first_row + warp / ACROSS * OWN;

    // --- the rows of b that this block multiplies with: of the phase, also beyond its ends, where the result is 0 ---
    const int length = (ROWS + 2 * RADIUS + size.shares - 1) / size.shares;
    const int first = first_row - RADIUS + share * length;
    const int last = min(min(first + length, first_row + ROWS + RADIUS), rows + RADIUS);
    const int end = min(last, rows);  // of those inside

    // --- what this thread fetches: 16 bytes of every (THREADS / UNITS)th column ---
    constexpr int TURNS = (NEEDED * UNITS + THREADS - 1) / THREADS;
    const int unit = thread % UNITS, fetched = thread / UNITS, fetched_column = first_column + fetched - RADIUS;
    int kept = fetched * UNITS + (unit ^ fetched % UNITS);  // neighbouring columns differ in their banks
    const long long pitch = b.x * size.stride * (THREADS / UNITS);
    int inside = 0;  // a bit for each turn
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int column = fetched_column + turn * (THREADS / UNITS);
        inside |= (column >= 0 && column < columns) << turn;
    }
    int coming_row = max(first, 0), coming_channel = unit * WORDS;
    const T* coming = b.at(n, coming_channel, coming_row * size.stride + phase_y, fetched_column * size.stride + phase_x);
    const auto fetch = [&] {  // into the next stage
        if (coming_row < end) {
            const int now = coming_channel < size.channels ? inside : 0;
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn)
                if (fetched + turn * (THREADS / UNITS) < NEEDED)
                    fetch_16(stages + kept + turn * THREADS, coming + turn * pitch, now >> turn & 1);
            coming += CHANNELS, coming_channel += CHANNELS;
            if (coming_channel - unit * WORDS >= size.channels) {
                coming += b.y * size.stride + unit * WORDS - coming_channel;
                coming_channel = unit * WORDS, ++coming_row;
            }
        }
        fetch_end();
        kept = next(kept, STAGE);
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch();

    // --- what it owns: of pixel g of the warp's 8, of each 16 channels 2t, 2t + 1, 2t + 8 and 2t + 9 ---
    unsigned owned[OWN][CHUNKS * CHANNELS / 16][2];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int row = own_row + i, column = own_column + g;
        const T* const pixel = a.at(n, 2 * t, row * size.stride + phase_y, column * size.stride + phase_x);
        const int count = row < rows && column < columns ? size.channels : 0;
#pragma unroll
        for (int k = 0; k < CHUNKS * CHANNELS / 8; ++k)
            owned[i][k / 2][k % 2] = 8 * k < count ? *(const unsigned*)(pixel + 8 * k) : 0;
    }

    // --- how it writes, of an own row, what it has of some dy ---
    if (lane == 0) {
        const T* const to = out.at(n, 0, own_row * size.stride + phase_y, own_column * size.stride + phase_x);
        targets[warp].first = to - out.data, targets[warp].dy = first - own_row + RADIUS;
        for (int i = 0; i < OWN; ++i)
            targets[warp].pixels[i] = own_row + i < rows ? min(columns - own_column, PIXELS) : 0;
    }
    const auto write_out = [&](int warp, int lane, int i, int dy) {
        const T* const own_results = results[warp * OWN * PIXELS * SIDE].values;
        int from_dy = max(dy / TOGETHER * TOGETHER, targets[warp].dy - i);
        const T* from = own_results + i * PIXELS * PITCH;
        T* const to = out.data + targets[warp].first + i * (size.stride * out.y);
        const int pixels = targets[warp].pixels[i];
        if (size.in_words && dy - from_dy == TOGETHER - 1) {
            Words* const words = (Words*)(to + from_dy * SIDE) + lane;
            if (lane < SIDE)
                write<PIXELS, SIDE>((const Words*)from + lane, words, out.x * size.stride / TOGETHER, pixels);
            return;
        }
        // A lane for each dx of one pixel after the other; or for each pixel, and its dx in turn.
        const bool by_pixel = out.c < out.x;
        const int m = by_pixel ? 0 : lane % PIXELS, dx = by_pixel ? lane : lane / PIXELS;
        const int turns = dx >= SIDE || m >= pixels ? 0 : by_pixel ? pixels : (SIDE - 1 - dx) / (32 / PIXELS) + 1;
        const long long step = by_pixel ? out.x * size.stride : out.c * (32 / PIXELS);
        for (; from_dy <= dy; ++from_dy) {
            const T* value = from + m * PITCH + from_dy % TOGETHER * SIDE + dx;
            T* there = to + (from_dy * SIDE + dx) * out.c + m * (out.x * size.stride);
#pragma unroll 4
            for (int turn = 0; turn < turns; ++turn, value += by_pixel ? PITCH : 32 / PIXELS, there += step)
                *there = *value;
        }
    };

    // --- the rows of b in turn ---
    const int met = own_row < rows ? own_row - RADIUS : last;  // the first it meets
    const int column = warp % ACROSS * PIXELS + lane % 16;  // of the first product: what this lane names to the others
    unsigned mine = 16 * (column * UNITS + (lane / 16 ^ column % UNITS));
    for (int row = first; row < last; ++row) {
        float sums[OWN][PARTS][4] = {};
        if (row >= 0 && row < end) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                if (chunk * CHANNELS >= size.channels) break;
                fetch_wait<STAGES - 2>();
                __syncthreads();  // this stage is there, and nobody reads the one before it any more
                fetch();
                const unsigned now = mine;
                mine = next(mine, 16 * STAGE);
                if (row < met || row >= met + 2 * RADIUS + OWN) continue;
#pragma unroll
                for (int k = 0; k < CHANNELS / 16; ++k)
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        unsigned terms[4];
                        constexpr int EIGHT = UNITS - 1;
                        const unsigned changed = 16 * (2 * k ^ start_of(part) & EIGHT);
                        load_matrices<false>(
                            terms, (const char*)stages + (now ^ changed) + 16 * UNITS * start_of(part)
                        );
#pragma unroll
                        for (int i = 0; i < OWN; ++i)
                            multiply_add<T>(sums[i][part], terms, owned[i][chunk * (CHANNELS / 16) + k]);
                    }
            }
        }

        // --- the band of each product, to shared memory: there it is in the order in which it is written ---
        const int thread = thread_anew(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
        T* const own_results = results[warp * OWN * PIXELS * SIDE].values;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int dy = row - met - i;  // counted from 0
            if (dy < 0 || dy >= SIDE) continue;
            T* const to = own_results + (i * PIXELS + 2 * t) * PITCH + dy % TOGETHER * SIDE + g - 2 * t;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int start = start_of(part) + j / 2 * 8, dx = start + g - 2 * t - j % 2;
                    const float sum = sums[i][part][j] * scale;
                    if (dx >= 0 && dx < SIDE) store(to + j % 2 * (PITCH - 1) + start, sum < 0 ? sum * slope : sum);
                }
        }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < OWN; ++i) {
            const int dy = row - met - i;
            if (dy >= 0 && dy < SIDE && (dy % TOGETHER == TOGETHER - 1 || dy == SIDE - 1 || row == last - 1))
                write_out(warp, lane, i, dy);
        }
        __syncwarp();  // read, before the next are written
    }
}

#define PRODUCTS(name, T, radius)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) correlation_products_##radius##_##name(            \
        VIEW(const T, a), VIEW(const T, b), VIEW(T, out), int channels, int height, int width, int stride,           \
        int shares, int in_words, float scale, float slope                                                           \
    ) {                                                                                                              \
        const Problem size = {channels, height, width, stride, shares, in_words};                                    \
        correlation<T, radius>(AS_VIEW(const T, a), AS_VIEW(const T, b), AS_VIEW(T, out), size, scale, slope);       \
    }
PRODUCTS(half, __half, 10)
PRODUCTS(half, __half, 4)
PRODUCTS(bfloat16, __nv_bfloat16, 10)
PRODUCTS(bfloat16, __nv_bfloat16, 4)
