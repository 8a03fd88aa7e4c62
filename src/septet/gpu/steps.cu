// The linear layers of one token, as steps of `decode_token`. Follows decode.cu (FLOAT 0, TILES_OF_8 1) and values.cu.
//
// A step multiplies the rounded inputs of a product with the weights of up to three layers that share them. Blocks of threads divide its
// units of weights evenly; a row's sums come from a few blocks. For each group of 256 outputs one warp waits for all its sums, rotates and
// scales them and makes of them what comes next, up to the rounded inputs of the next product: a norm's division by the root mean
// square can wait until that product is done, because rounding does not depend on the scale. So nothing is left to do between one
// product and the next.
//
// Blocks hand each other numbers in words of 64 bits: 32 bits of number, and the tag of the step that wrote them. Whoever needs a word
// reads it until it has the tag; no fence, no flag. A word is written again only by steps that need, through others, what its readers made
// of it.

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
    int kind, units, rows, parts, segment_shift, output_block, input_block, groups;
    int part_rows[3], part_outputs[3];
    float output_normal, input_normal;
};

struct Token {
    const Step* steps;
    float* hidden;                             // residual stream
    u64 *projected, *square_sums;              // words: queries, keys and values; sums of squares of the stream's groups
    u64* inputs[2];                            // words of four int8: inputs of products behind a norm, and of the others
    u64* scales[2];                            // words
    u64 *slots, *partial, *weights_of_partial; // words: sums of products; of attention
    u32* tag;                                  // of the beginning; step i writes words with tag + i + 1
    const int* position;
    const float *cosines, *sines;              // [positions][HEAD / 2]
    int first, last, hidden_size, heads, kv_heads, length, one;
    float epsilon, scaling;
};

__device__ __forceinline__ u64 word_of(u32 number, u32 tag) { return (u64)tag << 32 | number; }

struct Two {
    u64 a, b;

    __device__ __forceinline__ bool has(u32 tag) const { return (u32)(a >> 32) == tag && (u32)(b >> 32) == tag; }
};

__device__ __forceinline__ u64 word_at(const u64* p) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(p) : "memory");
    return word;
}

__device__ __forceinline__ Two two_at(const u64* p) {
    Two two;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(two.a), "=l"(two.b) : "l"(p) : "memory");
    return two;
}

__device__ __forceinline__ void put(u64* p, u32 number, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(p), "l"(word_of(number, tag)) : "memory");
}

__device__ __forceinline__ void put_two(u64* p, u32 first, u32 second, u32 tag) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" :: "l"(p), "l"(word_of(first, tag)), "l"(word_of(second, tag)) : "memory");
}

// Counts vain attempts: what never comes must not hang the device, so after some seconds the launch fails.
struct Patience {
    int left = 1 << 23;

    __device__ __forceinline__ void again() {
        if (--left == 0) __trap();
    }
};

__device__ __forceinline__ float await_number(const u64* p, u32 tag) {
    Patience patience;
    u64 word = word_at(p);
    while ((u32)(word >> 32) != tag) patience.again(), word = word_at(p);
    return __uint_as_float((u32)word);
}

// Eight floats for each of up to `kAtATime` places at once, in order; `use` gets them. `at` tells where place i is.
template <int kAtATime, class At, class Use>
__device__ __forceinline__ void await_eights(int from, int to, u32 tag, At at, Use use) {
    Patience patience;
    for (int first = from; first <= to; first += kAtATime) {
        Two two[kAtATime][4];
        for (bool missing = true; missing; patience.again()) {
            missing = false;
            #pragma unroll
            for (int i = 0; i < kAtATime; i++)
                if (first + i <= to) {
                    #pragma unroll
                    for (int j = 0; j < 4; j++) two[i][j] = two_at(at(first + i) + 2 * j);
                }
            #pragma unroll
            for (int i = 0; i < kAtATime; i++)
                if (first + i <= to) {
                    #pragma unroll
                    for (int j = 0; j < 4; j++) missing |= !two[i][j].has(tag);
                }
        }
        #pragma unroll
        for (int i = 0; i < kAtATime; i++)
            if (first + i <= to) {
                float v[8];
                #pragma unroll
                for (int j = 0; j < 4; j++) v[2 * j] = __uint_as_float((u32)two[i][j].a), v[2 * j + 1] = __uint_as_float((u32)two[i][j].b);
                use(first + i, v);
            }
    }
}

__device__ __forceinline__ float sum_of_lanes(float v) {
    #pragma unroll
    for (int h = 16; h; h /= 2) v += __shfl_xor_sync(~0u, v, h);
    return v;
}

// 1 / root mean square of the residual stream.
__device__ __forceinline__ float norm_factor(const Token& t, u32 tag, int lane) {
    float sum = 0;
    for (int i = lane; i * kChunk < t.hidden_size; i += 32) sum += await_number(t.square_sums + i, tag);
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
    __device__ __forceinline__ void give(const Token& t, int which, u32 tag, float (&v)[8], int block, float normal, int lane) const {
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = inside ? v[i] * of_half(scale.of[i]) : 0.f;
        rotate_chunk(v, block, normal, lane);
        const Rounding rounding(largest_of_chunk(v, block), true);
        if (!inside) return;
        u32 packed[2] = {0, 0};
        #pragma unroll
        for (int i = 0; i < 8; i++) packed[i / 4] |= (u32)(unsigned char)rounding.int8(v[i]) << (i % 4 * 8);
        put_two(t.inputs[which] + k / 4, packed[0], packed[1], tag);
        if (k % block == 0) put(t.scales[which] + k / block, __float_as_uint(rounding.scale), tag);
    }
};

// The residual stream, 256 values of it, to the inputs of the product behind the next norm.
struct Stream {
    const Rounder rounder;
    const Eight<Value> norm;

    __device__ __forceinline__ Stream(const Token& t, const Value* norm, const u16* input_scale, int chunk, int lane)
        : rounder(input_scale, chunk, t.hidden_size, lane), norm(norm + rounder.k, rounder.inside && rounder.any) {}

    __device__ __forceinline__ void give(const Token& t, u32 tag, float (&v)[8], int chunk, int block, float normal, int lane) const {
        float squares = 0;
        #pragma unroll
        for (int i = 0; i < 8; i++) squares += v[i] * v[i];
        squares = sum_of_lanes(squares);
        if (lane == 0) put(t.square_sums + chunk, __float_as_uint(squares), tag);
        if (rounder.inside) {
            ((float4*)(t.hidden + rounder.k))[0] = make_float4(v[0], v[1], v[2], v[3]);
            ((float4*)(t.hidden + rounder.k))[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
        if (!rounder.any) return;
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= read(norm.of[i]);
        rounder.give(t, 0, tag, v, block, normal, lane);
    }
};

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
            for (int chunks; chunks = (s.part_rows[part] + kGroupRows - 1) / kGroupRows, chunk >= chunks; chunk -= chunks) first += s.part_rows[part++];
        first += chunk * kGroupRows * (s.kind == kGated ? 2 : 1);
        count = min(kGroupRows, s.part_rows[part] - chunk * kGroupRows);
    }
};

// The first of `groups` that the warps of a block finish; those of the next block follow.
__device__ __forceinline__ int first_group(int groups, int block) { return (block * groups + (int)gridDim.x - 1) / (int)gridDim.x; }

// The block of threads that has a unit.
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
    __device__ __forceinline__ void finish(float (&v)[8], const Token& t, const Step& s, u32 tag, int first, int count, float factor, int lane) const {
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
        rotate_chunk(v, s.output_block, s.output_normal, lane);
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * of_half(scale.of[i]) * factor + read(bias.of[i]);
    }
};

// What becomes of a group's sums: queries, keys and values for attention,
__device__ __forceinline__ void use_plain(const Token& t, const Step& s, u32 tag, const Group& g, int lane) {
    const Outputs outputs(s, g.part, g.chunk, lane);
    const float factor = norm_factor(t, tag - 1, lane);
    float v[8];
    outputs.finish(v, t, s, tag, g.first, g.count, factor, lane);
    u64* to = t.projected + outputs.o;
    for (int part = 0; part < g.part; part++) to += s.part_outputs[part];
    if (!outputs.inside) return;
    #pragma unroll
    for (int i = 0; i < 8; i += 2) put_two(to + i, __float_as_uint(v[i]), __float_as_uint(v[i + 1]), tag);
}

// or what the residual stream gains, whose groups are always finished by the same warp,
__device__ __forceinline__ void use_residual(const Token& t, const Step& s, u32 tag, const Group& g, int lane) {
    const Outputs outputs(s, 0, g.chunk, lane);
    const Stream stream(t, s.norm, s.input_scale, g.chunk, lane);
    float v[8], before[8] = {};
    if (outputs.inside) {
        *(float4*)before = *(const float4*)(t.hidden + outputs.o);
        *(float4*)(before + 4) = *((const float4*)(t.hidden + outputs.o) + 1);
    }
    outputs.finish(v, t, s, tag, g.first, g.count, 1.f, lane);
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] += before[i];
    stream.give(t, tag, v, g.chunk, s.input_block, s.input_normal, lane);
}

// or silu(gate) * up.
__device__ __forceinline__ void use_gated(const Token& t, const Step& s, u32 tag, const Group& g, int lane) {
    const Outputs gates(s, 0, g.chunk, lane), ups(s, 1, g.chunk, lane);
    const Rounder rounder(s.input_scale, g.chunk, s.part_outputs[0], lane);
    const float factor = norm_factor(t, tag - 1, lane);
    float v[8], up[8];
    gates.finish(v, t, s, tag, g.first, g.count, factor, lane);
    ups.finish(up, t, s, tag, g.first + g.count, g.count, factor, lane);
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fdividef(v[i], 1.f + __expf(-v[i])) * up[i];
    rounder.give(t, 1, tag, v, s.input_block, s.input_normal, lane);
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
__device__ __forceinline__ void give_row(const Token& t, const Step& s, u32 tag, const float* partial, int row, int first_row, u32 begin, u32 count, int lane) {
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

// Sums of a segment of inputs, times its scale, onto the sums of the row. The one token is column 0 of the tensor cores' results.
__device__ __forceinline__ void scale_column(float (&total)[8], Sums& sums, float scale) {
    #pragma unroll
    for (int i = 0; i < 8; i++) total[i] += scale * (float)sums.of[0][i / 2][i % 2 * 2];
    sums.clear();
}

// The inputs of a product and their scales, into shared memory: as soon as all of them are there.
__device__ __forceinline__ void await_inputs(uint2* values, float* scales, const Token& t, int which, u32 tag, int eights, int segments) {
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
                if (at < eights) two[i] = two_at(t.inputs[which] + 2 * at);
                if (at < segments) scale[i] = word_at(t.scales[which] + at);
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

// Shared memory: inputs, scales, sums of the warps. What the step before has written bears `tag`.
__device__ __forceinline__ void product_step(const Token& t, const Step& s, u32 tag, u32* shared, int lane, int warp) {
    const u32 all = s.rows * s.units, block_begin = all * blockIdx.x / gridDim.x, count = all * (blockIdx.x + 1) / gridDim.x - block_begin;
    const u32 begin = block_begin + count * warp / WARPS;
    int left = block_begin + count * (warp + 1) / WARPS - begin, row = begin / s.units, unit = begin % s.units;
    const int segments = s.units + (1 << s.segment_shift) - 1 >> s.segment_shift, segment_mask = (1 << s.segment_shift) - 1;
    const int first_row = block_begin / s.units, last_row = count ? (int)((block_begin + count - 1) / s.units) : first_row - 1;
    u32 w[kWords], next[kWords];
    const u32* at = left ? unit_words(s, row, unit) : nullptr;
    if (left) load_unit(w, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
    // the last warps finish groups, since the first have rows to add
    const int group = first_group(s.groups, blockIdx.x) + WARPS - 1 - warp, last_group = first_group(s.groups, blockIdx.x + 1) - 1;
    if (group <= last_group) expect_group(s, group, lane);
    uint4* values = (uint4*)shared;
    float *scales = (float*)(values + s.units * 4), *partial = scales + (segments + 3 & ~3);
    // warps leave the step before one by one; its shared memory is free when all have
    __syncthreads();
    await_inputs((uint2*)values, scales, t, s.kind == kResidual, tag, s.units * 8, segments);
    __syncthreads();
    const Lookup lookup = {address_parts(lane), (u32)t.one};
    const bool has_input = lane < 4;
    uint4 x4 = make_uint4(0, 0, 0, 0), next_x4 = x4;
    if (has_input && left) x4 = values[unit * 4 + lane];
    Sums sums;
    sums.clear();
    float total[8] = {};
    while (left) {
        const bool row_ends = unit + 1 == s.units, last = row_ends || left == 1;
        const Inputs x = {{{x4.x, x4.y, x4.z, x4.w}}};
        if (left > 1) {
            at = row_ends ? unit_words(s, row + 1, 0) : at + kUnitWords;
            load_unit(next, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
            if (has_input) next_x4 = values[row_ends ? lane : unit * 4 + 4 + lane];
        }
        multiply_unit(sums, w, x, lookup, lane);
        if (last || (unit + 1 & segment_mask) == 0) scale_column(total, sums, scales[unit >> s.segment_shift]);
        if (last) {
            float4* to = (float4*)(partial + (warp + row - first_row) * 64 + lane / 4 * 8);
            if (lane % 4 == 0) {
                to[0] = make_float4(total[0], total[1], total[2], total[3]);
                to[1] = make_float4(total[4], total[5], total[6], total[7]);
            }
            #pragma unroll
            for (int i = 0; i < 8; i++) total[i] = 0;
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
    for (int r = first_row + warp; r <= last_row; r += WARPS) give_row(t, s, tag + 1, partial, r, first_row, block_begin, count, lane);
    #pragma unroll 1
    for (int i = group; i <= last_group; i += WARPS) {
        const Group g(s, i);
        if (s.kind == kPlain) use_plain(t, s, tag + 1, g, lane);
        else if (s.kind == kResidual) use_residual(t, s, tag + 1, g, lane);
        else use_gated(t, s, tag + 1, g, lane);
    }
}
