// What error feedback does before and after the search of one step: the operations of `feedback._Work._step`, a block of 256 threads for
// each row of tiles and a thread for each weight. All sums are exact, so their order says nothing.
//
// Macros: WIDTH (inputs of a batch), BITS, LIMIT (of the encoder's input), PER_LEVEL, SHIFT (of errors), LARGEST (error).

typedef unsigned char u8;

struct Arguments
{
    const float* weights;      // [T, P, 64, 4]
    float* errors;             // [T, P, 64, 4]
    float* mixed;              // [T, P, 64, 4], the same memory where no outputs know each other
    signed char* levels;       // [T, P, 64, 4]
    u8* symbols;               // [T, P, 128]
    const double* before;      // [T, 64, WIDTH]
    const double* local;       // [T, WIDTH, WIDTH]
    double* recent;            // [T, 64, WIDTH]
    const double* real_rows;   // [T, 64]
    const double* real_columns;// [P, 4]
    const long long* now;      // the column of rows without a delay at the batch's first step
    const long long* delays;   // [T]
    const double* const* across;// [T], coefficients of the outputs behind a row of tiles, 64 rows of `strides` each
    const int* strides;        // [T]
    const int* later;          // [T], how many rows of tiles of its sheet are behind a row of tiles
    const double* per_output;  // [T]
    short* fixed;              // [T, 256]
    double* asked;             // [T, 256], of later rows
    const int* windows;        // [T, 128]
    const signed char* table;  // [65536, 2]
    double per_input;
    int columns;               // P
};

__device__ __forceinline__ double whole(double error)
{
    return fmin(fmax(rint(error), -(double)LARGEST), (double)LARGEST);
}

// Sum v of 2 * HALF over all lanes ends in lane v.
template <int HALF>
__device__ __forceinline__ void fold(double (&sums)[32], int lane)
{
#pragma unroll
    for (int v = 0; v < HALF; v++)
    {
        const double kept = lane & HALF ? sums[v + HALF] : sums[v], given = lane & HALF ? sums[v] : sums[v + HALF];
        sums[v] = kept + __shfl_xor_sync(0xffffffffu, given, HALF);
    }
    if constexpr (HALF > 1)
        fold<HALF / 2>(sums, lane);
}

// What errors of later rows in the same column ask of each weight. A warp has eight rows, and lanes have inputs of the sums; in the end
// lane v has sum v of the 32.
__device__ __forceinline__ double from_rows(const Arguments& a, int tile, long long column)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = a.strides[tile];
    const double* coefficients = a.across[tile] + (long long)warp * 8 * stride;
    double sums[32];
#pragma unroll
    for (int v = 0; v < 32; v++)
        sums[v] = 0;
    for (int k = lane; k < a.later[tile] * 64; k += 32)
    {
        const long long place = ((long long)(tile + 1 + k / 64) * a.columns + column) * 64 + k % 64;
        const float4 error = ((const float4*)a.errors)[place];
#pragma unroll
        for (int row = 0; row < 8; row++)
        {
            const double c = coefficients[(long long)row * stride + k];
            sums[row * 4] += c * error.x;
            sums[row * 4 + 1] += c * error.y;
            sums[row * 4 + 2] += c * error.z;
            sums[row * 4 + 3] += c * error.w;
        }
    }
    fold<16>(sums, lane);
    return sums[0] * a.per_output[tile];
}

extern "C" __global__ void __launch_bounds__(256) target(const Arguments a, int number)
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int tile = blockIdx.x, row = threadIdx.x / 4, input = threadIdx.x % 4;
    const long long column = *a.now + a.delays[tile] - number;
    const double* recent = a.recent + ((long long)tile * 64 + row) * WIDTH;
    const double* local = a.local + (long long)tile * WIDTH * WIDTH + number * 4 + input;
    double sum = 0;
#pragma unroll 8
    for (int k = 0; k < number * 4; k++)
        sum += recent[k] * local[k * WIDTH];
    sum = (sum + a.before[((long long)tile * 64 + row) * WIDTH + number * 4 + input]) * a.per_input;
    if (a.later[tile] > 0)
    {
        const double asked = from_rows(a, tile, column);
        a.asked[tile * 256 + threadIdx.x] = asked;
        sum += asked / (1 << SHIFT);
    }
    const double weight = a.weights[((long long)tile * a.columns + column) * 256 + threadIdx.x];
    const double real = a.real_rows[tile * 64 + row] * a.real_columns[column * 4 + input];
    const double wanted = rint((weight - sum) * real);
    a.fixed[tile * 256 + threadIdx.x] = (short)fmin(fmax(wanted, -(double)LIMIT), (double)LIMIT);
}

extern "C" __global__ void __launch_bounds__(256) accept(const Arguments a, int number)
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int tile = blockIdx.x, row = threadIdx.x / 4, input = threadIdx.x % 4;
    const long long column = *a.now + a.delays[tile] - number;
    const long long place = ((long long)tile * a.columns + column) * 256 + threadIdx.x;
    const int window = a.windows[tile * 128 + threadIdx.x / 2], level = a.table[2 * window + threadIdx.x % 2];
    if (threadIdx.x % 2 == 0)
        a.symbols[place / 2] = window & ((1 << BITS) - 1);
    a.levels[place] = level;
    const double real = a.real_rows[tile * 64 + row] * a.real_columns[column * 4 + input];
    const double error = whole(((double)(level * PER_LEVEL) - a.weights[place]) * (1 << SHIFT)) * real;
    const double mixed = a.later[tile] > 0 ? whole(error + a.asked[tile * 256 + threadIdx.x]) : error;
    a.errors[place] = (float)error;
    a.mixed[place] = (float)mixed;
    a.recent[((long long)tile * 64 + row) * WIDTH + number * 4 + input] = mixed;
}
