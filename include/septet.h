/* The C interface of septet's native kernels; these comments are its contract.
 *
 * Every function checks its arguments, returns an error number (0 is success), never prints, never aborts and lets no
 * exception out. After an error the outputs hold nothing useful. Outputs need no initialization. Inputs are only read, and
 * never outside the sizes stated here. Pointers need the alignment of their type only. Functions may be called from several
 * threads at once.
 *
 * Words: M = tokens, N = outputs, K = inputs, R = ceil(N/64) rows of tiles, T = ceil(K/4) tiles in a row, b = bits per pair.
 * A tile is 64 outputs x 4 inputs = 128 pairs = 16*b bytes. Arrays are dense, in C order. SPEC.md defines the codes.
 * `threads`: how many threads may work, 0 for the default (septet_default_threads). Results do not depend on it, nor on the
 * instruction set; products of float activations are the exception: they may differ between instruction sets by rounding.
 */
#ifndef SEPTET_H
#define SEPTET_H

#include <stdint.h>

#if defined(_WIN32)
#define SEPTET_API __declspec(dllexport)
#else
#define SEPTET_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum septet_error {
    SEPTET_OK = 0,
    SEPTET_ERROR_NULL = 1,            /* a pointer that is needed is NULL */
    SEPTET_ERROR_SIZE = 2,            /* a size is out of range, or two sizes contradict each other */
    SEPTET_ERROR_BITS = 3,            /* bits per pair is not 6, 7 or 8 (split: not 7) */
    SEPTET_ERROR_BLOCK = 4,           /* a rotation block is not a power of two that divides its axis */
    SEPTET_ERROR_GROUP = 5,           /* a group is not a positive multiple of 4, or differs from the activation segment */
    SEPTET_ERROR_CODE = 6,            /* unknown code or kind of activations */
    SEPTET_ERROR_RANGE = 7,           /* a symbol does not fit its bits, or an encoder input its range */
    SEPTET_ERROR_THREADS = 8,         /* a number of threads is negative, or SEPTET_THREADS is not a positive number */
    SEPTET_ERROR_CPU_UNKNOWN = 9,     /* no instruction set has this name (argument, or SEPTET_CPU) */
    SEPTET_ERROR_CPU_UNSUPPORTED = 10, /* this machine or this build lacks the instruction set */
    SEPTET_ERROR_MEMORY = 11,         /* no memory for intermediate results */
    SEPTET_ERROR_INCOMPLETE = 12,     /* an engine lacks a weight or a vector */
    SEPTET_ERROR_TOKEN = 13,          /* a token is not in the vocabulary */
    SEPTET_ERROR_CONTEXT = 14         /* the text does not fit the context */
};

/* One clause in English, a static string; never NULL. */
SEPTET_API const char* septet_error_message(int error);

/* --- instruction sets and threads ------------------------------------------------------------------------------------ */

/* Name of set `index` = 0, 1, ... from the slowest to the fastest: scalar; of x86-64 avx2, avxvnni, avx512, avx512vbmi, amx;
 * of AArch64 neon, neon-dotprod, neon-i8mm; NULL after the last. Every build lists all of them. */
SEPTET_API const char* septet_instruction_set_name(int index);
/* "" when set `index` can run here, else why not, a static string; NULL after the last. */
SEPTET_API const char* septet_instruction_set_obstacle(int index);
/* The set in use: the one SEPTET_CPU names, else the fastest that can run. Decided at the first call of any function that
 * computes; a wrong SEPTET_CPU makes them all fail with CPU_UNKNOWN or CPU_UNSUPPORTED. *name is a static string. */
SEPTET_API int septet_instruction_set(const char** name);
/* Use another set from now on, for every thread. NULL returns to the choice that septet_instruction_set describes. Weights that
 * were arranged for a set (septet_arrange, and those of an engine) keep being multiplied with it. */
SEPTET_API int septet_set_instruction_set(const char* name);
/* SEPTET_THREADS, else OMP_NUM_THREADS (its first number), else the processors this process may use. */
SEPTET_API int septet_default_threads(int* threads);

/* The sum of `bytes` bytes as 64-bit numbers (what is left over counts as single bytes), modulo 2^64: how fast memory can be
 * read, for comparison. data needs the alignment of uint64_t. */
SEPTET_API int septet_read_sum(const uint8_t* data, int64_t bytes, uint64_t* sum, int threads);

/* --- packed weights -------------------------------------------------------------------------------------------------- */

/* Symbols uint8 [tiles, 128] <-> packed uint8 [tiles, 16*b]. pack: RANGE when a symbol has more than b bits. */
SEPTET_API int septet_pack(const uint8_t* symbols, int64_t tiles, int bits, uint8_t* packed);
SEPTET_API int septet_unpack(const uint8_t* packed, int64_t tiles, int bits, uint8_t* symbols);

/* Encoder of the trellis code. fixed: int16 [tiles, 256] quarter levels in -1020..1020 (else RANGE), stream order.
 * symbols: uint8 [tiles, 128]. */
SEPTET_API int septet_trellis_encode(const int16_t* fixed, int64_t tiles, int bits, uint8_t* symbols, int threads);
/* The same search with other levels, int8 [65536, 2] in -127..127 (else RANGE): how codes are compared and tables trained. */
SEPTET_API int septet_trellis_search(const int8_t* levels, const int16_t* fixed, int64_t tiles, int bits, uint8_t* symbols,
                                     int threads);

/* A packed matrix: uint8 [rows, columns, 16*bits]; rows = R, columns = T, both at least 1, columns at most 32767. */
typedef struct septet_tiles {
    const uint8_t* packed;
    int64_t rows;
    int64_t columns;
    int bits;
} septet_tiles;

/* levels: int8 [64*rows, 4*columns], -127..127. */
SEPTET_API int septet_trellis_levels(const septet_tiles* tiles, int8_t* levels, int threads);
/* fields: uint8 [64*rows, 4*columns], 0..15 in even columns, 0..7 in odd ones. */
SEPTET_API int septet_split_fields(const septet_tiles* tiles, uint8_t* fields, int threads);

/* --- activations ----------------------------------------------------------------------------------------------------- */

/* Normalized Hadamard transform of every block of `block` neighbours: float32 [tokens, features] -> the same. x may be y.
 * Stages h = 1, 2, 4 .. block/2 of (a, b) -> (a+b, a-b), then one multiplication by float32(1/sqrt(block)); bit-exact. */
SEPTET_API int septet_hadamard(const float* x, int64_t tokens, int64_t features, int64_t block, float* y);

/* int8 activations and their scales: values int8 [tokens, features], scales float32 [tokens, ceil(features/segment)].
 * scale = absmax/127, q = rint(x * (127/absmax)), half to even, within +-127. 0 always becomes 0. A segment of zeros
 * has scale 0, one with an infinity or a NaN has scale NaN and q 0. When 127/absmax overflows, all but 0 become +-127. */
SEPTET_API int septet_quantize_activations(const float* x, int64_t tokens, int64_t features, int64_t segment, int8_t* values,
                                           float* scales);

/* Quantized activations of one product. values: int8 [tokens, K], K = 4*columns of a packed matrix or the row length of an
 * int8 one; any int8. scales: float32 [tokens, ceil(K/segment)]; segment s is the inputs s*segment .. (s+1)*segment - 1. */
typedef struct septet_activations {
    const int8_t* values;
    const float* scales;
    int64_t tokens;
    int64_t segment;
} septet_activations;

/* --- products -------------------------------------------------------------------------------------------------------- */

/* sums: int32 [tokens, 64*rows] = levels @ values, exact. */
SEPTET_API int septet_trellis_accumulate(const septet_tiles* tiles, const int8_t* values, int64_t tokens, int32_t* sums,
                                         int threads);
/* y: float32 [tokens, 64*rows]; from 0, per segment in order: y = y + scale * float32(exact int32 sum), no fused rounding. */
SEPTET_API int septet_trellis_product(const septet_tiles* tiles, const septet_activations* x, float* y, int threads);
/* x: float32 [tokens, 4*columns]; y: float32 [tokens, 64*rows]. |error| <= 2*K*2^-24 * sum |x||level|. */
SEPTET_API int septet_trellis_product_float(const septet_tiles* tiles, const float* x, int64_t tokens, float* y, int threads);

/* Scales of the split code, transposed: scale and offset are float32 [2*groups, 64*rows], row 2*g for even inputs of group g
 * and row 2*g + 1 for odd ones; what stands at padded outputs is read but does not matter. offset NULL: the zero points 8
 * and 4. group_size: a multiple of 4, and groups = ceil(4*columns / group_size). */
typedef struct septet_split_scales {
    const float* scale;
    const float* offset;
    int64_t group_size;
} septet_split_scales;

/* y: float32 [tokens, out_features], out_features in 64*rows - 63 .. 64*rows. x->segment must be group_size. From 0, per
 * group in order: t = s4*E; t = t + s3*O; with offsets t = t + z4*XE; t = t + z3*XO; y = y + scale*t. E and O are the exact
 * sums over even and odd inputs (without offsets already less 8*XE and 4*XO), XE and XO the sums of the activations. */
SEPTET_API int septet_split_product(const septet_tiles* tiles, const septet_split_scales* scales, const septet_activations* x,
                                    int64_t out_features, float* y, int threads);
SEPTET_API int septet_split_product_float(const septet_tiles* tiles, const septet_split_scales* scales, const float* x,
                                          int64_t tokens, int64_t out_features, float* y, int threads);

/* A matrix of code "int8": weight int8 [rows, features], any int8, scale float32 [rows]; features at most 131071. */
typedef struct septet_rows {
    const int8_t* weight;
    const float* scale;
    int64_t rows;
    int64_t features;
} septet_rows;

/* y: float32 [tokens, rows] = scale[r] * (x->scales[m] * float32(exact sum)); x->segment must be at least features. */
SEPTET_API int septet_int8_product(const septet_rows* weight, const septet_activations* x, float* y, int threads);
SEPTET_API int septet_int8_product_float(const septet_rows* weight, const float* x, int64_t tokens, float* y, int threads);

/* --- a whole layer --------------------------------------------------------------------------------------------------- */

enum septet_code {
    SEPTET_SPLIT = 0, SEPTET_TRELLIS = 1, SEPTET_INT8 = 2,
    SEPTET_FLOAT32 = 3, SEPTET_FLOAT16 = 4, SEPTET_BFLOAT16 = 5  /* dense [N, K], in engines only */
};
enum septet_activation_kind { SEPTET_ACTIVATIONS_INT8 = 0, SEPTET_ACTIVATIONS_FLOAT = 1 };

typedef struct septet_layer {
    int code;                  /* enum septet_code */
    int bits;                  /* per pair; ignored by int8 */
    int64_t in_features;       /* K */
    int64_t out_features;      /* N */
    const void* weight;        /* packed tiles, or int8 [N, K] */
    const float* scale;        /* trellis, int8: [N]; split: as septet_split_scales */
    const float* offset;       /* split only; may be NULL */
    const float* input_scale;  /* [K], or NULL for none */
    int64_t input_block;       /* rotation of the inputs, after input_scale; 1 for none */
    int64_t output_block;      /* trellis: rotation of the outputs, before scale; 1 for none */
    int64_t group_size;        /* split: inputs per group, 0 for one group; else ignored */
    int64_t segment;           /* trellis: inputs per activation scale, 0 for one scale per token; else ignored */
    const void* arranged_for;  /* NULL, or what septet_arrange of this library wrote here */
} septet_layer;

/* Copies the weights of a layer of code split, trellis or int8 to `weight`, as many bytes, which must not overlap them and are best
 * 64-byte aligned, and makes *layer point there. Trellis weights whose inputs, and inputs per activation scale, are multiples of 16
 * take the order that the instruction set in use reads fastest; the layer then runs on that set whatever is chosen later. Weights that
 * are arranged already are copied as they are. Engines do this by themselves. */
SEPTET_API int septet_arrange(septet_layer* layer, void* weight);

/* y: float32 [tokens, N] from x: float32 [tokens, K]. x' = H(input_scale * x), quantized unless `activations` is float; the
 * product of the code; trellis: scale * H(product). tokens may be 0. x and y must not overlap. */
SEPTET_API int septet_linear(const septet_layer* layer, const float* x, int64_t tokens, int activations, float* y, int threads);

/* --- a whole model --------------------------------------------------------------------------------------------------- */

/* A decoder of the Llama family: per layer x = x + O(attention(norm(x))), x = x + down(silu(gate(norm(x))) * up(norm(x))), with
 * rotary positions (halves of a head paired), grouped-query attention over a cache, and biases and head norms where they are set.
 * Create it, set every weight and vector, then run. An engine copies what it is given, serves one caller at a time (others
 * wait) and keeps texts, numbered 0 .. 4095 and empty at first, in caches of their own. Logits do not depend on `threads`, nor on
 * how a text is cut into calls, nor on what other texts do; with int8 activations not on the instruction set either. */
typedef struct septet_engine septet_engine;

typedef struct septet_model_shape {
    int64_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
    int64_t context;   /* most tokens of a text, at most 2^24; memory is taken as it fills */
    float epsilon;     /* of the norms, above 0 */
    int activations;   /* enum septet_activation_kind */
    int cache;         /* how keys and values are kept: SEPTET_FLOAT32, SEPTET_FLOAT16, or SEPTET_INT8 with a scale for each vector */
} septet_model_shape;

/* SIZE: a size is below 1 or too large, head_dim odd or above 256, heads no multiple of kv_heads, epsilon not positive. */
SEPTET_API int septet_engine_create(const septet_model_shape* shape, septet_engine** engine);
SEPTET_API void septet_engine_free(septet_engine* engine);  /* NULL does nothing */

enum septet_weight_slot {
    SEPTET_SLOT_EMBEDDING = 0,  /* one layer, hidden -> vocabulary, int8 or dense; rows are looked up */
    SEPTET_SLOT_HEAD = 1,       /* one, hidden -> vocabulary; without it the embedding is the head */
    SEPTET_SLOT_QKV = 2,        /* three: query, key, value */
    SEPTET_SLOT_OUT = 3,        /* one: what follows attention */
    SEPTET_SLOT_GATE_UP = 4,    /* two */
    SEPTET_SLOT_DOWN = 5        /* one */
};
/* Copies the layers of a slot; `layer` counts from 0 and is ignored by the first two slots. Layers that share their inputs
 * (code, bits, input_scale bit for bit, input_block, segment) become one product. Errors as septet_linear; SIZE: the slot has
 * another number of layers or other sizes; CODE: the embedding cannot be looked up. */
SEPTET_API int septet_engine_set_weights(septet_engine* engine, int slot, int64_t layer, const septet_layer* const* layers, int count);

enum septet_vector_slot {
    SEPTET_SLOT_FREQUENCIES = 0,  /* [head_dim / 2]: angle per position of each pair */
    SEPTET_SLOT_FINAL_NORM = 1,   /* [hidden] */
    SEPTET_SLOT_ATTENTION_NORM = 2, SEPTET_SLOT_MLP_NORM = 3,  /* [hidden] */
    SEPTET_SLOT_Q_NORM = 4, SEPTET_SLOT_K_NORM = 5,            /* [head_dim], optional: per head, before the rotation */
    SEPTET_SLOT_Q_BIAS = 6, SEPTET_SLOT_K_BIAS = 7, SEPTET_SLOT_V_BIAS = 8, SEPTET_SLOT_OUT_BIAS = 9, /* optional */
    SEPTET_SLOT_GATE_BIAS = 10, SEPTET_SLOT_UP_BIAS = 11, SEPTET_SLOT_DOWN_BIAS = 12                  /* optional */
};
/* SIZE when the slot or layer does not exist or `count` is not the size of the slot. */
SEPTET_API int septet_engine_set_vector(septet_engine* engine, int slot, int64_t layer, const float* values, int64_t count);
/* This layer sees the last `window` positions only, itself included; 0: all. */
SEPTET_API int septet_engine_set_window(septet_engine* engine, int64_t layer, int64_t window);

/* Append `count` tokens to a text and write the logits that follow the last `wanted` of them: float32 [wanted, vocabulary],
 * 0 <= wanted <= count. After an error the text is as before. INCOMPLETE, TOKEN, CONTEXT, MEMORY; SIZE for a bad count or text. */
SEPTET_API int septet_engine_run(septet_engine* engine, int64_t text, const int32_t* tokens, int64_t count, int64_t wanted,
                                 float* logits, int threads);
/* Append one token to each of `count` different texts that were used before, weights being read once for all of them; logits:
 * float32 [count, vocabulary]. Errors as septet_engine_run. */
SEPTET_API int septet_engine_step(septet_engine* engine, const int64_t* texts, const int32_t* tokens, int64_t count, float* logits,
                                  int threads);
/* Keep the first `length` tokens of a text; SIZE when it is shorter. 0 starts a new one. */
SEPTET_API int septet_engine_truncate(septet_engine* engine, int64_t text, int64_t length);
SEPTET_API int septet_engine_length(septet_engine* engine, int64_t text, int64_t* length);
/* Bytes of weights and of the caches at their present size. */
SEPTET_API int septet_engine_memory(septet_engine* engine, int64_t* weights, int64_t* cache);

#ifdef __cplusplus
}
#endif
#endif
