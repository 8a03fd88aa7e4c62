// The linear layers of one token, as steps of `decode_token`. Follows decode.cu (FLOAT 0, TILES_OF_8 1) and values.cu.
//
// A step multiplies the rounded inputs of a product with the weights of up to three layers that share them. Blocks of threads divide its
// units of weights evenly; a row's sums come from two or three blocks, through slots. The warp that brings the last sum of a group of 256
// outputs rotates and scales it and makes of it what comes next, up to the rounded inputs of the next product: a norm's division by the
// root mean square can wait until that product is done, because rounding does not depend on the scale. So nothing is left to do
// between one product and the next.

constexpr int kAttention = 0, kPlain = 1, kResidual = 2, kGated = 3;
constexpr int kGroupRows = kChunk / 64;

struct Step {
    const u32* weights[3];
    const u16* output_scale[3];
    const Value* bias[3];            // or null
    const Value* norm;               // in front of what comes next, or null
    const u16* input_scale;          // of the product that comes next, or null after the last
    const Value* head_norms[2];      // of queries and keys, or null
    Value *keys, *values;            // of the cache
    int kind, units, rows, parts, segment_shift, output_block, input_block, groups_before;
    int part_rows[3], part_outputs[3];
    float output_normal, input_normal;
};

struct Token {
    const Step* steps;
    float *hidden, *projected, *square_sums;   // residual stream; queries, keys and values; sums of squares of its groups
    i8* inputs[2];                             // rounded: of products behind a norm, and of the others
    float* scales[2];
    float* slots;
    u32 *counters, *progress;                  // of groups, zero between steps; finished groups of this token
    float *partial, *weights_of_partial;       // of attention
    const int* position;
    const float *cosines, *sines;              // [positions][HEAD / 2]
    int first, last, hidden_size, heads, kv_heads, length, one;
    float epsilon, scaling;
};

__device__ __forceinline__ void wait_for_groups(const Token& t, u32 wanted) {
    if (threadIdx.x == 0) {
        u32 seen = 0;
        // a block that never comes must not hang the device: after some seconds the launch fails
        for (int i = 0; i < 1 << 24 && seen < wanted; i++) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(t.progress) : "memory");
        if (seen < wanted) __trap();
    }
    __syncthreads();
}

// Says that this warp has finished a group, after everything that its lanes have written.
__device__ __forceinline__ void finish_group(const Token& t, int group, int lane) {
    __syncwarp();
    if (lane == 0) {
        t.counters[group] = 0;
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(t.progress) : "memory");
    }
}

// Whether this warp brings the last of what a group waits for.
__device__ __forceinline__ bool completes(const Token& t, int group, int expected, int lane) {
    int before = 0;
    __syncwarp();
    if (lane == 0) asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(t.counters + group) : "memory");
    before = __shfl_sync(~0u, before, 0);
    __syncwarp();
    return before + 1 == expected;
}

__device__ __forceinline__ float sum_of_lanes(float v) {
    #pragma unroll
    for (int h = 16; h; h /= 2) v += __shfl_xor_sync(~0u, v, h);
    return v;
}

// 1 / root mean square of the residual stream.
__device__ __forceinline__ float norm_factor(const Token& t, int lane) {
    float sum = 0;
    for (int i = lane; i * kChunk < t.hidden_size; i += 32) sum += __ldcg(t.square_sums + i);
    return rsqrtf(sum_of_lanes(sum) / t.hidden_size + t.epsilon);
}

// Eight numbers of a lane, read long before they are used.
template <class T>
struct Eight {
    __align__(16) T of[8];

    __device__ __forceinline__ Eight(const T* from, bool inside) {
        #pragma unroll
        for (int i = 0; i < (int)sizeof(of) / 16; i++) ((uint4*)of)[i] = inside ? ((const uint4*)from)[i] : make_uint4(0, 0, 0, 0);
    }
};

// What turns 256 numbers of a chunk, 8 of a lane, into the rounded inputs of the next product.
struct Rounder {
    const int k;
    const bool inside, any;
    const Eight<u16> scale;

    __device__ __forceinline__ Rounder(const u16* input_scale, int chunk, int size, int lane)
        : k(chunk * kChunk + lane * 8), inside(k < size), any(input_scale), scale(input_scale + k, inside && any) {}

    // Into buffer `which`.
    __device__ __forceinline__ void give(const Token& t, int which, float (&v)[8], int block, float normal, int lane) const {
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = inside ? v[i] * of_half(scale.of[i]) : 0.f;
        rotate_chunk(v, block, normal, lane);
        const Rounding rounding(largest_of_chunk(v, block), true);
        if (!inside) return;
        u32 packed[2] = {0, 0};
        #pragma unroll
        for (int i = 0; i < 8; i++) packed[i / 4] |= (u32)(unsigned char)rounding.int8(v[i]) << (i % 4 * 8);
        *(uint2*)(t.inputs[which] + k) = make_uint2(packed[0], packed[1]);
        if (k % block == 0) t.scales[which][k / block] = rounding.scale;
    }
};

// The residual stream, 256 values of it, to the inputs of the product behind the next norm.
struct Stream {
    const Rounder rounder;
    const Eight<Value> norm;

    __device__ __forceinline__ Stream(const Token& t, const Value* norm, const u16* input_scale, int chunk, int lane)
        : rounder(input_scale, chunk, t.hidden_size, lane), norm(norm + rounder.k, rounder.inside && rounder.any) {}

    __device__ __forceinline__ void give(const Token& t, float (&v)[8], int chunk, int block, float normal, int lane) const {
        float squares = 0;
        #pragma unroll
        for (int i = 0; i < 8; i++) squares += v[i] * v[i];
        squares = sum_of_lanes(squares);
        if (lane == 0) t.square_sums[chunk] = squares;
        if (rounder.inside) {
            ((float4*)(t.hidden + rounder.k))[0] = make_float4(v[0], v[1], v[2], v[3]);
            ((float4*)(t.hidden + rounder.k))[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
        if (!rounder.any) return;
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= read(norm.of[i]);
        rounder.give(t, 0, v, block, normal, lane);
    }
};

struct Place {
    int part, row, group, first;   // row in its part; first row of the group among all rows of the step
};

// Where a row of a step belongs. Gated steps take four rows of gate, four of up, and so on: a group is both.
__device__ __forceinline__ Place place_of(const Step& s, int row) {
    if (s.kind == kGated) {
        const int group = row / (2 * kGroupRows), within = row % (2 * kGroupRows), half = min(kGroupRows, s.part_rows[0] - kGroupRows * group);
        const int part = within >= half;
        return {part, kGroupRows * group + within - part * half, group, row - within};
    }
    int part = 0, group = 0, in_part = row;
    while (part + 1 < s.parts && in_part >= s.part_rows[part]) {
        in_part -= s.part_rows[part];
        group += (s.part_rows[part] + kGroupRows - 1) / kGroupRows;
        part++;
    }
    return {part, in_part, group + in_part / kGroupRows, row - in_part % kGroupRows};
}

__device__ __forceinline__ int rows_of(const Step& s, const Place& p) {
    return min(kGroupRows, s.part_rows[p.part] - p.row / kGroupRows * kGroupRows);
}

__device__ __forceinline__ const u32* unit_words(const Step& s, int row, int unit) {
    const Place p = place_of(s, row);
    return s.weights[p.part] + ((size_t)p.row * s.units + unit) * kUnitWords;
}

// Blocks of threads [from, to] have units of a row.
__device__ __forceinline__ int block_at(u32 unit, u32 all) { return ((unit + 1) * gridDim.x - 1) / all; }

// The outputs of up to four rows, a chunk of a part, 8 of a lane.
struct Outputs {
    const int o;
    const bool inside;
    const Eight<u16> scale;
    const Eight<Value> bias;

    __device__ __forceinline__ Outputs(const Step& s, int part, int chunk, int lane)
        : o(chunk * kChunk + lane * 8), inside(o < s.part_outputs[part]), scale(s.output_scale[part] + o, inside),
          bias(s.bias[part] + o, inside && s.bias[part]) {}

    // Sums of rows first .. first + count - 1, rotated, scaled and times `factor`.
    __device__ __forceinline__ void finish(float (&v)[8], const Token& t, const Step& s, int first, int count, float factor, int lane) const {
        const int row = first + lane / 8;
        const u32 all = s.rows * s.units;
        const bool mine = lane / 8 < count;
        const int from = mine ? block_at(row * s.units, all) : 0, to = mine ? block_at((row + 1) * s.units - 1, all) : -1;
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = 0;
        #pragma unroll 4
        for (int block = from; block <= to; block++) {
            const float4* slot = (const float4*)(t.slots + (size_t)(block + row) * 64 + lane % 8 * 8);
            const float4 low = __ldcg(slot), high = __ldcg(slot + 1);
            v[0] += low.x; v[1] += low.y; v[2] += low.z; v[3] += low.w;
            v[4] += high.x; v[5] += high.y; v[6] += high.z; v[7] += high.w;
        }
        rotate_chunk(v, s.output_block, s.output_normal, lane);
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * of_half(scale.of[i]) * factor + read(bias.of[i]);
    }
};

// What becomes of a group's sums: queries, keys and values for attention,
__device__ __forceinline__ void use_plain(const Token& t, const Step& s, const Place& p, int lane) {
    const Outputs outputs(s, p.part, p.row / kGroupRows, lane);
    const float factor = norm_factor(t, lane);
    float v[8];
    outputs.finish(v, t, s, p.first, rows_of(s, p), factor, lane);
    float* to = t.projected + outputs.o;
    for (int part = 0; part < p.part; part++) to += s.part_outputs[part];
    if (!outputs.inside) return;
    ((float4*)to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4*)to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// or what the residual stream gains,
__device__ __forceinline__ void use_residual(const Token& t, const Step& s, const Place& p, int lane) {
    const int chunk = p.row / kGroupRows;
    const Outputs outputs(s, 0, chunk, lane);
    const Stream stream(t, s.norm, s.input_scale, chunk, lane);
    float v[8], before[8] = {};
    if (outputs.inside) {
        *(float4*)before = __ldcg((const float4*)(t.hidden + outputs.o));
        *(float4*)(before + 4) = __ldcg((const float4*)(t.hidden + outputs.o) + 1);
    }
    outputs.finish(v, t, s, p.first, rows_of(s, p), 1.f, lane);
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] += before[i];
    stream.give(t, v, chunk, s.input_block, s.input_normal, lane);
}

// or silu(gate) * up.
__device__ __forceinline__ void use_gated(const Token& t, const Step& s, const Place& p, int lane) {
    const int chunk = p.row / kGroupRows, count = rows_of(s, p);
    const Outputs gates(s, 0, chunk, lane), ups(s, 1, chunk, lane);
    const Rounder rounder(s.input_scale, chunk, s.part_outputs[0], lane);
    const float factor = norm_factor(t, lane);
    float v[8], up[8];
    gates.finish(v, t, s, p.first, count, factor, lane);
    ups.finish(up, t, s, p.first + count, count, factor, lane);
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fdividef(v[i], 1.f + __expf(-v[i])) * up[i];
    rounder.give(t, 1, v, s.input_block, s.input_normal, lane);
}

// Brings what the end of a row will need closer: nobody has read it since the token before.
__device__ __forceinline__ void expect_group(const Step& s, int row, int lane) {
    const Place p = place_of(s, row);
    const int k = p.row / kGroupRows * kChunk + lane % 4 * 64;
    const void* line = nullptr;
    if (lane < 4) line = s.output_scale[p.part] + k;
    else if (lane < 8 && s.input_scale) line = s.input_scale + k;
    else if (lane >= 8 && lane < 12 && s.norm) line = s.norm + k;
    if (line && k < s.part_outputs[p.part]) asm volatile("prefetch.global.L2 [%0];" :: "l"(line));
}

// Adds what the warps of this block, each with `count / WARPS` of its units, have of a row, and uses the group if nothing else is missing.
__device__ __forceinline__ void give_row(const Token& t, const Step& s, const float* partial, int row, int first_row, u32 begin, u32 count, int lane) {
    const u32 all = s.rows * s.units, row_begin = row * s.units, row_end = row_begin + s.units;
    const int from = row_begin <= begin ? 0 : ((row_begin - begin + 1) * WARPS - 1) / count;
    const int to = row_end >= begin + count ? WARPS - 1 : ((row_end - begin) * WARPS - 1) / count;
    float2 sum = make_float2(0, 0);
    #pragma unroll 4
    for (int w = from; w <= to; w++) {
        // a warp without units has left nothing
        if (count * (w + 1) / WARPS == count * w / WARPS) continue;
        const float2 two = *(const float2*)(partial + (w + row - first_row) * 64 + 2 * lane);
        sum.x += two.x;
        sum.y += two.y;
    }
    *(float2*)(t.slots + (size_t)(blockIdx.x + row) * 64 + 2 * lane) = sum;
    const Place place = place_of(s, row);
    const int rows = rows_of(s, place) * (s.kind == kGated ? 2 : 1), other = place.first + lane;
    int expected = 0;
    if (lane < rows) expected = block_at((other + 1) * s.units - 1, all) - block_at(other * s.units, all) + 1;
    expected = __reduce_add_sync(~0u, expected);
    if (!completes(t, place.group, expected, lane)) return;
    if (s.kind == kPlain) use_plain(t, s, place, lane);
    else if (s.kind == kResidual) use_residual(t, s, place, lane);
    else use_gated(t, s, place, lane);
    finish_group(t, place.group, lane);
}

// Shared memory: inputs, scales, sums of the warps.
__device__ __forceinline__ void product_step(const Token& t, const Step& s, u32* shared, int lane, int warp) {
    const u32 all = s.rows * s.units, block_begin = all * blockIdx.x / gridDim.x, count = all * (blockIdx.x + 1) / gridDim.x - block_begin;
    const u32 begin = block_begin + count * warp / WARPS;
    int left = block_begin + count * (warp + 1) / WARPS - begin, row = begin / s.units, unit = begin % s.units;
    const int which = s.kind == kResidual, segments = s.units + (1 << s.segment_shift) - 1 >> s.segment_shift, segment_mask = (1 << s.segment_shift) - 1;
    const int first_row = block_begin / s.units, last_row = count ? (int)((block_begin + count - 1) / s.units) : first_row - 1;
    u32 w[kWords], next[kWords];
    const u32* at = left ? unit_words(s, row, unit) : nullptr;
    if (left) load_unit(w, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
    if (first_row + warp <= last_row) expect_group(s, first_row + warp, lane);
    uint4* values = (uint4*)shared;
    float *scales = (float*)(values + s.units * 4), *partial = scales + (segments + 3 & ~3);
    wait_for_groups(t, s.groups_before);
    if (!count) return;
    for (int i = threadIdx.x; i < s.units * 4; i += 32 * WARPS) values[i] = __ldcg((const uint4*)t.inputs[which] + i);
    for (int i = threadIdx.x; i < segments; i += 32 * WARPS) scales[i] = __ldcg(t.scales[which] + i);
    __syncthreads();
    const Lookup lookup = {address_parts(lane), (u32)t.one};
    const bool has_input = lane < 4;
    uint4 x4 = make_uint4(0, 0, 0, 0), next_x4 = x4;
    if (has_input && left) x4 = values[unit * 4 + lane];
    Sums sums;
    sums.clear();
    float total[1][4][4] = {};
    while (left) {
        const bool row_ends = unit + 1 == s.units, last = row_ends || left == 1;
        const Inputs x = {{{x4.x, x4.y, x4.z, x4.w}}};
        if (left > 1) {
            at = row_ends ? unit_words(s, row + 1, 0) : at + kUnitWords;
            load_unit(next, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
            if (has_input) next_x4 = values[row_ends ? lane : unit * 4 + 4 + lane];
        }
        multiply_unit(sums, w, x, lookup, lane);
        if (last || (unit + 1 & segment_mask) == 0) scale_segment(total, sums, scales, unit >> s.segment_shift, segments, 1, lane);
        if (last) {
            store_slot((u32*)(partial + (warp + row - first_row) * 64), total, 1, lane);
            #pragma unroll
            for (int i = 0; i < 16; i++) (&total[0][0][0])[i] = 0;
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
    for (int r = first_row + warp; r <= last_row; r += WARPS) give_row(t, s, partial, r, first_row, block_begin, count, lane);
}
