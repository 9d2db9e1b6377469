// Products of small matrices on tensor cores, and the loads of their operands (sm_80 and newer).
//
// All 32 lanes of a warp call products and matrix loads together; g = lane / 4, t = lane % 4. One 32-bit word holds two
// half-precision elements, the first in its low bits.
#pragma once

#include "common.cuh"

// --- d += a b, with a 16x16, b 16x8, d 16x8; summed in float ----------------------------------------------------------
//
//     a[0]: row g,     columns 2t,     2t + 1      b[0]: column g, rows 2t,     2t + 1
//     a[1]: row g + 8, columns 2t,     2t + 1      b[1]: column g, rows 2t + 8, 2t + 9
//     a[2]: row g,     columns 2t + 8, 2t + 9      d[0], d[1]: row g,     columns 2t, 2t + 1
//     a[3]: row g + 8, columns 2t + 8, 2t + 9      d[2], d[3]: row g + 8, columns 2t, 2t + 1
#ifdef WARP_GIVES  // defined by the tests, on a CPU: collects what every lane of the warp passes
template <class T>
__device__ void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    struct Operands {
        float a[4][2], b[2][2];
    } mine;
    const auto unpack = [](float (&to)[2], unsigned word) {
        for (int half = 0; half < 2; ++half) to[half] = widened(T{(uint16_t)(word >> half * 16)});
    };
    for (int i = 0; i < 4; ++i) unpack(mine.a[i], a[i]);
    for (int i = 0; i < 2; ++i) unpack(mine.b[i], b[i]);
    const auto given = WARP_GIVES(mine);
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    for (int k = 0; k < 16; ++k) {
        const auto &upper = given[g * 4 + k % 8 / 2].a[k / 8 * 2], &lower = given[g * 4 + k % 8 / 2].a[k / 8 * 2 + 1];
        const auto &left = given[8 * t + k % 8 / 2].b[k / 8], &right = given[8 * t + 4 + k % 8 / 2].b[k / 8];
        d[0] += upper[k % 2] * left[k % 2], d[1] += upper[k % 2] * right[k % 2];
        d[2] += lower[k % 2] * left[k % 2], d[3] += lower[k % 2] * right[k % 2];
    }
}
#else
#define MULTIPLY_ADD(T, type)                                                                                        \
    __device__ __forceinline__ void multiply_add(T, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "      \
            "{%8, %9}, {%0, %1, %2, %3};"                                                                            \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                     \
    }
MULTIPLY_ADD(__half, "f16")
MULTIPLY_ADD(__nv_bfloat16, "bf16")
#undef MULTIPLY_ADD
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply_add(T{}, d, a, b);
}
#endif

// --- four 8x8 matrices of half precision from shared memory --------------------------------------------------------
//
// Lane i passes the address of row i % 8 of matrix i / 8: 8 elements, aligned to 16 bytes. From each matrix it gets
// elements 2t and 2t + 1 of row g; if TRANSPOSED, of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], const void* row) {
#ifdef WARP_GIVES
    const auto given = WARP_GIVES(row);
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    for (int m = 0; m < 4; ++m) {
        const auto element = [&](int r, int c) { return (unsigned)((const uint16_t*)given[m * 8 + r])[c]; };
        const unsigned low = TRANSPOSED ? element(2 * t, g) : element(g, 2 * t);
        out[m] = low | (TRANSPOSED ? element(2 * t + 1, g) : element(g, 2 * t + 1)) << 16;
    }
#else
    const unsigned place = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(place)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(place)
                     : "memory");
#endif
}

// --- asynchronous copies from global to shared memory, 16 or 8 bytes per call ----------------------------------------
//
// Both addresses are aligned to the size; if not `inside`, zeros are written and `from` is not read. A thread's fetches
// since its last fetch_end() are one batch. fetch_wait<N>() returns when all but the thread's last N batches have
// arrived; a barrier after it makes them visible to the other threads.
#ifdef WARP_GIVES
#define fetch_16(to, from, inside) shim::fetch(to, from, inside, 16)
#define fetch_8(to, from, inside) shim::fetch(to, from, inside, 8)
#define fetch_end() shim::fetch_end()
template <int N>
__device__ void fetch_wait() {
    shim::fetch_wait(N);
}
#else
__device__ __forceinline__ void fetch_16(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void fetch_8(void* to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 8 : 0)
                 : "memory");
}
__device__ __forceinline__ void fetch_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void fetch_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif
