// The inputs of a block of layer.cu, rotated and rounded in chunks of 256. Follows columns.cu.

// 256 values of H_in (s_in * x), and the bits of the largest magnitude in each Hadamard block or, for one scale per token, in all.
__device__ __forceinline__ u32 rotated_inputs(float (&v)[8], const LayerArguments& l, int token, int chunk, int lane) {
    const int k = chunk * kChunk + lane * 8;
    scaled_inputs(v, l.x + (size_t)token * l.inputs + k, l.input_scale + k, k < l.inputs);
    rotate_chunk<5>(v, l.input_block, l.input_normal, lane);
    return largest_of_chunk(v, SEGMENTED ? l.input_block : kChunk);
}

__device__ __forceinline__ void store_inputs(const Memory& memory, const float (&v)[8], u32 top, const LayerArguments& l, int token,
    int chunk, int segments, int lane) {
    const Rounding rounding(top, true);
    const int k = chunk * kChunk + lane * 8;
    if (k >= 64 * l.units) return;
    const int place = memory.place(k / 64);
    u32 packed[2] = {0, 0};
    #pragma unroll
    for (int i = 0; i < 8; i++) packed[i / 4] |= (u32)(unsigned char)rounding.int8(v[i]) << (i % 4 * 8);
    *(uint2*)(memory.values + (size_t)(token * l.units + place) * 64 + k % 64) = make_uint2(packed[0], packed[1]);
    if (SEGMENTED && k % (64 << l.segment_shift) == 0) memory.scales[token * segments + (place >> l.segment_shift)] = rounding.scale;
}

// int8 inputs [token][64 * units] and scales [token][segments] in shared memory, for the chunks that units first .. first+count-1 touch.
__device__ __forceinline__ void prepare_inputs(const Memory& memory, const LayerArguments& l, int first, int count, int segments) {
    u32* const tops = (u32*)(memory.scales + l.tokens * segments);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = (l.units + kChunkUnits - 1) / kChunkUnits;
    const bool by_token = !SEGMENTED;
    #pragma unroll 1
    for (int token = 0; token < l.tokens; token++) {
        u32 whole = 0;
        // one scale per token takes two passes: the first only looks for the largest magnitude
        #pragma unroll 1
        for (int pass = by_token ? 0 : 1; pass < 2; pass++) {
            #pragma unroll 1
            for (int chunk = warp; chunk < chunks; chunk += WARPS) {
                int ahead = chunk * kChunkUnits - first;
                if (ahead < 0) ahead += l.units;
                if (pass && ahead >= count && ahead <= l.units - kChunkUnits) continue;
                float v[8];
                const u32 top = rotated_inputs(v, l, token, chunk, lane);
                if (pass == 0) whole = max(whole, top);
                else store_inputs(memory, v, by_token ? whole : top, l, token, chunk, segments, lane);
            }
            if (pass == 0) {
                if (lane == 0) tops[warp] = whole;
                __syncthreads();
                for (int i = 0; i < WARPS; i++) whole = max(whole, tops[i]);
                if (threadIdx.x == 0) memory.scales[token] = Rounding(whole, true).scale;
                __syncthreads();
            }
        }
    }
}

#if ALL
// The same for Hadamard blocks of a whole chunk, with a scale each: all warps do the first strides of all chunks, then one warp the rest of
// one. A warp alone takes 4 to 5 cycles for an instruction, so what it saves is time.
struct ChunkInputs {
    u16 scale[kMostChunks];   // known before the inputs are
    int k[kMostChunks], count;

    __device__ __forceinline__ ChunkInputs(const LayerArguments& l, const Memory& memory, const Share& share) {
        count = memory.chunks(l, share);
        #pragma unroll
        for (int i = 0; i < kMostChunks; i++) {
            k[i] = memory.first * 64 + i * kChunk + threadIdx.x;
            if (k[i] >= l.inputs) k[i] -= l.inputs;
            scale[i] = i < count ? l.input_scale[k[i]] : (u16)0;
            // known now, not where it is used
            asm volatile("" : "+r"(k[i]));
        }
    }

    // A word of the table's place, of which nothing is needed any more.
    __device__ __forceinline__ static u32 buffer(int chunk, int part, int lane) { return kTableAt + (chunk * 8 + part) * 256 + lane * 4; }

    __device__ __forceinline__ void prepare(const LayerArguments& l, const Memory& memory, int warp, int lane) const {
        float value[kMostChunks];
        #pragma unroll
        for (int i = 0; i < kMostChunks; i++) value[i] = i < count ? __fmul_rn(read(l.x[k[i]]), of_half(scale[i])) : 0.f;
        #pragma unroll
        for (int h = 1; h < 32; h *= 2)
            #pragma unroll
            for (int i = 0; i < kMostChunks; i++) value[i] = butterfly(value[i], __shfl_xor_sync(~0u, value[i], h), lane & h);
        #pragma unroll
        for (int i = 0; i < kMostChunks; i++)
            asm volatile("st.shared.f32 [%0], %1;" :: "r"(buffer(i, warp, lane)), "f"(value[i]) : "memory");
        __syncthreads();
        if (warp >= count) return;
        float v[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __uint_as_float(table_word(buffer(warp, i, lane)));
        #pragma unroll
        for (int h = 1; h < 8; h *= 2)
            #pragma unroll
            for (int i = 0; i < 8; i++)
                if (!(i & h)) add_and_subtract(v[i], v[i + h]);
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __fmul_rn(v[i], l.input_normal);
        u32 top = 0;
        #pragma unroll
        for (int i = 0; i < 8; i++) top = max(top, magnitude(v[i]));
        const Rounding rounding(largest_of_warp(top), true);
        i8* const to = memory.values + warp * kChunk + lane;
        if (rounding.finite && __float_as_uint(rounding.factor) < kInfinity) {
            #pragma unroll
            for (int i = 0; i < 8; i++) to[i * 32] = (i8)integer(v[i], rounding.factor);
        } else {
            #pragma unroll
            for (int i = 0; i < 8; i++) to[i * 32] = rounding.int8(v[i]);
        }
        if (lane == 0) memory.scales[warp] = rounding.scale;
    }
};
#endif

// The same from `rotate`.
__device__ __forceinline__ void copy_inputs(const Memory& memory, const LayerArguments& l, int segments) {
    for (int i = threadIdx.x; i < l.tokens * l.units * 4; i += 32 * WARPS) ((uint4*)memory.values)[i] = ((const uint4*)l.values)[i];
    for (int i = threadIdx.x; i < l.tokens * segments; i += 32 * WARPS) memory.scales[i] = l.scales[i];
}
