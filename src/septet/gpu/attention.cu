// Attention of one token, as a step of `decode_token`. Follows steps.cu.
//
// A block of threads takes some positions of a key-value head for up to four of its query heads; a warp reads several positions at once,
// eight numbers of each per lane, and keeps a running maximum. Parts of a text meet in the same way as sums of a product: the warp that
// brings the last part of 256 outputs merges them and rounds the inputs of the output projection.
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

__device__ __forceinline__ void read_eight(float (&v)[8], const Value* from) {
    const Eight<Value> raw(from, true);
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = read(raw.of[i]);
}

// A head of queries or keys by one warp: normalized where the model does so, rotated to its position.
__device__ __forceinline__ void place_head(float* to, const Token& t, const float* from, const Value* norm, int position, float scale, int lane) {
    float squares = 0, factor = 1;
    if (norm) {
        for (int i = lane; i < HEAD; i += 32) squares += __ldcg(from + i) * __ldcg(from + i);
        factor = rsqrtf(sum_of_lanes(squares) / HEAD + t.epsilon);
    }
    #pragma unroll
    for (int i = lane; i < HEAD / 2; i += 32) {
        const float cosine = t.cosines[(size_t)position * (HEAD / 2) + i], sine = t.sines[(size_t)position * (HEAD / 2) + i];
        float a = __ldcg(from + i), b = __ldcg(from + i + HEAD / 2);
        if (norm) a *= factor * read(norm[i]), b *= factor * read(norm[i + HEAD / 2]);
        to[i] = (a * cosine - b * sine) * scale;
        to[i + HEAD / 2] = (b * cosine + a * sine) * scale;
    }
}

// Queries, and the new key and value as the cache will have them. Warps divide the heads.
__device__ __forceinline__ void place_heads(AttentionMemory& m, const Token& t, const Step& s, int part, int position, bool store, int lane, int warp) {
    const int kv = part / kParts, count = heads_of(part);
    const size_t at = ((size_t)kv * t.length + position) * HEAD;
    const float *keys = t.projected + t.heads * HEAD + kv * HEAD, *values = keys + t.kv_heads * HEAD;
    // exp2 instead of exp from here on
    if (warp < count) place_head(m.queries[warp], t, t.projected + (first_head(part) + warp) * HEAD, s.head_norms[0], position, t.scaling * 1.44269504f, lane);
    if (warp == kHeads) {
        place_head(m.key, t, keys, s.head_norms[1], position, 1.f, lane);
        __syncwarp();
        for (int i = lane; i < HEAD; i += 32) {
            const Value rounded = write(m.key[i]);
            m.key[i] = read(rounded);
            if (store) s.keys[at + i] = rounded;
        }
    }
    if (warp == kHeads + 1)
        for (int i = lane; i < HEAD; i += 32) {
            const Value rounded = write(__ldcg(values + i));
            m.value[i] = read(rounded);
            if (store) s.values[at + i] = rounded;
        }
}

// One warp's part of a text: [begin, end) in steps of kRound. Leaves sums in m.partial.
__device__ __forceinline__ void attend(AttentionMemory& m, const Token& t, const Step& s, int kv, int begin, int end, int position, int lane, int warp) {
    const int sub = lane / kLanes, d = lane % kLanes * 8;
    float q[kHeads][8], sum[kHeads][8] = {}, top[kHeads], weight[kHeads] = {};
    #pragma unroll
    for (int h = 0; h < kHeads; h++) {
        top[h] = kNothing;
        #pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] = m.queries[h][d + i];
    }
    for (int base = begin + warp * kAtOnce; base < end; base += kRound) {
        const int p = base + sub;
        const bool inside = p < end, stored = inside && p < position;
        const size_t at = ((size_t)kv * t.length + p) * HEAD + d;
        float k[8] = {}, v[8] = {};
        if (stored) {
            read_eight(k, s.keys + at);
            read_eight(v, s.values + at);
        } else if (inside) {
            #pragma unroll
            for (int i = 0; i < 8; i++) k[i] = m.key[d + i], v[i] = m.value[d + i];
        }
        #pragma unroll
        for (int h = 0; h < kHeads; h++) {
            float score = 0;
            #pragma unroll
            for (int i = 0; i < 8; i++) score += q[h][i] * k[i];
            #pragma unroll
            for (int x = kLanes / 2; x; x /= 2) score += __shfl_xor_sync(~0u, score, x);
            const float higher = max(top[h], inside ? score : kNothing), keep = exp2f(top[h] - higher), w = inside ? exp2f(score - higher) : 0.f;
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
__device__ __forceinline__ void merge_warps(const AttentionMemory& m, const Token& t, int item) {
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
        t.partial[(size_t)item * kHeads * HEAD + i] = sum;
        if (d == 0) *(float2*)(t.weights_of_partial + ((size_t)item * kHeads + h) * 2) = make_float2(highest, weight);
    }
}

// 256 outputs of all heads from the parts of the text, rounded for the next product.
__device__ __forceinline__ void merge_parts(const Token& t, const Step& s, int chunk, int splits, int lane) {
    const int size = t.heads * HEAD, k = chunk * kChunk + lane * 8;
    const Rounder rounder(s.input_scale, chunk, size, lane);
    float v[8] = {}, highest = kNothing, weight = 0;
    if (k < size) {
        const int head = k / HEAD, part = part_of(head), h = head - first_head(part);
        #pragma unroll 4
        for (int i = 0; i < splits; i++) {
            const size_t at = (size_t)(part * splits + i) * kHeads + h;
            const float2 of = __ldcg((const float2*)t.weights_of_partial + at);
            const float4 *from = (const float4*)(t.partial + at * HEAD + k % HEAD), low = __ldcg(from), high = __ldcg(from + 1);
            const float eight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const float higher = max(highest, of.x), keep = exp2f(highest - higher), w = exp2f(of.x - higher);
            highest = higher;
            weight = weight * keep + of.y * w;
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = v[j] * keep + eight[j] * w;
        }
        #pragma unroll
        for (int j = 0; j < 8; j++) v[j] = __fdividef(v[j], weight);
    }
    rounder.give(t, 1, v, s.input_block, s.input_normal, lane);
}

// Brings the part of the cache that a warp will read closer.
__device__ __forceinline__ void expect_cache(const Token& t, const Step& s, int kv, int begin, int end, int lane, int warp) {
    const int sub = lane / kLanes, d = lane % kLanes * 8;
    for (int p = begin + warp * kAtOnce + sub; p < end; p += kRound) {
        const size_t at = ((size_t)kv * t.length + p) * HEAD + d;
        if (d % (128 / (int)sizeof(Value)) == 0) asm volatile("prefetch.global.L2 [%0]; prefetch.global.L2 [%1];" :: "l"(s.keys + at), "l"(s.values + at));
    }
}

struct Item {
    int part, split, begin, end;

    __device__ __forceinline__ Item(int item, int splits, int length)
        : part(item / splits), split(item % splits), begin((long long)length * split / splits), end((long long)length * (split + 1) / splits) {}
};

__device__ __forceinline__ void attention_step(const Token& t, const Step& s, u32* shared, int lane, int warp) {
    AttentionMemory& m = *(AttentionMemory*)shared;
    const int position = *t.position, length = position + 1, parts = t.kv_heads * kParts;
    const int splits = max(1, min((int)gridDim.x / parts, (length + kRound - 1) / kRound));
    if ((int)blockIdx.x < parts * splits) {
        const Item item(blockIdx.x, splits, length);
        expect_cache(t, s, item.part / kParts, item.begin, min(item.end, position), lane, warp);
    }
    wait_for_groups(t, s.groups_before);
    for (int i = blockIdx.x; i < parts * splits; i += gridDim.x) {
        const Item item(i, splits, length);
        place_heads(m, t, s, item.part, position, item.split == splits - 1 && item.part % kParts == 0, lane, warp);
        __syncthreads();
        attend(m, t, s, item.part / kParts, item.begin, item.end, position, lane, warp);
        __syncthreads();
        merge_warps(m, t, i);
        __syncthreads();
        const int begins = first_head(item.part) * HEAD, ends = begins + heads_of(item.part) * HEAD, chunk = begins / kChunk + warp;
        if (chunk * kChunk >= ends) continue;
        const int last = min((chunk + 1) * kChunk, t.heads * HEAD) - 1, expected = (part_of(last / HEAD) - part_of(chunk * kChunk / HEAD) + 1) * splits;
        if (!completes(t, chunk, expected, lane)) continue;
        merge_parts(t, s, chunk, splits, lane);
        finish_group(t, chunk, lane);
    }
}
