// The products of a step of `decode_token`: a block's units of weights, their sums, and what a warp makes of 256 outputs. Follows steps.cu.

struct Place {
    int part, row;
};

// Where a row of a step belongs. Gated steps take four rows of gate, four of up, and so on.
__device__ __forceinline__ Place place_of(const Step& s, int row) {
    if (s.kind == kGated) {
        const int first = row / (2 * kGroupRows) * kGroupRows, within = row - 2 * first, half = min(kGroupRows, s.part_rows[0] - first);
        const int part = within >= half;
        return {part, first + within - part * half};
    }
    int part = 0;
    while (part + 1 < s.parts && row >= s.part_rows[part]) row -= s.part_rows[part++];
    return {part, row};
}

__device__ __forceinline__ const u32* unit_words(const Step& s, int row, int unit) {
    const Place p = place_of(s, row);
    return s.weights[p.part] + ((size_t)p.row * s.units + unit) * kUnitWords;
}

// Up to 256 outputs that one warp finishes: rows of a part, or of gate and as many of up.
struct Group {
    int part, chunk, first, count;   // chunk of the part; first row among those of the step; rows of the part

    __device__ __forceinline__ Group(const Step& s, int group) : part(0), chunk(group), first(0) {
        if (s.kind != kGated)
            for (int chunks; chunks = (s.part_rows[part] + kGroupRows - 1) / kGroupRows, chunk >= chunks; chunk -= chunks)
                first += s.part_rows[part++];
        first += chunk * kGroupRows * (s.kind == kGated ? 2 : 1);
        count = min(kGroupRows, s.part_rows[part] - chunk * kGroupRows);
    }
};

// The first of `groups` that the warps of a block finish; those of the next block follow.
__device__ __forceinline__ int first_group(int groups, int block) { return (block * groups + (int)gridDim.x - 1) / (int)gridDim.x; }

// The blocks of threads that divide a step's units: no more than there are units.
__device__ __forceinline__ u32 blocks_of(u32 all) { return min(all, gridDim.x); }

// The one that has a unit.
__device__ __forceinline__ int block_at(u32 unit, u32 all) { return ((unit + 1) * blocks_of(all) - 1) / all; }

// The first unit of a block; of the one behind the last, the end.
__device__ __forceinline__ u32 first_unit(u32 block, u32 all) { return all * min(block, blocks_of(all)) / blocks_of(all); }

// The outputs of up to four rows, a chunk of a part, 8 of a lane.
struct Outputs {
    const int part, o;
    const bool inside;
    const Eight<u16> scale;
    const Eight<Value> bias;

    __device__ __forceinline__ Outputs(const Step& s, int part, int chunk, int lane)
        : part(part), o(chunk * kChunk + lane * 8), inside(o < s.part_outputs[part]), scale(s.output_scale[part] + o, inside),
          bias(s.bias[part] + o, inside && s.bias[part]) {}

    // Sums of rows first .. first + count - 1, rotated, scaled and times `factor`.
    __device__ __forceinline__ void finish(float (&v)[8], const Token& t, const Step& s, u32 tag, int first, int count, float factor,
        int lane) const {
        const int row = first + lane / 8;
        const u32 all = s.rows * s.units;
        const bool mine = lane / 8 < count;
        const int from = mine ? block_at(row * s.units, all) : 0, to = mine ? block_at((row + 1) * s.units - 1, all) : -1;
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = 0;
        const auto at = [&](int block) { return t.slots + (size_t)(block + row) * 64 + lane % 8 * 8; };
        await_eights<2>(from, to, tag, at, [&](int, const float (&sum)[8]) {
            #pragma unroll
            for (int i = 0; i < 8; i++) v[i] += sum[i];
        });
        __syncwarp();
        rotate_chunk(v, s.output_block[part], s.output_normal[part], lane);
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * of_half(scale.of[i]) * factor + read(bias.of[i]);
    }
};

// What becomes of a group's sums: queries, keys and values for attention; or silu(gate) * up; or what the residual stream gains, whose
// groups are always finished by the same warp.
__device__ __forceinline__ void use_group(const Token& t, const Step& s, u32 tag, const Group& g, int lane) {
    const Rounder rounder(s.input_scale, g.chunk, s.part_outputs[g.part], lane);
    const Eight<Value> norm(s.norm + rounder.k, s.norm && rounder.inside);
    float v[8];
    __align__(16) float other[8] = {};
    if (s.kind == kResidual && rounder.inside) {
        *(float4*)other = *(const float4*)(t.hidden + rounder.k);
        *(float4*)(other + 4) = *((const float4*)(t.hidden + rounder.k) + 1);
    }
    const float factor = s.kind == kResidual ? 1.f : norm_factor(t, tag - 1, lane);
    #pragma unroll 1
    for (int i = 0; i <= (s.kind == kGated); i++) {
        if (i) {
            #pragma unroll
            for (int j = 0; j < 8; j++) other[j] = v[j];
        }
        Outputs(s, g.part + i, g.chunk, lane).finish(v, t, s, tag, g.first + i * g.count, g.count, factor, lane);
    }
    if (s.kind == kPlain) {
        u64* to = t.projected + rounder.k;
        for (int part = 0; part < g.part; part++) to += s.part_outputs[part];
        if (!rounder.inside) return;
        #pragma unroll
        for (int i = 0; i < 8; i += 2) put_two(to + i, __float_as_uint(v[i]), __float_as_uint(v[i + 1]), tag);
        return;
    }
    if (s.kind == kResidual) {
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] += other[i];
        keep_stream(t, tag, v, rounder, g.chunk, lane);
        if (!rounder.any) return;
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= read(norm.of[i]);
    } else {
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= __fdividef(other[i], 1.f + __expf(-other[i]));
    }
    rounder.give(t, s.kind == kGated, tag, v, s.input_block, s.input_normal, lane);
}

// Brings what a group will need closer: nobody has read it since the token before.
__device__ __forceinline__ void expect_group(const Step& s, int group, int lane) {
    const Group g(s, group);
    const int k = g.chunk * kChunk + lane % 4 * 64;
    const void* line = nullptr;
    if (lane < 4) line = s.output_scale[g.part] + k;
    else if (lane < 8 && s.input_scale) line = s.input_scale + k;
    else if (lane < 12 && s.norm) line = s.norm + k;
    else if (lane < 16 && s.kind == kGated) line = s.output_scale[1] + k;
    if (line && k < s.part_outputs[g.part]) asm volatile("prefetch.global.L2 [%0];" :: "l"(line));
}

// Adds what the warps of this block, each with `count / WARPS` of its units, have of a row.
__device__ __forceinline__ void give_row(const Token& t, const Step& s, u32 tag, const float* partial, int row, int first_row, u32 begin,
    u32 count, int lane) {
    const u32 row_begin = row * s.units, row_end = row_begin + s.units;
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
    put_two(t.slots + (size_t)(blockIdx.x + row) * 64 + 2 * lane, __float_as_uint(sum.x), __float_as_uint(sum.y), tag);
}

// Sums of a segment of inputs, times its scale, onto the sums of the row, which are in shared memory: the loop around this needs all
// registers. The one token is column 0 of the tensor cores' results, eight outputs of every fourth lane.
__device__ __forceinline__ void scale_column(float4* total, Sums& sums, float scale, bool first, int lane) {
    if (lane % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 four = first ? make_float4(0, 0, 0, 0) : total[i];
            four.x += scale * (float)sums.of[0][2 * i][0];
            four.y += scale * (float)sums.of[0][2 * i][2];
            four.z += scale * (float)sums.of[0][2 * i + 1][0];
            four.w += scale * (float)sums.of[0][2 * i + 1][2];
            total[i] = four;
        }
    }
    sums.clear();
}

// The inputs of a product and their scales, into shared memory: as soon as all of them are there.
__device__ __forceinline__ void await_inputs(uint2* values, float* scales, const u64* from, const u64* from_scales, u32 tag, int eights,
    int segments) {
    constexpr int kThreads = 32 * WARPS, kAtATime = 4;
    Patience patience;
    for (int first = threadIdx.x; first < max(eights, segments); first += kThreads * kAtATime) {
        Two two[kAtATime];
        u64 scale[kAtATime];
        for (bool missing = true; missing; patience.again()) {
            missing = false;
            #pragma unroll
            for (int i = 0; i < kAtATime; i++) {
                const int at = first + i * kThreads;
                if (at < eights) two[i] = two_at(from + 2 * at);
                if (at < segments) scale[i] = word_at(from_scales + at);
            }
            #pragma unroll
            for (int i = 0; i < kAtATime; i++) {
                const int at = first + i * kThreads;
                if (at < eights) missing |= !two[i].has(tag);
                if (at < segments) missing |= (u32)(scale[i] >> 32) != tag;
            }
        }
        #pragma unroll
        for (int i = 0; i < kAtATime; i++) {
            const int at = first + i * kThreads;
            if (at < eights) values[at] = make_uint2((u32)two[i].a, (u32)two[i].b);
            if (at < segments) scales[at] = __uint_as_float((u32)scale[i]);
        }
    }
}

// Where a step's numbers are in shared memory: inputs, their scales, sums of the warps, four of which are read at once.
struct Memory {
    uint4* values;
    float *scales, *partial;

    __device__ __forceinline__ Memory(const Step& s)
        : values((uint4*)work_memory()), scales((float*)(values + s.units * 4)), partial(scales + (s.units + 3 & ~3)) {}
};

// The sums of this warp's units, left in shared memory. What the step before has written bears `tag`.
__device__ __forceinline__ void multiply_units(const u64* inputs, const u64* input_scales, u32 one, int index, u32 tag) {
    const Step& s = step_at(index);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 all = s.rows * s.units, block_begin = first_unit(blockIdx.x, all), count = first_unit(blockIdx.x + 1, all) - block_begin;
    const u32 begin = block_begin + count * warp / WARPS;
    const Memory memory(s);
    int left = block_begin + count * (warp + 1) / WARPS - begin, row = begin / s.units, unit = begin % s.units;
    const int group = first_group(s.groups, blockIdx.x) + WARPS - 1 - warp;
    if (group < first_group(s.groups, blockIdx.x + 1)) expect_group(s, group, lane);
    const u32* at = left ? unit_words(s, row, unit) : nullptr;
    // the first units come closer while this block waits, and later ones two ahead: registers have room for one
    constexpr int kLines = kUnitWords / 32;
    if (lane < kLines * min(min(left, s.units - unit), 2)) asm volatile("prefetch.global.L2 [%0];" :: "l"(at + lane * 32));
    // warps leave the step before one by one; its shared memory is free when all have
    __syncthreads();
    // whoever has no units must not wait for words that others may write again without having waited for this block
    if (count) await_inputs((uint2*)memory.values, memory.scales, inputs, input_scales, tag, s.units * 8, s.units >> s.segment_shift);
    u32 w[kWords], next[kWords];
    if (left) load_unit(w, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
    __syncthreads();
    const Lookup lookup = {address_parts(lane), one};
    float* to = memory.partial + (warp + row - block_begin / s.units) * 64 + lane / 4 * 8;
    const int segment_mask = (1 << s.segment_shift) - 1;
    Sums sums;
    sums.clear();
    bool first = true;
    while (left) {
        const bool row_ends = unit + 1 == s.units;
        uint4 x4 = make_uint4(0, 0, 0, 0);
        if (lane < 4) x4 = memory.values[unit * 4 + lane];
        const Inputs x = {{{x4.x, x4.y, x4.z, x4.w}}};
        if (left > 1) {
            at = row_ends ? unit_words(s, row + 1, 0) : at + kUnitWords;
            load_unit(next, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
            if (lane < kLines && unit + 3 < s.units) asm volatile("prefetch.global.L2 [%0];" :: "l"(at + 2 * kUnitWords + lane * 32));
        }
        multiply_unit(sums, w, x, lookup, lane);
        if (row_ends || left == 1 || (unit + 1 & segment_mask) == 0) {
            scale_column((float4*)to, sums, memory.scales[unit >> s.segment_shift], first, lane);
            first = row_ends;
        }
        if (row_ends) {
            to += 64;
            row++;
            unit = -1;
        }
        left--;
        unit++;
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
}

// What becomes of them, when all warps of this block are done.
__device__ __forceinline__ void use_units(const Token& t, int index, u32 tag) {
    const Step& s = step_at(index);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 all = s.rows * s.units, begin = first_unit(blockIdx.x, all), count = first_unit(blockIdx.x + 1, all) - begin;
    const float* partial = Memory(s).partial;
    const int first_row = begin / s.units, last_row = count ? (int)((begin + count - 1) / s.units) : first_row - 1;
    #pragma unroll 1
    for (int r = first_row + warp; r <= last_row; r += WARPS) give_row(t, s, tag + 1, partial, r, first_row, begin, count, lane);
    // the last warps finish groups, since the first have rows to add
    #pragma unroll 1
    for (int i = first_group(s.groups, blockIdx.x) + WARPS - 1 - warp; i < first_group(s.groups, blockIdx.x + 1); i += WARPS)
        use_group(t, s, tag + 1, Group(s, i), lane);
}

__device__ __forceinline__ void product_step(const Token& t, int index, u32 tag) {
    const bool behind_norm = step_at(index).kind != kResidual;
    multiply_units(behind_norm ? t.inputs[0] : t.inputs[1], behind_norm ? t.scales[0] : t.scales[1], t.one, index, tag);
    __syncthreads();
    use_units(t, index, tag);
}
