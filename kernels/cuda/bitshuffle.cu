// Integers to bit planes, in the order of Blosc's filter "bitshuffle": in each block of values all lowest bits come
// first, then all second lowest, ...
//
// One thread takes 8 neighbouring values: their 8 bits of a plane are one byte of it. Neighbouring threads write
// neighbouring bytes. A block whose length is no multiple of 8 values stays as it is.
#include "common.cuh"

constexpr int TOGETHER = 8;

// Transposes the 8x8 bits: bit i of byte j of the result is bit j of byte i.
__device__ __forceinline__ unsigned long long turned(unsigned long long x) {
    unsigned long long t = (x ^ x >> 7) & 0x00aa00aa00aa00aaull;  // within squares of 2, then of 4, then of 8
    x ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000cccc0000ccccull;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000f0f0f0f0ull;
    return x ^ t ^ t << 28;
}

// values: (batch, count). out: their bytes; each block takes the place that its values have in memory. block: number of
// values, a multiple of 8.
template <class Word>
__device__ __forceinline__ void bitshuffle(const Word* values, unsigned char* out, int batch, int count, int block) {
    const long long groups = (count + TOGETHER - 1) / TOGETHER;  // of a batch
    const long long number = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (number >= batch * groups) return;
    const int group = (int)(number % groups), first = group * TOGETHER / block * block;  // first value of its block
    const long long before = number / groups * count + first;                            // values before that block
    const int length = count - first < block ? count - first : block, place = group * TOGETHER - first;
    const Word* const from = values + before;
    unsigned char* const to = out + before * (int)sizeof(Word);
    if (length % TOGETHER) {
        for (int i = place; i < length && i < place + TOGETHER; ++i)
            for (int b = 0; b < (int)sizeof(Word); ++b)
                to[i * (int)sizeof(Word) + b] = (unsigned char)(from[i] >> 8 * b);
        return;
    }
    Word mine[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) mine[i] = from[place + i];
    const int plane = length / TOGETHER;  // bytes
#pragma unroll
    for (int b = 0; b < (int)sizeof(Word); ++b) {
        unsigned long long bytes = 0;
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) bytes |= (unsigned long long)(mine[i] >> 8 * b & 255) << 8 * i;
        bytes = turned(bytes);
#pragma unroll
        for (int bit = 0; bit < 8; ++bit)
            to[(8 * b + bit) * plane + place / TOGETHER] = (unsigned char)(bytes >> 8 * bit);
    }
}

#define SHUFFLE(bits, Word)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) bitshuffle_##bits(                                             \
        const Word* values, unsigned char* out, int batch, int count, int block                                      \
    ) {                                                                                                              \
        bitshuffle(values, out, batch, count, block);                                                                \
    }
SHUFFLE(16, unsigned short)
SHUFFLE(32, unsigned)
