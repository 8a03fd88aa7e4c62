// How layer.cu divides a layer among blocks of threads and their warps, and where they keep it. Follows decode.cu and values.cu.

constexpr int kChunkUnits = kChunk / 64;
constexpr int kGroupRows = kChunk / 64;

struct LayerArguments {
    const u32* weights;
    const Value* x;
    const u16 *input_scale, *output_scale;
    Value* y;
    u32* slots;            // [blocks][tokens][256], empty between launches
    const i8* values;      // rounded inputs from `rotate`, or null
    const float* scales;
    int inputs, outputs, units, rows, tokens, segment_shift, one, input_block, output_block;
    u32 each, more;        // columns of a block, and first blocks that have one more
    u32 late, less;        // blocks from `late` on have `less` columns less
    u32 part;              // 2^32 / units rounded up, to divide by units
    float input_normal, output_normal;

    __device__ __forceinline__ u32 first_column(u32 block) const {
        return block * each + min(block, more) - (block > late ? (block - late) * less : 0);
    }
    __device__ __forceinline__ u32 block_at(u32 column) const {
        const u32 longer = more * (each + 1), shorter = late * each + more;
        if (column >= shorter) return late + (column - shorter) / (each - less);
        return column < longer ? column / (each + 1) : more + (column - longer) / each;
    }
    __device__ __forceinline__ u32 by_units(u32 column) const { return units == 1 ? column : __umulhi(column, part); }
};

// What a block has of a group: columns k .. k + length - 1; `before` are the block's units in front of it.
struct Piece {
    int group, rows, k, length, before;
};

// The columns of a block.
struct Share {
    int group, k, count;

    __device__ __forceinline__ Share(const LayerArguments& l) {
        const u32 first = l.first_column(blockIdx.x);
        group = l.by_units(first);
        k = first - group * l.units;
        count = l.first_column(blockIdx.x + 1) - first;
    }

    __device__ __forceinline__ Piece piece(const LayerArguments& l, int index) const {
        const int done = index ? index * l.units - k : 0, at = group + index, from = index ? 0 : k;
        return {at, min(kGroupRows, l.rows - at * kGroupRows), from, min(l.units - from, count - done), done * kGroupRows};
    }

    __device__ __forceinline__ int pieces(const LayerArguments& l) const { return l.by_units(k + count - 1) + 1; }

    __device__ __forceinline__ int units(const LayerArguments& l) const {
        const Piece last = piece(l, pieces(l) - 1);
        return last.before + last.rows * last.length;
    }
};

// Where a warp is among the units of its block: rows of pieces one after the other.
struct Walk {
    int unit, end, index;   // of the row; behind what the piece has of the row; rows before it, four for a piece
    const u32* at;

    __device__ __forceinline__ Walk(const LayerArguments& l, const Share& share, int begin) {
        int p = share.piece(l, 0).length * kGroupRows;
        p = begin < p ? 0 : 1 + l.by_units((begin - p) / kGroupRows);
        const Piece piece = share.piece(l, p);
        const int row = (begin - piece.before) / piece.length;
        unit = piece.k + (begin - piece.before) % piece.length;
        end = piece.k + piece.length;
        index = p * kGroupRows + row;
        at = l.weights + ((size_t)(piece.group * kGroupRows + row) * l.units + unit) * kUnitWords;
    }

    __device__ __forceinline__ void step(const LayerArguments& l, const Share& share) {
        int units = 1;
        if (++unit == end) {
            const Piece piece = share.piece(l, ++index / kGroupRows);
            if (index % kGroupRows) units += l.units - piece.length;
            unit = piece.k;
            end = unit + piece.length;
        }
        at += units * kUnitWords;
    }

    __device__ __forceinline__ void load(u32 (&w)[kWords], int lane) const {
        load_unit(w, at + lane * 4, at + kWords / 4 * 128 + lane * 2);
    }
};

// The scales that a block will need: nobody has read them yet.
__device__ __forceinline__ void prefetch_scales(const LayerArguments& l, const Share& share) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < min(share.count, l.units); i += 32 * WARPS) {
        const int unit = share.k + i;
        bring_closer(l.input_scale + (unit < l.units ? unit : unit - l.units) * 64);
    }
    const int row = share.group * kGroupRows + threadIdx.x;
    if (threadIdx.x < 2 * kGroupRows && row < l.rows) bring_closer(l.output_scale + row * 64);
}

// Who has sums of a row of a piece: warps of this block, a bit for each from `from` on, and blocks from `first_block` to this one. Found out
// in advance.
struct Meeting {
    int from, first_block;
    u32 warps;

    __device__ __forceinline__ Meeting(const LayerArguments& l, const Share& share, int index, int row) {
        const Piece piece = share.piece(l, index);
        const int units = share.units(l), begin = piece.before + row * piece.length;
        from = ((begin + 1) * WARPS - 1) / units;
        first_block = l.block_at(piece.group * l.units);
        warps = 0;
        if (row >= piece.rows) return;
        const int to = ((begin + piece.length) * WARPS - 1) / units;
        // a warp without units has left nothing
        for (int w = from; w <= to; w++) warps |= (u32)(units * (w + 1) / WARPS != units * w / WARPS) << w - from;
    }
};

#if SEGMENTED
typedef float Sum;
__device__ __forceinline__ Sum add_sums(Sum a, Sum b) { return __fadd_rn(a, b); }
__device__ __forceinline__ Sum sum_of(u32 word) { return __uint_as_float(word); }
__device__ __forceinline__ u32 word_of(Sum sum) { return __float_as_uint(sum); }
#else
typedef int Sum;
__device__ __forceinline__ Sum add_sums(Sum a, Sum b) { return a + b; }
__device__ __forceinline__ Sum sum_of(u32 word) { return (int)word; }
__device__ __forceinline__ u32 word_of(Sum sum) { return (u32)sum; }
#endif

struct alignas(16) Four {
    Sum x, y, z, w;
};

// Units whose operands fit into the gaps of the table with one place; what comes behind it.
constexpr int kGaps = 8;
constexpr int kMostChunks = 3;   // of inputs, with ALL
constexpr u32 kOperandsAt = kTableAt + (1 << 16);

// Of one output of a unit of the block, with ALL: where the table was, of which nothing is needed then.
__device__ __forceinline__ u32 unit_sums(int unit, int output) { return kTableAt + (2 * unit + output / 32) * 256 + output % 32 * 4; }

// Where a block's numbers are in shared memory: inputs, sums of warps, buffers of `Ending`, endings, who meets whom, scales. With ALL,
// decoded units take nearly all of it: there are only the inputs of the block's own chunks, `unit_sums` instead of those of warps, and
// buffers where units have been.
struct Memory {
    i8* values;
    Four* partial;
    float* exchange;
    uint4* kept;
    Meeting* meetings;
    float* scales;
    int first, units;   // the unit whose inputs come first; those of unit 0 follow the last

    __device__ __forceinline__ Memory(const LayerArguments& l, const Share& share, int rows) : values((i8*)shared_memory), units(l.units) {
#if ALL
        first = share.k / kChunkUnits * kChunkUnits;
        u64 begin;
        asm("cvta.to.shared.u64 %0, %1;" : "=l"(begin) : "l"(shared_memory));
        exchange = (float*)(values + (kOperandsAt - (u32)begin));
        scales = (float*)(values + chunks(l, share) * kChunk);
#else
        first = 0;
        partial = (Four*)(values + l.tokens * 64 * l.units);
        exchange = (float*)(partial + (WARPS + rows) * l.tokens * 16);
        kept = (uint4*)(exchange + 2 * 32 * WARPS);
        meetings = (Meeting*)(kept + (BLOCKS == 1 ? 32 * WARPS : 0));
        scales = (float*)(meetings + rows);
#endif
    }

    __device__ __forceinline__ int place(int unit) const { return ALL && unit < first ? unit - first + units : unit - first; }

    // Of inputs, with ALL.
    __device__ __forceinline__ static int chunks(const LayerArguments& l, const Share& share) {
        return min(l.units / kChunkUnits, (share.count + kChunkUnits - 2) / kChunkUnits + 1);
    }

    // What the warp with share `worker` has of a row of a piece; its next row follows.
    __device__ __forceinline__ Four* sums(const LayerArguments& l, int worker, int row) const {
        return partial + (worker + row) * l.tokens * 16;
    }
};
