// A whole trellis layer for very few tokens in one launch: rotation and rounding of the inputs, product, sums of slots, rotation of the
// outputs. Follows decode.cu (with FLOAT 0 and TILES_OF_8 1) and values.cu.
//
// Few inputs are rotated by every block of threads that needs them, which is cheaper than a launch that does it once; many come from
// `rotate`. A block adds the partial sums of its warps. The sums of a row of tiles, of which two or three blocks have some, go to slots. The warp that completes the last
// slot of a group of outputs (a counter tells it) adds the slots in their order and writes the result; so who is last decides who
// works, and never what comes out. Counters are zero between launches: whoever completes a group clears its counter.

constexpr int kChunkUnits = kChunk / 64;

struct LayerArguments {
    const u32* weights;
    const Value* x;
    const u16 *input_scale, *output_scale;
    Value* y;
    u32 *slots, *counters;
    const i8* values;      // rotated inputs from `rotate`, or null
    const float* scales;
    int inputs, outputs, units, rows, tokens, workers, segment_shift, one, input_block, output_block;
    float input_normal, output_normal;
};

// 256 values of H_in (s_in * x), and the bits of the largest magnitude in each Hadamard block or, for one scale per token, in all.
__device__ __forceinline__ u32 rotated_inputs(float (&v)[8], const LayerArguments& l, int token, int chunk, int lane) {
    const int k = chunk * kChunk + lane * 8;
    scaled_inputs(v, l.x + (size_t)token * l.inputs + k, l.input_scale + k, k < l.inputs);
    rotate_chunk(v, l.input_block, l.input_normal, lane);
    return largest_of_chunk(v, l.segment_shift >= 0 ? l.input_block : kChunk);
}

__device__ __forceinline__ void store_inputs(i8* values, float* scales, const float (&v)[8], u32 top, const LayerArguments& l, int token, int chunk, int segments, int lane) {
    const Rounding rounding(top, true);
    const int k = chunk * kChunk + lane * 8;
    if (k >= 64 * l.units) return;
    u32 packed[2] = {0, 0};
    #pragma unroll
    for (int i = 0; i < 8; i++) packed[i / 4] |= (u32)(unsigned char)rounding.int8(v[i]) << (i % 4 * 8);
    *(uint2*)(values + (size_t)token * 64 * l.units + k) = make_uint2(packed[0], packed[1]);
    if (l.segment_shift >= 0 && k % (64 << l.segment_shift) == 0) scales[token * segments + (k / 64 >> l.segment_shift)] = rounding.scale;
}

// int8 inputs [token][64 * units] and scales [token][segments] in shared memory, for the chunks that units first .. first+count-1 touch.
__device__ __forceinline__ void prepare_inputs(i8* values, float* scales, u32* tops, const LayerArguments& l, int first, int count, int segments) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = (l.units + kChunkUnits - 1) / kChunkUnits;
    const bool by_token = l.segment_shift < 0;
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
                else store_inputs(values, scales, v, by_token ? whole : top, l, token, chunk, segments, lane);
            }
            if (pass == 0) {
                if (lane == 0) tops[warp] = whole;
                __syncthreads();
                for (int i = 0; i < WARPS; i++) whole = max(whole, tops[i]);
                if (threadIdx.x == 0) scales[token] = Rounding(whole, true).scale;
                __syncthreads();
            }
        }
    }
}

__device__ __forceinline__ int worker_at(u32 unit, u32 all, u32 workers) { return ((unit + 1) * workers - 1) / all; }

struct Range {
    int from, to;
};

// The warps that have units of a row.
__device__ __forceinline__ Range workers_of(const LayerArguments& l, int row, u32 all) {
    return {worker_at(row * l.units, all, l.workers), worker_at((row + 1) * l.units - 1, all, l.workers)};
}

// The outputs of `group`, 256 at most: 8 of a lane.
__device__ __forceinline__ void finish_group(const LayerArguments& l, int group, int group_rows, u32 all, const float* scales, int lane) {
    const int row = group * group_rows + lane / 8, o = row * 64 + lane % 8 * 8;
    const bool mine = lane / 8 < group_rows && row < l.rows;
    const Range workers = workers_of(l, mine ? row : 0, all);
    const int from = workers.from / WARPS, to = mine ? workers.to / WARPS : from - 1;
    #pragma unroll 1
    for (int token = 0; token < l.tokens; token++) {
        float v[8] = {};
        int whole[8] = {};
        #pragma unroll 2
        for (int block = from; block <= to; block++) {
            const uint4* slot = (const uint4*)(l.slots + ((size_t)(block + row) * l.tokens + token) * 64 + lane % 8 * 8);
            const uint4 low = __ldcg(slot), high = __ldcg(slot + 1);
            const u32 eight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                if (l.segment_shift < 0) whole[i] += (int)eight[i];
                else v[i] = __fadd_rn(v[i], __uint_as_float(eight[i]));
            }
        }
        if (l.segment_shift < 0) {
            #pragma unroll
            for (int i = 0; i < 8; i++) v[i] = __fmul_rn(scales[token], (float)whole[i]);
        }
        rotate_chunk(v, l.output_block, l.output_normal, lane);
        if (mine) {
            #pragma unroll
            for (int i = 0; i < 8; i++)
                if (o + i < l.outputs) l.y[(size_t)token * l.outputs + o + i] = write(__fmul_rn(v[i], of_half(l.output_scale[o + i])));
        }
    }
}

// Adds what the block's warps have of row `row`, two outputs of a lane, and finishes the row's group if nothing else is missing.
__device__ __forceinline__ void give_row(const LayerArguments& l, const u32* partial, int row, int first_row, u32 all, const float* scales, int lane) {
    const Range workers = workers_of(l, row, all);
    const int first_worker = blockIdx.x * WARPS, from = max(workers.from, first_worker), to = min(workers.to, first_worker + WARPS - 1);
    for (int token = 0; token < l.tokens; token++) {
        uint2 sum = make_uint2(0, 0);
        #pragma unroll 4
        for (int w = from; w <= to; w++) {
            const uint2 two = *(const uint2*)(partial + ((w - first_worker + row - first_row) * l.tokens + token) * 64 + 2 * lane);
            if (l.segment_shift < 0) {
                sum.x += two.x;
                sum.y += two.y;
            } else {
                sum.x = __float_as_uint(__fadd_rn(__uint_as_float(sum.x), __uint_as_float(two.x)));
                sum.y = __float_as_uint(__fadd_rn(__uint_as_float(sum.y), __uint_as_float(two.y)));
            }
        }
        *(uint2*)(l.slots + ((size_t)(blockIdx.x + row) * l.tokens + token) * 64 + 2 * lane) = sum;
    }
    __syncwarp();
    const int group_rows = max(1, l.output_block / 64), group = row / group_rows;
    int before = 0, expected = 0;
    // releases what all lanes have written, and acquires what other blocks have
    if (lane == 0) asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(l.counters + group) : "memory");
    const int other = group * group_rows + lane;
    if (lane < group_rows && other < l.rows) {
        const Range theirs = workers_of(l, other, all);
        expected = theirs.to / WARPS - theirs.from / WARPS + 1;
    }
    expected = __reduce_add_sync(~0u, expected);
    if (__shfl_sync(~0u, before, 0) + 1 < expected) return;
    __syncwarp();
    finish_group(l, group, group_rows, all, scales, lane);
    if (lane == 0) l.counters[group] = 0;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) layer(const __grid_constant__ LayerArguments l) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, warp = threadIdx.x >> 5, worker = blockIdx.x * WARPS + warp;
    const u32 all = l.rows * l.units, begin = all * min(worker, l.workers) / l.workers;
    int left = all * min(worker + 1, l.workers) / l.workers - begin;
    const u32 *fours = l.weights + (size_t)begin * kUnitWords + lane * 4, *twos = fours - lane * 4 + kWords / 4 * 128 + lane * 2;
    u32 w[kWords], next[kWords];
    let_the_next_begin();
    if (left) load_unit(w, fours, twos);
    fill_table();
    wait_for_inputs();
    const bool segmented = l.segment_shift >= 0;
    const int segment_mask = segmented ? (1 << l.segment_shift) - 1 : 0, segments = segmented ? l.units + segment_mask >> l.segment_shift : 1;
    i8* values = (i8*)shared_memory;
    u32* partial = (u32*)(values + (l.values ? 0 : (size_t)l.tokens * 64 * l.units));
    const u32 block_begin = all * (blockIdx.x * WARPS) / l.workers, block_end = all * min((blockIdx.x + 1) * WARPS, (u32)l.workers) / l.workers;
    const int first_row = block_begin / l.units, last_row = (block_end - 1) / l.units;
    float* scales = (float*)(partial + (WARPS + last_row - first_row) * l.tokens * 64);
    if (!l.values) prepare_inputs(values, scales, (u32*)(scales + l.tokens * segments), l, block_begin % l.units, min(block_end - block_begin, (u32)l.units), segments);
    __syncthreads();
    if (l.values) {
        values = const_cast<i8*>(l.values);
        scales = const_cast<float*>(l.scales);
    }
    const Lookup lookup = {address_parts(lane), (u32)l.one};
    int row = begin / l.units, unit = begin % l.units;
    const uint4* row_inputs = (const uint4*)(values + (size_t)(g < l.tokens ? g : 0) * 64 * l.units) + t;
    uint4 x4 = make_uint4(0, 0, 0, 0), next_x4 = x4;
    if (g < l.tokens && left) x4 = row_inputs[unit * 4];
    Sums sums;
    sums.clear();
    float total[1][4][4] = {};
    while (left) {
        const bool last = unit + 1 == l.units || left == 1;
        const Inputs x = {{{x4.x, x4.y, x4.z, x4.w}}};
        fours += kUnitWords;
        twos += kUnitWords;
        if (left > 1) {
            load_unit(next, fours, twos);
            if (g < l.tokens) next_x4 = row_inputs[last ? 0 : unit * 4 + 4];
        }
        multiply_unit(sums, w, x, lookup, lane);
        if (segmented && (last || (unit + 1 & segment_mask) == 0)) scale_segment(total, sums, scales, unit >> l.segment_shift, segments, l.tokens, lane);
        if (last) {
            u32* slot = partial + (warp + row - first_row) * l.tokens * 64;
            if (segmented) {
                store_slot(slot, total, l.tokens, lane);
                #pragma unroll
                for (int i = 0; i < 16; i++) (&total[0][0][0])[i] = 0;
            } else {
                store_slot(slot, sums.of, l.tokens, lane);
                sums.clear();
            }
            row++;
            unit = -1;
        }
        left--;
        unit++;
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
        x4 = next_x4;
    }
    __syncthreads();
    #pragma unroll 1
    for (int r = first_row + warp; r <= last_row; r += WARPS) give_row(l, partial, r, first_row, all, scales, lane);
}
