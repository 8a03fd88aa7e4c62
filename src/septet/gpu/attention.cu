// Attention of one token, as a step of `decode_token`. Follows sums.cu.
//
// A block of threads takes some positions of a key-value head for up to four of its query heads; a warp reads several positions at once,
// eight numbers of each per lane, and keeps a running maximum. Parts of a text meet in the same way as sums of a product: one warp waits
// for all parts of 256 outputs, merges them and rounds the inputs of the output projection.
//
// Macros: HEAD numbers of a head, 32, 64 or 128; QUERIES query heads of a key-value head.

constexpr int kLanes = HEAD / 8, kAtOnce = 32 / kLanes, kRound = WARPS * kAtOnce;   // of a position; positions of a warp; of a block
constexpr int kHeads = QUERIES < 4 ? QUERIES : 4, kParts = (QUERIES + kHeads - 1) / kHeads;
constexpr float kNothing = -1e30f;

struct AttentionMemory {
    float queries[kHeads][HEAD], key[HEAD], value[HEAD];
    float partial[WARPS][kHeads][HEAD], maximum[WARPS][kHeads], sum[WARPS][kHeads];
};

// Query heads that share a block's work: `part` of a key-value head's.
__device__ __forceinline__ int first_head(int part) { return part / kParts * QUERIES + part % kParts * kHeads; }
__device__ __forceinline__ int heads_of(int part) { return min(kHeads, QUERIES - part % kParts * kHeads); }
__device__ __forceinline__ int part_of(int head) { return head / QUERIES * kParts + head % QUERIES / kHeads; }

// A head of queries or keys by one warp: normalized where the model does so, rotated to its position.
__device__ __forceinline__ void place_head(float* to, const Token& t, const u64* from, u32 tag, const Value* norm, int position,
    float scale, int lane) {
    constexpr int kEach = (HEAD / 2 + 31) / 32;
    float a[kEach], b[kEach], cosine[kEach], sine[kEach], squares = 0, factor = 1;
    #pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int i = lane + 32 * j;
        if (i >= HEAD / 2) continue;
        cosine[j] = t.cosines[(size_t)position * (HEAD / 2) + i], sine[j] = t.sines[(size_t)position * (HEAD / 2) + i];
        a[j] = await_number(from + i, tag), b[j] = await_number(from + i + HEAD / 2, tag);
        squares += a[j] * a[j] + b[j] * b[j];
    }
    if (norm) factor = rsqrtf(sum_of_lanes(squares) / HEAD + t.epsilon);
    #pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int i = lane + 32 * j;
        if (i >= HEAD / 2) continue;
        if (norm) a[j] *= factor * read(norm[i]), b[j] *= factor * read(norm[i + HEAD / 2]);
        to[i] = (a[j] * cosine[j] - b[j] * sine[j]) * scale;
        to[i + HEAD / 2] = (b[j] * cosine[j] + a[j] * sine[j]) * scale;
    }
}

// Queries, and the new key and value as the cache will have them. Warps divide the heads.
__device__ __forceinline__ void place_heads(AttentionMemory& m, const Token& t, const Step& s, u32 tag, int part, int position,
    bool store, int lane, int warp) {
    const int kv = part / kParts, count = heads_of(part);
    const size_t at = ((size_t)kv * t.length + position) * HEAD;
    const u64 *keys = t.projected + t.heads * HEAD + kv * HEAD, *values = keys + t.kv_heads * HEAD;
    // exp2 instead of exp from here on
    if (warp < count) {
        const u64* queries = t.projected + (first_head(part) + warp) * HEAD;
        place_head(m.queries[warp], t, queries, tag, s.head_norms[0], position, t.scaling * 1.44269504f, lane);
    }
    if (warp == kHeads) {
        place_head(m.key, t, keys, tag, s.head_norms[1], position, 1.f, lane);
        __syncwarp();
        for (int i = lane; i < HEAD; i += 32) {
            const Value rounded = write(m.key[i]);
            m.key[i] = read(rounded);
            if (store) s.keys[at + i] = rounded;
        }
    }
    if (warp == kHeads + 1)
        for (int i = lane; i < HEAD; i += 32) {
            const Value rounded = write(await_number(values + i, tag));
            m.value[i] = read(rounded);
            if (store) s.values[at + i] = rounded;
        }
}

// A lane's eight numbers of a stored key and of its value.
struct Stored {
    Eight<Value> key, value;

    __device__ __forceinline__ Stored(const Step& s, size_t at, bool stored) : key(s.keys + at, stored), value(s.values + at, stored) {}
};

// Read when it is needed: queries of all heads would fill the registers.
__device__ __forceinline__ float4 shared_four(const float* p) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"((u32)__cvta_generic_to_shared(p)));
    return v;
}

// One warp's part of a text: [begin, end) in steps of kRound, the first of which is in `stored`. Leaves sums in m.partial.
__device__ __forceinline__ void attend(AttentionMemory& m, const Token& t, const Step& s, Stored stored, int kv, int begin, int end,
    int position, int lane, int warp) {
    const int sub = lane / kLanes, d = lane % kLanes * 8;
    float sum[kHeads][8] = {}, top[kHeads], weight[kHeads] = {};
    #pragma unroll
    for (int h = 0; h < kHeads; h++) top[h] = kNothing;
    for (int base = begin + warp * kAtOnce; base < end; base += kRound) {
        const int p = base + sub;
        const bool inside = p < end;
        float k[8], v[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            k[i] = p == position ? m.key[d + i] : read(stored.key.of[i]);
            v[i] = p == position ? m.value[d + i] : read(stored.value.of[i]);
        }
        if (base + kRound < end) stored = Stored(s, ((size_t)kv * t.length + p + kRound) * HEAD + d, p + kRound < min(end, position));
        #pragma unroll
        for (int h = 0; h < kHeads; h++) {
            const float4 low = shared_four(&m.queries[h][d]), high = shared_four(&m.queries[h][d + 4]);
            float score = low.x * k[0] + low.y * k[1] + low.z * k[2] + low.w * k[3]
                + high.x * k[4] + high.y * k[5] + high.z * k[6] + high.w * k[7];
            #pragma unroll
            for (int x = kLanes / 2; x; x /= 2) score += __shfl_xor_sync(~0u, score, x);
            const float higher = max(top[h], inside ? score : kNothing), keep = exp2f(top[h] - higher),
                w = inside ? exp2f(score - higher) : 0.f;
            top[h] = higher;
            weight[h] = weight[h] * keep + w;
            #pragma unroll
            for (int i = 0; i < 8; i++) sum[h][i] = sum[h][i] * keep + w * v[i];
        }
    }
    #pragma unroll
    for (int h = 0; h < kHeads; h++) {
        float highest = top[h];
        #pragma unroll
        for (int x = kLanes; x < 32; x *= 2) highest = max(highest, __shfl_xor_sync(~0u, highest, x));
        const float keep = exp2f(top[h] - highest);
        weight[h] *= keep;
        #pragma unroll
        for (int i = 0; i < 8; i++) sum[h][i] *= keep;
        #pragma unroll
        for (int x = kLanes; x < 32; x *= 2) {
            weight[h] += __shfl_xor_sync(~0u, weight[h], x);
            #pragma unroll
            for (int i = 0; i < 8; i++) sum[h][i] += __shfl_xor_sync(~0u, sum[h][i], x);
        }
        if (sub == 0) {
            ((float4*)&m.partial[warp][h][d])[0] = make_float4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
            ((float4*)&m.partial[warp][h][d])[1] = make_float4(sum[h][4], sum[h][5], sum[h][6], sum[h][7]);
        }
        if (lane == 0) m.maximum[warp][h] = highest, m.sum[warp][h] = weight[h];
    }
}

// The warps' parts together: [kHeads][HEAD] sums and their maxima and weights, into slot `item`.
__device__ __forceinline__ void merge_warps(const AttentionMemory& m, const Token& t, u32 tag, int item) {
    for (int i = threadIdx.x; i < kHeads * HEAD; i += 32 * WARPS) {
        const int h = i / HEAD, d = i % HEAD;
        float highest = kNothing, sum = 0, weight = 0;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) highest = max(highest, m.maximum[w][h]);
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float keep = exp2f(m.maximum[w][h] - highest);
            sum += m.partial[w][h][d] * keep;
            weight += m.sum[w][h] * keep;
        }
        put(t.partial + (size_t)item * kHeads * HEAD + i, __float_as_uint(sum), tag);
        if (d == 0) put_two(t.weights_of_partial + ((size_t)item * kHeads + h) * 2, __float_as_uint(highest), __float_as_uint(weight), tag);
    }
}

// 256 outputs of all heads from the parts of the text, rounded for the next product.
__device__ __forceinline__ void merge_parts(const Token& t, const Step& s, u32 tag, int chunk, int splits, int lane) {
    const int size = t.heads * HEAD, k = chunk * kChunk + lane * 8;
    const Rounder rounder(s.input_scale, chunk, size, lane);
    float v[8] = {}, highest = kNothing, weight = 0;
    if (k < size) {
        const int head = k / HEAD, part = part_of(head), h = head - first_head(part);
        const auto place = [&](int i) { return (size_t)(part * splits + i) * kHeads + h; };
        const auto at = [&](int i) { return t.partial + place(i) * HEAD + k % HEAD; };
        await_eights<2>(0, splits - 1, tag, at, [&](int i, const float (&sum)[8]) {
            const u64* of = t.weights_of_partial + place(i) * 2;
            const float top = await_number(of, tag), sum_of_weights = await_number(of + 1, tag);
            const float higher = max(highest, top), keep = exp2f(highest - higher), w = exp2f(top - higher);
            highest = higher;
            weight = weight * keep + sum_of_weights * w;
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = v[j] * keep + sum[j] * w;
        });
        #pragma unroll
        for (int j = 0; j < 8; j++) v[j] = __fdividef(v[j], weight);
    }
    __syncwarp();
    rounder.give(t, 1, tag, v, s.input_block, s.input_normal, lane);
}

struct Item {
    int part, split, begin, end;

    __device__ __forceinline__ Item(int item, int splits, int length)
        : part(item / splits), split(item % splits), begin((long long)length * split / splits),
          end((long long)length * (split + 1) / splits) {}
};

// What the step before has written bears `tag`. Returns whether this warp had outputs to finish, after the others went on.
__device__ __forceinline__ bool attention_step(const Token& t, int index, u32 tag) {
    const Step& s = step_at(index);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    AttentionMemory& m = *(AttentionMemory*)work_memory();
    const int position = *t.position, length = position + 1, parts = t.kv_heads * kParts, sub = lane / kLanes, d = lane % kLanes * 8;
    // behind the cache is somebody else's memory
    if (position < 0 || position >= t.length) __trap();
    const int splits = max(1, min((int)gridDim.x / parts, (length + kRound - 1) / kRound));
    const int chunk = first_of_warp(s.groups, warp), last_chunk = first_group(s.groups, blockIdx.x + 1) - 1;
    for (int i = blockIdx.x; i < parts * splits; i += gridDim.x) {
        const Item item(i, splits, length);
        const int kv = item.part / kParts, p = item.begin + warp * kAtOnce + sub;
        const Stored stored(s, ((size_t)kv * t.length + p) * HEAD + d, p < min(item.end, position));
        // warps leave what was before one by one; its shared memory is free when all have
        __syncthreads();
        place_heads(m, t, s, tag, item.part, position, item.split == splits - 1 && item.part % kParts == 0, lane, warp);
        __syncthreads();
        attend(m, t, s, stored, kv, item.begin, item.end, position, lane, warp);
        __syncthreads();
        merge_warps(m, t, tag + 1, i);
    }
    // every step has a barrier, behind which the next step may be read
    if ((int)blockIdx.x >= parts * splits) __syncthreads();
    #pragma unroll 1
    for (int i = chunk; i <= last_chunk; i += WARPS) merge_parts(t, s, tag + 1, i, splits, lane);
    return chunk <= last_chunk;
}
