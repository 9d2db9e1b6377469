// CUDA on a CPU, for tests: the threads of a block take turns, each on its own stack (a fiber).
//
// Included before a .cu file. A thread's turn lasts until it ends or reaches a barrier or a warp operation. In forward
// and backward order, one warp after another runs up to the barrier; in shuffled order, all threads take turns. Blocks
// run one after another.
//
// It catches: missing barriers (a thread reads what others have not written yet), shared memory that is read before it
// is written (it starts as NaN) or overrun (fences), barriers and warp operations that not all threads reach, entries
// called with arguments of the wrong type, access beyond a tensor, if the launcher has put a forbidden page there, and
// addresses without their type's alignment, if the compiler traps there. It tests logic, but neither speed nor the order
// in which memory becomes visible on a GPU.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

// --- the language ------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() shim::barrier(__LINE__)
#define __syncwarp(...) shim::together(0, 0xffffffffu, __LINE__)
#define __shfl_sync(mask, value, lane) shim::together(value, mask, __LINE__)[(lane) & 31]
#define __shfl_xor_sync(mask, value, other) shim::together(value, mask, __LINE__)[shim::lane() ^ (other)]
#define WARP_GIVES(value) shim::together(value, 0xffffffffu, __LINE__)  // each lane's value, indexed by its number
#define lane_of_warp() shim::lane()
#define SHARED(type, name, count)                                                                    \
    static char name##_tag;                                                                          \
    type* const name = (type*)shim::shared(&name##_tag, sizeof(type) * (count), #name)

struct uint3 {
    unsigned x, y, z;
};
static uint3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

// --- half types: bits, converted to and from float as the hardware does (to the nearest, ties to even) ---------------

static inline unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float float_of(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

struct alignas(2) __half {
    uint16_t bits;
};
struct alignas(2) __nv_bfloat16 {
    uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 x) { return float_of((unsigned)x.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = bits_of(x);
    if (x != x) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline float __half2float(__half x) {
    const unsigned sign = (unsigned)(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}
static inline __half __float2half_rn(float x) {
    const uint16_t sign = (uint16_t)((bits_of(x) >> 16) & 0x8000);
    const float size = fabsf(x);
    if (x != x) return {0x7fff};
    if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
    if (size < 0x1p-14f) return {(uint16_t)(sign | (uint16_t)rintf(size * 0x1p24f))};
    const unsigned bits = bits_of(size);
    return {(uint16_t)(sign | ((bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13))};
}

// --- the threads of one block ------------------------------------------------------------------------------------

namespace shim {

enum State { READY, AT_BARRIER, IN_WARP, DONE };
enum { MOST_THREADS = 1024, STACK_BYTES = 64 << 10, SHARED_BYTES = 228 << 10, FENCE_BYTES = 64, MOST_ARRAYS = 16 };

struct Fiber {
    jmp_buf place;
    ucontext_t start;
    char* stack;
    bool started;
    State state;
    uint3 index;
    int line;       // of the barrier or warp operation it waits in
    unsigned mask;  // of the lanes it waits for
    unsigned turns; // warp operations so far
};
struct Array {
    const void* tag;
    const char* name;
    size_t offset, bytes;
};

static Fiber fibers[MOST_THREADS];
static Fiber* running;
static jmp_buf scheduler, bail;
static char failure[256];
static void (*body)(void**);
static void** arguments;
alignas(16) static char exchange[MOST_THREADS][2][48];  // what each lane gave to its last two warp operations
alignas(16) static char arena[SHARED_BYTES];
static Array arrays[MOST_ARRAYS];
static int array_count;
static size_t arena_used;

[[noreturn]] static void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(failure, sizeof failure, format, values);
    va_end(values);
    _longjmp(bail, 1);
}

static void __attribute__((noinline)) pause(State state) {
    running->state = state;
    if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

static void fiber_main() {
    for (;;) {
        body(arguments);
        pause(DONE);
    }
}

static void __attribute__((noinline)) resume(Fiber& fiber) {
    running = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack = (char*)malloc(STACK_BYTES);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
}

static inline void barrier(int line) {
    running->line = line;
    pause(AT_BARRIER);
}

static inline int number() { return (int)(running - fibers); }
static inline int lane() { return number() & 31; }

// The value that each lane of the warp passed; valid until this lane's next but one warp operation.
template <class V>
struct Given {
    int first, side;
    const V& operator[](int lane) const { return *(const V*)exchange[first + lane][side]; }
};
template <class V>
static Given<V> together(V value, unsigned mask, int line) {
    static_assert(sizeof(V) <= sizeof exchange[0][0], "too much for one exchange");
    const int side = running->turns++ & 1;
    memcpy(exchange[number()][side], &value, sizeof value);
    running->line = line;
    running->mask = mask;
    pause(IN_WARP);
    return {number() & ~31, side};
}

// Fetches into shared memory happen as late as possible: only when they are waited for.
struct Fetch {
    void* to;
    const void* from;
    bool inside;
    unsigned batch;
    unsigned bytes;
};
enum { MOST_FETCHES = 256 };
static Fetch fetches[MOST_THREADS][MOST_FETCHES];
static int fetch_count[MOST_THREADS];
static unsigned batches[MOST_THREADS];  // how many each thread has ended

static void fetch(void* to, const void* from, bool inside, unsigned bytes) {
    int& count = fetch_count[number()];
    if (count == MOST_FETCHES) fail("too many fetches that nobody waits for");
    if ((uintptr_t)to % bytes || (inside && (uintptr_t)from % bytes)) fail("a fetch of %u bytes is not aligned", bytes);
    if (inside) (void)((const volatile char*)from)[bytes - 1];  // a GPU reads it even if nobody waits for it
    fetches[number()][count++] = {to, from, inside, batches[number()], bytes};
}
static void fetch_end() { ++batches[number()]; }
static void fetch_wait(unsigned but) {
    int& count = fetch_count[number()];
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        const Fetch& one = fetches[number()][i];
        if (one.batch + but >= batches[number()]) fetches[number()][kept++] = one;
        else if (one.inside) memcpy(one.to, one.from, one.bytes);
        else memset(one.to, 0, one.bytes);
    }
    count = kept;
}

static void* shared(const void* tag, size_t bytes, const char* name) {
    for (int i = 0; i < array_count; ++i)
        if (arrays[i].tag == tag) return arena + arrays[i].offset;
    if (array_count == MOST_ARRAYS || arena_used + bytes + FENCE_BYTES > SHARED_BYTES) fail("too much shared memory");
    arrays[array_count++] = {tag, name, arena_used, bytes};
    memset(arena + arena_used, 0xff, bytes);  // NaN in every floating point type
    memset(arena + arena_used + bytes, 0xa5, FENCE_BYTES);
    void* place = arena + arena_used;
    arena_used = (arena_used + bytes + FENCE_BYTES + 15) / 16 * 16;
    return place;
}

static void check_fences() {
    for (int i = 0; i < array_count; ++i)
        for (int j = 0; j < FENCE_BYTES; ++j)
            if (arena[arrays[i].offset + arrays[i].bytes + j] != (char)0xa5)
                fail("shared array %s is written beyond its end", arrays[i].name);
}

// Resumes those warps of threads `from` to `count` whose lanes have all arrived at the same warp operation.
static bool release_warps(int from, int count) {
    bool released = false;
    for (int first = from; first < count; first += 32) {
        const int last = first + 32 < count ? first + 32 : count;
        for (int i = first; i < last; ++i) {
            if (fibers[i].state != IN_WARP) continue;
            const unsigned mask = fibers[i].mask;
            bool all = mask >> (i - first) & 1;
            if (!all) fail("line %d: a lane takes part that its own mask leaves out", fibers[i].line);
            for (int j = first; j < last; ++j) {
                if (!(mask >> (j - first) & 1)) continue;
                if (fibers[j].state == DONE) fail("line %d: a lane of the warp has ended before", fibers[i].line);
                all &= fibers[j].state == IN_WARP && fibers[j].line == fibers[i].line && fibers[j].mask == mask;
            }
            if (!all) continue;
            for (int j = first; j < last; ++j)
                if (mask >> (j - first) & 1) fibers[j].state = READY;
            released = true;
        }
    }
    return released;
}

// Resumes all threads if all wait at the same barrier; false if all have ended.
static bool release_barrier(int count) {
    int waiting = 0, ended = 0, line = 0;
    for (int i = 0; i < count; ++i) {
        ended += fibers[i].state == DONE;
        if (fibers[i].state == IN_WARP) fail("line %d: some lanes of a warp never come", fibers[i].line);
        if (fibers[i].state != AT_BARRIER) continue;
        if (waiting++ && fibers[i].line != line) fail("threads wait at barriers %d and %d", line, fibers[i].line);
        line = fibers[i].line;
    }
    if (waiting && ended) fail("line %d: %d threads ended without reaching this barrier", line, ended);
    for (int i = 0; i < count; ++i)
        if (waiting) fibers[i].state = READY;
    return waiting > 0;
}

enum Order { FORWARD, BACKWARD, SHUFFLED };

static void run_block(int count, Order order, unsigned& seed) {
    static int turn[MOST_THREADS];
    array_count = 0;
    arena_used = 0;
    for (int i = 0; i < count; ++i) {
        const unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y, z = i / blockDim.x / blockDim.y;
        fibers[i].state = READY;
        fibers[i].index = {x, y, z};
        fibers[i].turns = 0;
        fetch_count[i] = 0;
        batches[i] = 0;
        turn[i] = i;
    }
    const int warps = (count + 31) / 32;
    do {
        for (int i = 0; order != SHUFFLED && i < warps; ++i) {
            const int first = 32 * (order == BACKWARD ? warps - 1 - i : i);
            const int end = first + 32 < count ? first + 32 : count;
            do {
                for (int j = first; j < end; ++j) {
                    Fiber& fiber = fibers[order == BACKWARD ? first + end - 1 - j : j];
                    if (fiber.state == READY) resume(fiber);
                }
            } while (release_warps(first, end));
        }
        if (order == SHUFFLED) do {
            for (int i = count - 1; i > 0; --i) {
                seed = seed * 1664525u + 1013904223u;
                const int j = (int)((seed >> 8) % (unsigned)(i + 1)), kept = turn[i];
                turn[i] = turn[j];
                turn[j] = kept;
            }
            for (int i = 0; i < count; ++i)
                if (fibers[turn[i]].state == READY) resume(fibers[turn[i]]);
        } while (release_warps(0, count));
    } while (release_barrier(count));
    check_fences();
}

// --- entries -------------------------------------------------------------------------------------------------------

struct Entry {
    const char* name;
    void (*call)(void**);
    const char* kinds;  // one letter per parameter: p pointer, i 32 bits, l 64 bits, f float
};

template <class P>
constexpr char kind() {
    static_assert(sizeof(P) == 8 || sizeof(P) == 4, "parameters have 4 or 8 bytes");
    return P(0.5f) != P(0) ? 'f' : sizeof(P) == 8 ? 'l' : 'i';
}
template <class P>
struct Kind {
    static constexpr char value = kind<P>();
};
template <class P>
struct Kind<P*> {
    static constexpr char value = 'p';
};

template <auto function>
struct Caller;
template <class... P, void (*function)(P...)>
struct Caller<function> {
    static constexpr char kinds[] = {Kind<P>::value..., 0};
    struct Call {
        Call(P... given) { function(given...); }
    };
    static void call(void** values) { Call{*(P*)*values++...}; }  // in braces, from left to right
};

#define ENTRY(name) {#name, shim::Caller<name>::call, shim::Caller<name>::kinds}

static void touched(int) { fail("memory beyond a tensor is touched"); }
static void trapped(int) { fail("an address does not have its type's alignment"); }

// Runs one entry over a whole grid; returns nullptr or an error message. grid and block are x, y, z.
static const char* launch(
    const Entry& entry, const unsigned* grid, const unsigned* block, void** values, int order, unsigned seed
) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const int count = (int)(block[0] * block[1] * block[2]);
    if (count < 1 || count > MOST_THREADS) return "a block has 1 to 1024 threads";
    if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1) return "an empty grid";
    if (grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) return "the grid is larger than a GPU allows";
    body = entry.call;
    arguments = values;
    struct sigaction mine = {}, before, before_traps;
    mine.sa_handler = touched;
    mine.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &mine, &before);
    mine.sa_handler = trapped;
    sigaction(SIGILL, &mine, &before_traps);
    if (_setjmp(bail)) {
        for (Fiber& fiber : fibers) fiber.started = false;  // they were left in the middle of the kernel
        sigaction(SIGSEGV, &before, nullptr);
        sigaction(SIGILL, &before_traps, nullptr);
        return failure;
    }
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(count, (Order)order, seed);
    sigaction(SIGSEGV, &before, nullptr);
    sigaction(SIGILL, &before_traps, nullptr);
    return nullptr;
}

}  // namespace shim

// --- the library: what kernels call --------------------------------------------------------------------------------

template <class T>
static inline T atomicAdd(T* place, T value) {
    const T before = *place;
    *place += value;
    return before;
}
template <class T>
static inline T atomicMax(T* place, T value) {
    const T before = *place;
    if (value > before) *place = value;
    return before;
}
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline int __float_as_int(float x) { return (int)bits_of(x); }
template <class T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
static inline T __ldg(const T* place) {
    return *place;
}
template <class T>
static inline void __stwb(T* place, T value) {
    *place = value;
}
