// A whole trellis layer for very few tokens in one launch: rotation and rounding of the inputs, product, sums of blocks, rotation of the
// outputs. Follows columns.cu, with FLOAT 0 and TILES_OF_8 1.
//
// Rows of tiles stand in groups of four, 256 outputs that are rotated together; a column is a unit of each row of a group. Blocks of
// threads divide the columns evenly, group after group, so that a block has a short range of inputs and rotates no others. Of what a block
// has of a group (a piece), its warps take units row by row. 256 threads add their sums and leave them in the block's slot, or, in the
// block with the group's last column, add them to the other blocks' slots and finish the group. A word of a slot is read until it is not
// empty, and left empty: no fence, no counter. Blocks wait only for blocks before them, which have begun earlier.
//
// Nothing but the inputs comes from the launch before, so a block begins with everything else while that one ends: tables, weights, and
// decoding STORED units of each warp, and if any, one more. Where BLOCKS is 2, a multiprocessor has room for a block of that launch and
// one of this. With ALL, it is two more, no warp has more units, and there is one token: see `Memory`.
//
// Macros: SEGMENTED 0|1: a scale for 2^segment_shift units instead of one per token; STORED 0..3 (with PLACES 1); BLOCKS 1|2; ALL 0|1.

#define KEEP (BLOCKS == 1)   // endings wait in shared memory
constexpr int kSlots = BLOCKS == 2 ? 12 : 8;   // that are read at once
constexpr u32 kEmpty = 0x80000000;   // of a slot: sums begin with 0, so none is -0, and none is the least integer

// Sums of a row of tiles as they grow, and where they go.
struct Row {
    Sums sums;
    Four* to;           // [tokens][64] in shared memory; those of the next row follow
    bool first = true;

    // Adds sums of a segment, times its scale. They are added up in shared memory, since the loop around this needs all registers. Up to
    // two tokens are columns of every fourth lane's results.
    __device__ __forceinline__ void add_segment(const float* scales, int segments, int tokens, int lane) {
        #pragma unroll
        for (int token = 0; token < 2; token++) {
            if (lane % 4 || token >= tokens) continue;
            const float scale = SEGMENTED ? scales[token * segments] : 1.f;
            const auto scaled = [&](int sum) { return SEGMENTED ? (Sum)__fmul_rn(scale, (float)sum) : (Sum)sum; };
            #pragma unroll
            for (int v = 0; v < 2; v++) {
                Four* total = to + token * 16 + lane / 2 + v;
                Four four = first ? Four{0, 0, 0, 0} : *total;
                four.x = add_sums(four.x, scaled(sums.of[0][2 * v][token]));
                four.y = add_sums(four.y, scaled(sums.of[0][2 * v][token + 2]));
                four.z = add_sums(four.z, scaled(sums.of[0][2 * v + 1][token]));
                four.w = add_sums(four.w, scaled(sums.of[0][2 * v + 1][token + 2]));
                *total = four;
            }
        }
        sums.clear();
        first = false;
    }

    __device__ __forceinline__ void end_unit(const LayerArguments& l, const float* scales, int unit, bool ends, int lane) {
        const int shift = SEGMENTED ? l.segment_shift : 2, mask = (1 << shift) - 1;
        if (ends || (unit + 1 & mask) == 0) add_segment(scales + (unit >> shift), l.units + mask >> shift, l.tokens, lane);
        if (!ends) return;
        to += l.tokens * 16;
        first = true;
    }
};

__device__ __forceinline__ u32 word_at(const u32* p) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
    return word;
}

__device__ __forceinline__ void put(u32* p, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(word) : "memory");
}

// In pairs: a warp alone waits for each addition.
template <int kCount>
__device__ __forceinline__ Sum sum_of_all(const u32 (&words)[kCount]) {
    Sum sums[kCount];
    #pragma unroll
    for (int i = 0; i < kCount; i++) sums[i] = sum_of(words[i]);
    #pragma unroll
    for (int h = 1; h < kCount; h *= 2)
        #pragma unroll
        for (int i = 0; i + h < kCount; i += 2 * h) sums[i] = add_sums(sums[i], sums[i + h]);
    return sums[0];
}

// The sum of a word of each of `count` slots in order, as soon as they are there.
__device__ __forceinline__ Sum add_slots(const u32* slot, int count, int stride) {
    int patience = 1 << 23;   // what never comes must not hang the device
    Sum sum = 0;
    #pragma unroll 1
    for (; count > 0; count -= kSlots, slot += kSlots * stride) {
        u32 words[kSlots];
        for (bool missing = true; missing;) {
            #pragma unroll
            for (int i = 0; i < kSlots; i++) words[i] = i < count ? word_at(slot + i * stride) : 0;
            int least = words[0];
            #pragma unroll
            for (int i = 1; i < kSlots; i++) least = min(least, (int)words[i]);
            missing = (u32)least == kEmpty;
            if (--patience == 0) __trap();
        }
        sum = add_sums(sum, sum_of_all(words));
    }
    return sum;
}

__device__ __forceinline__ void empty_slots(u32* slot, int count, int stride) {
    #pragma unroll 1
    for (; count > 0; count -= kSlots, slot += kSlots * stride) {
        #pragma unroll
        for (int i = 0; i < kSlots; i++)
            asm volatile("{\n.reg .pred p;\nsetp.gt.s32 p, %2, 0;\n@p st.relaxed.gpu.global.u32 [%0], %1;\n}"
                :: "l"(slot + i * stride), "r"(kEmpty), "r"(count - i) : "memory");
    }
}

// What becomes of the sums of a piece, one of each of 256 threads: to the block's slot, or with the others of the group to the outputs.
struct Ending {
    int thread, row, o, blocks, index, length, first;
    u32* slot;
    int mine, ends, inside;
    u32 scale;   // float16: nothing waits for it before it is needed

    // Known now, not where it is used and everybody waits for it.
    __device__ __forceinline__ void pin() {
        asm volatile("" : "+r"(o), "+r"(blocks), "+r"(length), "+r"(first), "+l"(slot), "+r"(mine), "+r"(ends), "+r"(inside));
    }

    __device__ __forceinline__ Ending(const LayerArguments& l, const Share& share, const Memory& memory, int piece_index)
        : thread(threadIdx.x % kChunk), row(thread / 64), index(piece_index) {
        const Piece piece = share.piece(l, index);
        o = piece.group * kChunk + thread;
        ends = piece.k + piece.length == l.units;
        inside = ends && o < l.outputs;
        mine = row < piece.rows;
        scale = inside ? l.output_scale[o] : 0;
        length = piece.length;
        first = piece.before + row * length;
        int first_block = blockIdx.x;
        if (ends) first_block = ALL ? l.block_at(piece.group * l.units) : memory.meetings[index * kGroupRows + row].first_block;
        blocks = blockIdx.x - first_block;
        slot = l.slots + first_block * stride(l) + thread;
    }

    // With room in shared memory an ending is found out before the inputs are there, and waits: slot, blocks and what is true, output, scale.
    __device__ __forceinline__ uint4 packed(const LayerArguments& l) const {
        return make_uint4(slot - l.slots, blocks << 3 | mine << 2 | ends << 1 | (u32)inside, o, scale);
    }

    __device__ __forceinline__ Ending(const LayerArguments& l, const uint4& packed, int piece_index)
        : thread(threadIdx.x % kChunk), row(thread / 64), o(packed.z), blocks(packed.y >> 3), index(piece_index), length(0), first(0),
          slot(l.slots + packed.x), mine(packed.y >> 2 & 1), ends(packed.y >> 1 & 1), inside(packed.y & 1), scale(packed.w) {}

    __device__ __forceinline__ static int stride(const LayerArguments& l) { return ALL ? kChunk : l.tokens * kChunk; }

    // Of all warps of this block.
    __device__ __forceinline__ Sum own_sum(const LayerArguments& l, const Memory& memory, int token) const {
        Sum own = 0;
#if ALL
        #pragma unroll 1
        for (int left = mine ? length : 0, unit = first; left > 0; left -= 8, unit += 8) {
            u32 words[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) words[i] = i < left ? table_word(unit_sums(unit, thread % 64) + i * 512) : 0;
            own = add_sums(own, sum_of_all(words));
        }
#else
        const Meeting meeting = memory.meetings[index * kGroupRows + row];
        const u32* at = (const u32*)memory.sums(l, meeting.from, index * kGroupRows + row) + token * 64 + thread % 64;
        #pragma unroll 1
        for (u32 warps = meeting.warps; warps; warps >>= 8, at += 8 * 64 * l.tokens) {
            u32 words[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) words[i] = warps >> i & 1 ? at[i * 64 * l.tokens] : 0;
            #pragma unroll
            for (int i = 0; i < 8; i++) own = add_sums(own, sum_of(words[i]));
        }
#endif
        return own;
    }

    // The same for blocks of a whole chunk with one barrier: what a thread needs of the last three butterflies it computes itself.
    __device__ __forceinline__ float rotated_whole(float v, const LayerArguments& l, const Memory& memory, int& turn) const {
        #pragma unroll
        for (int h = 1; h < 32; h *= 2) v = butterfly(v, __shfl_xor_sync(~0u, v, h), thread & h);
        float* const buffer = memory.exchange + (threadIdx.x / kChunk * 2 + turn) * kChunk;
        turn ^= 1;
        buffer[thread] = v;
        asm volatile("bar.sync %0, 256;" :: "r"(1 + threadIdx.x / kChunk) : "memory");
        float part[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) part[i] = buffer[i * 32 + thread % 32];
        #pragma unroll
        for (int h = 1; h < 8; h *= 2)
            #pragma unroll
            for (int i = 0; i < 8; i += 2 * h) part[i] = butterfly(part[i + h], part[i], thread & 32 * h);
        return __fmul_rn(part[0], l.output_normal);
    }

    // All slots of the group, one token, behind the barrier of `rotated_whole`: nobody reads them any more.
    __device__ __forceinline__ void empty_together() const {
        uint4* const first_slot = (uint4*)(slot - thread);
        #pragma unroll 1
        for (int i = thread; i < blocks * (kChunk / 4); i += kChunk) first_slot[i] = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
    }

    __device__ __forceinline__ float rotated(float v, const LayerArguments& l, const Memory& memory, int& turn) const {
        if (ALL && l.output_block == kChunk) return rotated_whole(v, l, memory, turn);
        #pragma unroll 1
        for (int h = 1; h < kChunk; h *= 2) {
            if (h >= l.output_block) break;
            float other;
            if (h < 32) {
                other = __shfl_xor_sync(~0u, v, h);
            } else {
                // two buffers in turns, so that one barrier is enough; those of the two halves of a block are numbered 1 and 2
                float* const buffer = memory.exchange + (threadIdx.x / kChunk * 2 + turn) * kChunk;
                turn ^= 1;
                buffer[thread] = v;
                asm volatile("bar.sync %0, 256;" :: "r"(1 + threadIdx.x / kChunk) : "memory");
                other = buffer[thread ^ h];
            }
            v = butterfly(v, other, thread & h);
        }
        return __fmul_rn(v, l.output_normal);
    }

    __device__ __forceinline__ void end(const LayerArguments& l, const Memory& memory, int& turn) const {
        #pragma unroll 1
        for (int token = 0; token < (ALL ? 1 : l.tokens); token++) {
            const Sum own = own_sum(l, memory, token);
            u32* at = slot + token * kChunk;
            if (!ends) {
                if (mine) put(at, word_of(own));
                continue;
            }
            const int count = mine ? blocks : 0;
            const Sum sum = add_sums(add_slots(at, count, stride(l)), own);
            const float v = SEGMENTED ? (float)sum : __fmul_rn(memory.scales[token], (float)sum);
            __syncwarp();
            const float y = rotated(v, l, memory, turn);
            if (inside) l.y[(size_t)token * l.outputs + o] = write(__fmul_rn(y, of_half((u16)scale)));
            if (ALL && l.output_block == kChunk) empty_together();
            else empty_slots(at, count, stride(l));
        }
    }
};

#if !ALL
// The sums of a warp's units.
__device__ __forceinline__ void multiply_units(const LayerArguments& l, const Share& share, Walk here, int left, u32 (&w)[kWords],
    const Operands& ahead, const Lookup& lookup, const Memory& memory, int lane) {
    const int g = lane >> 2, worker = worker_of(threadIdx.x >> 5);
    const uint4* inputs = (const uint4*)(memory.values + (g < l.tokens ? g : 0) * 64 * l.units) + (lane & 3);
    const auto inputs_at = [&](int unit) { return g < l.tokens ? inputs[memory.place(unit) * 4] : make_uint4(0, 0, 0, 0); };
    Row row;
    row.sums.clear();
    row.to = memory.sums(l, worker, here.index);
    #pragma unroll 1
    for (int i = 0; i < min(STORED, left); i++) {
        Operands operands;
        Store(i, worker, lane).get(operands);
        multiply_operands(row.sums, operands, inputs_at(here.unit));
        row.end_unit(l, memory.scales, memory.place(here.unit), here.unit + 1 == here.end || i + 1 == left, lane);
        here.step(l, share);
    }
    left -= STORED;
    if (STORED && left > 0) {
        multiply_operands(row.sums, ahead, inputs_at(here.unit));
        row.end_unit(l, memory.scales, memory.place(here.unit), here.unit + 1 == here.end || left == 1, lane);
        here.step(l, share);
        left--;
    }
    uint4 x4 = make_uint4(0, 0, 0, 0), next_x4 = x4;
    if (left > 0) x4 = inputs_at(here.unit);
    #pragma unroll 1
    while (left > 0) {
        u32 next[kWords];
        const Inputs x = {{{x4.x, x4.y, x4.z, x4.w}}};
        const int unit = here.unit;
        const bool ends = unit + 1 == here.end || left == 1;
        if (left > 1) {
            here.step(l, share);
            here.load(next, lane);
            next_x4 = inputs_at(here.unit);
        }
        multiply_unit(row.sums, w, x, lookup, lane);
        row.end_unit(l, memory.scales, unit, ends, lane);
        left--;
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
        x4 = next_x4;
    }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) layer(const __grid_constant__ LayerArguments l) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, worker = worker_of(warp);
    const Share share(l);
    const int units = share.units(l), begin = units * worker / WARPS, left = units * (worker + 1) / WARPS - begin;
    const int pieces = share.pieces(l);
    const Walk walk(l, share, min(begin, units - 1));
    u32 w[kWords];
    let_the_next_begin();
    if (left) walk.load(w, lane);
    prefetch_scales(l, share);
    const Memory memory(l, share, pieces * kGroupRows);
    const Lookup lookup = {address_parts(lane), (u32)l.one};
    // the last piece first: other blocks wait for it, or none
    int p = pieces - 1 - (int)threadIdx.x / kChunk, turn = 0;
#if ALL
    // while the first weights come
    Ending ending(l, share, memory, p);
    ending.pin();
    const ChunkInputs chunk_inputs(l, memory, share);
#else
    if (warp == WARPS - 1)
        for (int i = lane; i < pieces * kGroupRows; i += 32) memory.meetings[i] = Meeting(l, share, i / kGroupRows, i % kGroupRows);
#endif
    fill_table();
    __syncthreads();
    Operands ahead, held;
    u32 places = 0;
    if (STORED) places = decode_first(l, share, walk, left, w, ahead, held, lookup, memory, lane);
#if KEEP
    if (p >= 0) memory.kept[threadIdx.x] = Ending(l, share, memory, p).packed(l);
#endif
#if ALL
    // everything is decoded, and the place of the table free
    __syncthreads();
#endif
    wait_for_inputs();
    const int segments = SEGMENTED ? l.units + (1 << l.segment_shift) - 1 >> l.segment_shift : 1;
#if ALL
    if (SEGMENTED && l.input_block == kChunk) chunk_inputs.prepare(l, memory, warp, lane);
    else
#else
    if (l.values) copy_inputs(memory, l, segments);
    else
#endif
        prepare_inputs(memory, l, share.k, min(share.count, l.units), segments);
    __syncthreads();
#if ALL
    if (left) multiply_all(l, begin, left, places, ahead, held, memory, lane);
#else
    multiply_units(l, share, walk, left, w, ahead, lookup, memory, lane);
#endif
    __syncthreads();
#if KEEP
    Ending ending(l, memory.kept[threadIdx.x], p);
#elif !ALL
    Ending ending(l, share, memory, max(p, 0));
#endif
    #pragma unroll 1
    while (p >= 0) {
        ending.end(l, memory, turn);
        p -= 32 * WARPS / kChunk;
        if (p >= 0) ending = Ending(l, share, memory, p);
    }
}
