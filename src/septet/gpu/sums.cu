// The products of a step of `decode_token`: a block's units of weights, their sums, and what a warp makes of 256 outputs. Follows steps.cu.
//
// While a block waits for its inputs, its warps decode their first units, one into registers, those of the first STORED warps one more into
// shared memory behind the tables. Warps that finish outputs of the step before come too late for that.
//
// Macro: STORED, at most WARPS.

constexpr int kUnitLines = kUnitWords / 32;   // of the L2
constexpr u32 kStoredAt = kTableAt + ((kPlaces == 4 ? 2 : 1) << 16);

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

// The first that a warp of this block finishes, and every WARPS-th from there on: the last warps begin, since the first have rows to add.
__device__ __forceinline__ int first_of_warp(int groups, int warp) { return first_group(groups, blockIdx.x) + WARPS - 1 - warp; }

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
        await_eights<4>(from, to, tag, at, [&](int, const float (&sum)[8]) {
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
    float v[8] = {};
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
    if (line && k < s.part_outputs[g.part]) bring_closer(line);
}

// What a block has of a step's units.
struct Share {
    u32 begin, count;
    int first_row, last_row;   // without units the last is before the first

    __device__ __forceinline__ Share(const Step& s) {
        const u32 all = s.rows * s.units;
        begin = first_unit(blockIdx.x, all);
        count = first_unit(blockIdx.x + 1, all) - begin;
        first_row = begin / s.units;
        last_row = count ? (int)((begin + count - 1) / s.units) : first_row - 1;
    }

    // The first unit of a worker's, counted from the block's first.
    __device__ __forceinline__ u32 first_of(int worker) const { return count * worker / WARPS; }
};

// Where a warp is among its units.
struct Walk {
    int left, row, unit;   // units that are left, this one among them
    const u32* at;

    __device__ __forceinline__ Walk(const Step& s, const Share& share, int worker) {
        const u32 first = share.first_of(worker), begin = share.begin + first;
        left = share.first_of(worker + 1) - first;
        row = begin / s.units;
        unit = begin - row * s.units;
        at = left ? unit_words(s, row, unit) : nullptr;
    }

    __device__ __forceinline__ void step(const Step& s) {
        left--;
        at += kUnitWords;
        if (++unit < s.units) return;
        unit = 0;
        row++;
        if (left) at = unit_words(s, row, 0);
    }

    // The words of this unit, if it is one. Those two units on come closer: registers have room for one.
    __device__ __forceinline__ void load(const Step& s, u32 (&w)[kWords], int lane) const {
        if (!left) return;
        load_unit(w, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
        if (lane < kUnitLines && unit + 2 < s.units) bring_closer(at + 2 * kUnitWords + lane * 32);
    }
};

// Adds what the warps of this block have of a row.
__device__ __forceinline__ void give_row(const Token& t, const Step& s, u32 tag, const float* partial, const Share& share, int row,
    int lane) {
    const u32 row_begin = row * s.units, row_end = row_begin + s.units, begin = share.begin, count = share.count;
    const int from = row_begin <= begin ? 0 : ((row_begin - begin + 1) * WARPS - 1) / count;
    const int to = row_end >= begin + count ? WARPS - 1 : ((row_end - begin) * WARPS - 1) / count;
    float2 sum = make_float2(0, 0);
    #pragma unroll 4
    for (int worker = from; worker <= to; worker++) {
        // whoever has no units has left nothing
        if (share.first_of(worker + 1) == share.first_of(worker)) continue;
        const float2 two = *(const float2*)(partial + (worker + row - share.first_row) * 64 + 2 * lane);
        sum.x += two.x;
        sum.y += two.y;
    }
    put_two(t.slots + (size_t)(blockIdx.x + row) * 64 + 2 * lane, __float_as_uint(sum.x), __float_as_uint(sum.y), tag);
}

// Sums of a row as a warp goes along it.
struct Row {
    Sums sums;
    float4* to;   // eight outputs of every fourth lane, in shared memory: the loop around this needs all registers
    bool first;

    __device__ __forceinline__ explicit Row(float* to) : to((float4*)to), first(true) { sums.clear(); }

    // Adds sums of a segment of inputs, times its scale. The one token is column 0 of the tensor cores' results.
    __device__ __forceinline__ void add_segment(float scale, int lane) {
        if (lane % 4 == 0) {
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 four = first ? make_float4(0, 0, 0, 0) : to[i];
                four.x += scale * (float)sums.of[0][2 * i][0];
                four.y += scale * (float)sums.of[0][2 * i][2];
                four.z += scale * (float)sums.of[0][2 * i + 1][0];
                four.w += scale * (float)sums.of[0][2 * i + 1][2];
                to[i] = four;
            }
        }
        sums.clear();
        first = false;
    }

    __device__ __forceinline__ void end_unit(const Step& s, const float* scales, int unit, bool is_last, int lane) {
        const bool ends = unit + 1 == s.units;
        if (ends || is_last || (unit + 1 & (1 << s.segment_shift) - 1) == 0) add_segment(scales[unit >> s.segment_shift], lane);
        if (!ends) return;
        to += 16;
        first = true;
    }
};

// The inputs of a product and their scales, into shared memory: as soon as all of them are there.
__device__ __forceinline__ void await_inputs(uint2* values, float* scales, const u64* from, const u64* from_scales, u32 tag, int eights,
    int segments) {
    constexpr int kThreads = 32 * WARPS, kAtATime = 4;
    Patience patience;
    for (int first = threadIdx.x; first < max(eights, segments); first += kThreads * kAtATime) {
        Two two[kAtATime] = {};
        u64 scale[kAtATime] = {};
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

// The inputs of a unit that a lane gives to the tensor cores, whose other columns than the token's are zeros.
__device__ __forceinline__ uint4 inputs_of(const Memory& memory, int unit, int lane) {
    return lane < 4 ? memory.values[unit * 4 + lane] : make_uint4(0, 0, 0, 0);
}

// Units that a warp decodes before it waits: one in registers, and one more where behind the tables there is room for its operands.
__device__ __forceinline__ int most_ahead(int warp) { return warp < STORED ? 2 : 1; }
__device__ __forceinline__ u32 stored_at(int warp, int lane) { return kStoredAt + warp * kOperandBytes + lane * 16; }
constexpr u32 kStoredStride = 4 * 128;

// Decodes the first units of a walk, of which `w` is the first; it is then the one behind them. The last of `most` stays in `ahead`.
// Returns how many there were.
__device__ __forceinline__ int decode_first(const Step& s, Walk& walk, u32 (&w)[kWords], Operands& ahead, int most, u32 store,
    const Lookup& lookup, int lane) {
    int count = 0;
    #pragma unroll 1
    while (count < most && walk.left) {
        u32 next[kWords] = {};
        walk.step(s);
        walk.load(s, next, lane);
        decode_unit(ahead, w, lookup, lane);
        if (++count < most) put_operands(store, kStoredStride, ahead);
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
    return count;
}

// Brings a worker's first unit of a product closer, whose step need not be in shared memory yet.
__device__ __forceinline__ void expect_product(const Step& s, int worker, int lane) {
    const Walk first(s, Share(s), worker);
    if (first.left && lane < kUnitLines) bring_closer(first.at + lane * 32);
}

// The sums of this warp's units, left in shared memory. What the step before has written bears `tag`. Until that is there, a warp decodes
// its first units; but not if it comes `late`, since then the others have waited for what it had to finish.
__device__ __forceinline__ void multiply_units(const Token& t, const Step& s, const Share& share, int index, u32 tag, bool late) {
    // the last warp, which has most often something to finish, gets the first share: if any, others have a unit more
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, worker = worker_of(WARPS - 1 - warp), most = late ? 0 : most_ahead(warp);
    const bool behind_norm = s.kind != kResidual;
    const Memory memory(s);
    const int group = first_of_warp(s.groups, warp);
    if (group < first_group(s.groups, blockIdx.x + 1)) expect_group(s, group, lane);
    Walk walk(s, share, worker), here = walk;
    u32 w[kWords] = {};
    walk.load(s, w, lane);
    if (lane < kUnitLines && walk.left > 1 && walk.unit + 1 < s.units) bring_closer(walk.at + kUnitWords + lane * 32);
    const Lookup lookup = {address_parts(lane), (u32)t.one};
    Operands ahead = {};
    const int decoded = decode_first(s, walk, w, ahead, most, stored_at(warp, lane), lookup, lane);
    const int product = index + (s.kind == kPlain ? 2 : 1);
    if (!late && product < t.last) expect_product(t.steps[product], worker, lane);
    // warps leave the step before one by one; its shared memory is free when all have
    __syncthreads();
    // whoever has no units must not wait for words that others may write again without having waited for this block
    if (share.count)
        await_inputs((uint2*)memory.values, memory.scales, t.inputs[!behind_norm], t.scales[!behind_norm], tag, s.units * 8,
            s.units >> s.segment_shift);
    __syncthreads();
    Row row(memory.partial + (worker + here.row - share.first_row) * 64 + lane / 4 * 8);
    #pragma unroll 1
    for (int i = 0; i < decoded; i++) {
        if (i + 1 < most) {
            Operands stored;
            get_operands(stored_at(warp, lane), kStoredStride, stored);
            multiply_operands(row.sums, stored, inputs_of(memory, here.unit, lane));
        } else {
            multiply_operands(row.sums, ahead, inputs_of(memory, here.unit, lane));
        }
        row.end_unit(s, memory.scales, here.unit, here.left == 1, lane);
        here.step(s);
    }
    #pragma unroll 1
    while (walk.left) {
        u32 next[kWords];
        const int unit = walk.unit;
        const uint4 x4 = inputs_of(memory, unit, lane);
        const Inputs x = {{{x4.x, x4.y, x4.z, x4.w}}};
        walk.step(s);
        walk.load(s, next, lane);
        multiply_unit(row.sums, w, x, lookup, lane);
        row.end_unit(s, memory.scales, unit, walk.left == 0, lane);
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
}

// Returns whether this warp had outputs to finish, while the others went on.
__device__ __forceinline__ bool product_step(const Token& t, int index, u32 tag, bool late) {
    const Step& s = step_at(index);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Share share(s);
    multiply_units(t, s, share, index, tag, late);
    __syncthreads();
    #pragma unroll 1
    for (int row = share.first_row + warp; row <= share.last_row; row += WARPS)
        give_row(t, s, tag + 1, Memory(s).partial, share, row, lane);
    const int first = first_of_warp(s.groups, warp), end = first_group(s.groups, blockIdx.x + 1);
    #pragma unroll 1
    for (int i = first; i < end; i += WARPS) use_group(t, s, tag + 1, Group(s, i), lane);
    return first < end;
}
