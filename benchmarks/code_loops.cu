// Bare decode-and-multiply loops of the candidate codes on a GPU, one token: what each costs before any kernel is tuned.
// Timing only: random bytes, sums are not checked. A row is cut into chunks of 2048 weights, 7 words for each of 32 lanes; a lane holds the activations of its
// 64 weights in registers and walks down the rows. Build: nvcc -O3 -std=c++17 -gencode=arch=compute_90,code=sm_90 code_loops.cu -o loops
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call) do { const cudaError_t error_ = (call); if (error_ != cudaSuccess) { printf("%s, line %d\n", cudaGetErrorString(error_), __LINE__); exit(1); } } while (0)

enum class Code { kLoads, kTableFloat, kTableBytes, kPairTable, kTwoProducts, kAlternating43 };
constexpr int kPairsPerLane = 32, kWordsPerLane = 7, kChunk = 2048;
constexpr uint32_t kMultiplier = 0x658981FC;

struct Sums { float real = 0; int even = 0, odd = 0; __half2 half{}; };

// Table bytes: four copies of the 128 levels shifted by 0, 8, 16, 24 bits, each spread over 32 lanes so that no two lanes meet in a bank.
template <Code code>
__device__ void fill_table(uint32_t* table) {
    if (code == Code::kTableFloat)
        for (int i = threadIdx.x; i < 128 * 32; i += blockDim.x) table[i] = __float_as_uint((i >> 5) - 63.5f);
    if (code == Code::kTableBytes)
        for (int i = threadIdx.x; i < 4 * 128 * 32; i += blockDim.x) table[i] = (uint32_t)(((i >> 5) & 127) - 64 & 0xFF) << (8 * (i >> 12));
    if (code == Code::kPairTable)
        for (int i = threadIdx.x; i < 1 << 15; i += blockDim.x) { const __half2 v = __floats2half2_rn((i & 127) - 64.f, ((i >> 8) & 127) - 64.f); table[i] = *(const uint32_t*)&v; }
    __syncthreads();
}

// Two neighbouring pairs, windows in the low 16 bits of w0 and w1 (rubbish above).
template <Code code>
__device__ void two_pairs(Sums& s, uint32_t w0, uint32_t w1, const float* xf, const int* xi, const __half2* xh, const char* table, uint32_t lane4) {
    w0 &= 0xFFFF;
    w1 &= 0xFFFF;
    if (code == Code::kLoads) { s.even += w0; s.odd += w1; }
    if (code == Code::kTableFloat) {
        const uint32_t a = w0 * kMultiplier, b = w1 * kMultiplier;
        s.real = fmaf(xf[0], *(const float*)(table + ((a >> 9) & 0x3F80)), s.real);
        s.real = fmaf(xf[1], *(const float*)(table + ((a >> 17) & 0x3F80)), s.real);
        s.real = fmaf(xf[2], *(const float*)(table + ((b >> 9) & 0x3F80)), s.real);
        s.real = fmaf(xf[3], *(const float*)(table + ((b >> 17) & 0x3F80)), s.real);
    }
    if (code == Code::kTableBytes) {
        const uint32_t a = w0 * kMultiplier & 0x7F7F0000, b = w1 * kMultiplier & 0x7F7F0000;
        const uint32_t i0 = __byte_perm(a, 0, 0x4442) * 128, i1 = __byte_perm(a, 0, 0x4443) * 128, i2 = __byte_perm(b, 0, 0x4442) * 128, i3 = __byte_perm(b, 0, 0x4443) * 128;
        const uint32_t four = (*(const uint32_t*)(table + i0) | *(const uint32_t*)(table + 16384 + i1)) | (*(const uint32_t*)(table + 32768 + i2) | *(const uint32_t*)(table + 49152 + i3));
        s.even = __dp4a((int)four, xi[0], s.even);
    }
    if (code == Code::kPairTable) {
        const uint32_t a = w0 * kMultiplier, b = w1 * kMultiplier;
        s.half = __hfma2(*(const __half2*)(table - lane4 + ((a >> 14) & 0x1FFFC)), xh[0], s.half);
        s.half = __hfma2(*(const __half2*)(table - lane4 + ((b >> 14) & 0x1FFFC)), xh[1], s.half);
    }
    if (code == Code::kTwoProducts) {
        s.even = __dp4a((int)(w0 * 0xCBAC1FEDu), xi[0], s.even);
        s.odd = __dp4a((int)(w0 * 0x85EBCA6Bu), xi[1], s.odd);
        s.even = __dp4a((int)(w1 * 0xCBAC1FEDu), xi[2], s.even);
        s.odd = __dp4a((int)(w1 * 0x85EBCA6Bu), xi[3], s.odd);
    }
}

template <Code code, int chunks, int groups>
__global__ void __launch_bounds__(32 * chunks * groups)
product(const uint32_t* __restrict__ packed, const float* __restrict__ x_float, const int* __restrict__ x_int, float* y, int rows_per_block) {
    extern __shared__ uint32_t table[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunk = warp % chunks, group = warp / chunks;
    fill_table<code>(table);
    const char* lane_table = (const char*)table + lane * 4;
    constexpr bool real = code == Code::kTableFloat, half = code == Code::kPairTable;
    constexpr int ints = code == Code::kTableBytes ? 16 : 64;  // one register per dp4a
    float xf[real ? 64 : 1];
    __half2 xh[half ? 32 : 1];
    int xi[!real && !half ? ints : 1];
    const int first_x = chunk * kChunk + lane * 64;
    if (real) for (int i = 0; i < 64; i++) xf[i] = x_float[first_x + i];
    if (half) for (int i = 0; i < 32; i++) xh[i] = __floats2half2_rn(x_float[first_x + 2 * i], x_float[first_x + 2 * i + 1]);
    if (!real && !half) for (int i = 0; i < ints; i++) xi[i] = x_int[first_x + i];
    for (int r = blockIdx.x * rows_per_block + group; r < (blockIdx.x + 1) * rows_per_block; r += groups) {
        const uint32_t* p = packed + ((size_t)r * chunks + chunk) * (32 * kWordsPerLane) + lane;
        uint32_t w[kWordsPerLane + 1];
        #pragma unroll
        for (int j = 0; j < kWordsPerLane; j++) w[j] = __ldcs(p + j * 32);
        w[kWordsPerLane] = __shfl_sync(~0u, w[0], (lane & ~3) | ((lane + 1) & 3));  // a tile is four lanes and bites its tail
        Sums s;
        #pragma unroll
        for (int t = 0; t < kPairsPerLane; t += 2) {
            const int b0 = 7 * t, b1 = 7 * t + 7;
            const uint32_t w0 = __funnelshift_r(w[b0 >> 5], w[(b0 >> 5) + 1], b0 & 31), w1 = __funnelshift_r(w[b1 >> 5], w[min((b1 >> 5) + 1, kWordsPerLane)], b1 & 31);
            if (code == Code::kAlternating43) {
                const int c0 = b0 + 4, c1 = b1 + 4;
                const uint32_t v0 = __funnelshift_r(w[c0 >> 5], w[min((c0 >> 5) + 1, kWordsPerLane)], c0 & 31) & 0xFFFF, v1 = __funnelshift_r(w[c1 >> 5], w[min((c1 >> 5) + 1, kWordsPerLane)], c1 & 31) & 0xFFFF;
                s.even = __dp4a((int)((w0 & 0xFFFF) * 0x83DCD12Du), xi[2 * t], s.even);
                s.odd = __dp4a((int)(v0 * 0x83DCD12Du), xi[2 * t + 1], s.odd);
                s.even = __dp4a((int)((w1 & 0xFFFF) * 0x83DCD12Du), xi[2 * t + 2], s.even);
                s.odd = __dp4a((int)(v1 * 0x83DCD12Du), xi[2 * t + 3], s.odd);
            } else {
                two_pairs<code>(s, w0, w1, xf + (real ? 2 * t : 0), xi + (real || half ? 0 : code == Code::kTableBytes ? t / 2 : 2 * t), xh + (half ? t : 0), lane_table, lane * 4);
            }
        }
        float total = s.real + (float)(s.even + s.odd) + __low2float(s.half) + __high2float(s.half);
        #pragma unroll
        for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
        if (lane == 0) atomicAdd(y + r, total);
    }
}

template <Code code, int chunks, int groups>
void time_it(const char* name, int outputs, int rows_per_block) {
    const int inputs = chunks * kChunk, copies = 4, threads = 32 * chunks * groups;
    const size_t words = (size_t)outputs * chunks * 32 * kWordsPerLane;
    std::vector<uint32_t> host(words);
    for (size_t i = 0; i < words; i++) host[i] = (uint32_t)(i * 2654435761u) ^ (uint32_t)(i >> 7) * 40503u;
    std::vector<uint32_t*> packed(copies);
    for (auto& p : packed) { CHECK(cudaMalloc(&p, words * 4)); CHECK(cudaMemcpy(p, host.data(), words * 4, cudaMemcpyHostToDevice)); }
    float *x, *y;
    int* xi;
    CHECK(cudaMalloc(&x, inputs * 4)); CHECK(cudaMalloc(&xi, inputs * 4)); CHECK(cudaMalloc(&y, outputs * 4));
    CHECK(cudaMemset(x, 0x3C, inputs * 4)); CHECK(cudaMemset(xi, 3, inputs * 4));
    auto kernel = product<code, chunks, groups>;
    const int shared = code == Code::kTableFloat ? 16384 : code == Code::kTableBytes ? 65536 : code == Code::kPairTable ? 131072 : 0;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaFuncAttributes attributes;
    CHECK(cudaFuncGetAttributes(&attributes, kernel));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 20; i++) {
        CHECK(cudaEventRecord(begin));
        for (auto p : packed) kernel<<<outputs / rows_per_block, threads, shared>>>(p, x, xi, y, rows_per_block);
        CHECK(cudaEventRecord(end)); CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms / copies * 1e3f);
    }
    std::sort(times.begin(), times.end());
    const double us = times[times.size() / 2];
    printf("%-34s K %d N %d, %3d rows a block, %2d warps, %3d registers, %3d KB shared: %6.1f us %5.0f GB/s %5.2f Tweight/s\n", name, inputs, outputs, rows_per_block, threads / 32, attributes.numRegs, shared / 1024, us, words * 4 / us / 1e3, (double)inputs * outputs / us / 1e6);
    for (auto p : packed) cudaFree(p);
    cudaFree(x); cudaFree(xi); cudaFree(y);
}

template <int groups>
void all(int rows) {
    time_it<Code::kLoads, 4, groups>("loads only", 28672, rows);
    time_it<Code::kTableFloat, 4, groups>("table, float, no conflicts", 28672, rows);
    time_it<Code::kTableBytes, 4, groups>("table, int8, no conflicts, dp4a", 28672, rows);
    time_it<Code::kPairTable, 4, groups>("table of pairs, half2, conflicts", 28672, rows);
    time_it<Code::kTwoProducts, 4, groups>("two products, byte sums, dp4a", 28672, rows);
    time_it<Code::kAlternating43, 4, groups>("V=1 4/3, byte sums, dp4a", 28672, rows);
}

int main() {
    all<2>(64);
    all<4>(128);
    all<4>(224);
    all<6>(96);
}
