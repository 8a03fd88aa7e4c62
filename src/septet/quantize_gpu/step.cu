// What error feedback does before and after the search of one step: the operations of `feedback._Work._step`. All sums are exact, so
// their order says nothing.
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
    const int* const* across;  // [T], coefficients of the outputs behind a row of tiles, 64 rows of `strides` each
    const int* strides;        // [T]
    const int* later;          // [T], how many rows of tiles of its sheet are behind a row of tiles
    const double* per_output;  // [T]
    short* fixed;              // [T, 256]
    double* asked;             // [T, 256], of later rows
    const int* windows;        // [T, 128]
    const signed char* table;  // [65536, 2]
    const double* per_input;   // []
    int columns;               // P
};

__device__ __forceinline__ double whole(double error)
{
    return fmin(fmax(rint(error), -(double)LARGEST), (double)LARGEST);
}

// Sum v of 2 * HALF over all lanes of equal lane / (2 * HALF) ends in their lane v.
template <int HALF>
__device__ __forceinline__ void fold(double (&sums)[16], int lane)
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

// Reading coefficients of later rows takes longest, so many warps share a row of tiles: each has two outputs, and its lanes what is summed.
extern "C" __global__ void __launch_bounds__(256) target(const Arguments a, int number)
{
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
    const int tile = blockIdx.x, lane = threadIdx.x % 32, output = (blockIdx.y * 8 + threadIdx.x / 32) * 2;
    const long long column = *a.now + a.delays[tile] - number;
    // For each of the 8 weights what earlier columns of the batch ask of it, and what later rows of the same column ask.
    double sums[16] = {};
    const double* recent = a.recent + ((long long)tile * 64 + output) * WIDTH;
    const double* local = a.local + (long long)tile * WIDTH * WIDTH + number * 4;
    for (int k = lane; k < number * 4; k += 32)
    {
        const double2 low = *(const double2*)(local + k * WIDTH), high = *(const double2*)(local + k * WIDTH + 2);
#pragma unroll
        for (int row = 0; row < 2; row++)
        {
            const double error = recent[row * WIDTH + k];
            sums[row * 4] += error * low.x;
            sums[row * 4 + 1] += error * low.y;
            sums[row * 4 + 2] += error * high.x;
            sums[row * 4 + 3] += error * high.y;
        }
    }
    const int stride = a.strides[tile];
    const int* coefficients = a.across[tile] + (long long)output * stride;
    const float4* errors = (const float4*)a.errors + ((long long)(tile + 1) * a.columns + column) * 64;
#pragma unroll 8
    for (int k = lane; k < a.later[tile] * 64; k += 32)
    {
        const float4 error = errors[(long long)(k / 64) * a.columns * 64 + k % 64];
#pragma unroll
        for (int row = 0; row < 2; row++)
        {
            const double c = coefficients[row * stride + k];
            sums[8 + row * 4] += c * error.x;
            sums[8 + row * 4 + 1] += c * error.y;
            sums[8 + row * 4 + 2] += c * error.z;
            sums[8 + row * 4 + 3] += c * error.w;
        }
    }
    fold<8>(sums, lane);
    const double mine = sums[0] + __shfl_xor_sync(0xffffffffu, sums[0], 16), asked = __shfl_down_sync(0xffffffffu, mine, 8) * a.per_output[tile];
    if (lane >= 8)
        return;
    const int row = output + lane / 4, input = lane % 4, place = row * 4 + input;
    double sum = (mine + a.before[((long long)tile * 64 + row) * WIDTH + number * 4 + input]) * *a.per_input;
    if (a.later[tile] > 0)
    {
        a.asked[tile * 256 + place] = asked;
        sum += asked / (1 << SHIFT);
    }
    const double weight = a.weights[((long long)tile * a.columns + column) * 256 + place];
    const double real = a.real_rows[tile * 64 + row] * a.real_columns[column * 4 + input];
    const double wanted = rint((weight - sum) * real);
    a.fixed[tile * 256 + place] = (short)fmin(fmax(wanted, -(double)LIMIT), (double)LIMIT);
}

// A block of 256 threads for each row of tiles, and a thread for each weight.
extern "C" __global__ void __launch_bounds__(256) accept(const Arguments a, int number)
{
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
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
