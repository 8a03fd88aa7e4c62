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
    int kind, units, rows, parts, segment_shift, input_block, groups;
    int part_rows[3], part_outputs[3], output_block[3];
    float output_normal[3], input_normal;
};

// Shared memory begins with three steps, since a warp can still be in the one before when another brings the next. What a step works with
// follows. Functions find both by themselves: a pointer that comes from outside could point anywhere, and costs more registers.
constexpr int kStepWords = sizeof(Step) / 4;
__device__ __forceinline__ Step& step_at(int index) { return *(Step*)(shared_memory + index % 3 * kStepWords); }
__device__ __forceinline__ u32* work_memory() { return shared_memory + (3 * kStepWords + 3 & ~3); }

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

// Eight floats for each of up to `kAtATime` places at once, in order; `use` gets them. `at` tells where place i is. What may stay without a
// value begins with one, here and elsewhere: otherwise it would keep its registers from one step to the next.
template <int kAtATime, class At, class Use>
__device__ __forceinline__ void await_eights(int from, int to, u32 tag, At at, Use use) {
    Patience patience;
    for (int first = from; first <= to; first += kAtATime) {
        Two two[kAtATime][4] = {};
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

// The residual stream, 256 numbers of it, and their sum of squares.
__device__ __forceinline__ void keep_stream(const Token& t, u32 tag, const float (&v)[8], const Rounder& at, int chunk, int lane) {
    float squares = 0;
    #pragma unroll
    for (int i = 0; i < 8; i++) squares += v[i] * v[i];
    squares = sum_of_lanes(squares);
    if (lane == 0) put(t.square_sums + chunk, __float_as_uint(squares), tag);
    if (!at.inside) return;
    ((float4*)(t.hidden + at.k))[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4*)(t.hidden + at.k))[1] = make_float4(v[4], v[5], v[6], v[7]);
}
