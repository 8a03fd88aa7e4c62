// What blocks of a cluster, and clusters, tell each other while they encode, and what else C++ has no words for: see encode.cu, which follows.

typedef unsigned int u32;
typedef unsigned char u8;

// sum + x.lo * levels[0 or 2] + x.hi * levels[1 or 3]
__device__ __forceinline__ int dot_low(u32 x, u32 levels, int sum)
{
    int result;
    asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(levels), "r"(sum));
    return result;
}

__device__ __forceinline__ int dot_high(u32 x, u32 levels, int sum)
{
    int result;
    asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(levels), "r"(sum));
    return result;
}

// Without a branch: one that shuffles on both sides would be taken by neighbouring threads in turns.
__device__ __forceinline__ int choose(bool first, int a, int b)
{
    int result;
    asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nselp.s32 %0, %1, %2, p;\n}" : "=r"(result) : "r"(a), "r"(b), "r"((int)first));
    return result;
}

// Says that the compiler does not know these, or it would compute them anew in each step.
__device__ __forceinline__ void keep_known(u32& first, u32& second, int& third)
{
    asm volatile("" : "+r"(first), "+r"(second), "+r"(third));
}

// Waits for the kernel before, and lets the next one start.
__device__ __forceinline__ void follow()
{
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ u32 block_in_cluster()
{
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ u32 address_of(const u8* memory)
{
    return (u32)__cvta_generic_to_shared(memory);
}

__device__ __forceinline__ u32 address_in(u32 local, u32 block)
{
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(local), "r"(block));
    return there;
}

// Words of costs say themselves that they are there, so stores and loads of them are relaxed. These three say nothing about other memory, so
// that the compiler can do something else in between, and are no branches.
__device__ __forceinline__ void send(bool when, u32 there, int word)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.relaxed.cluster.shared::cluster.s32 [%0], %1;\n}" ::"r"(there), "r"(word),
                 "r"((int)when));
}

__device__ __forceinline__ void keep(bool when, u32 here, int word)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.relaxed.cluster.shared::cta.s32 [%0], %1;\n}" ::"r"(here), "r"(word),
                 "r"((int)when));
}

__device__ __forceinline__ void send_byte(bool when, u32 there, int byte)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.shared::cluster.u8 [%0], %1;\n}" ::"r"(there), "r"(byte), "r"((int)when));
}

__device__ __forceinline__ int4 load(u32 here)
{
    int4 quad;
    asm volatile("ld.relaxed.cluster.shared::cta.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(quad.x), "=r"(quad.y), "=r"(quad.z), "=r"(quad.w)
                 : "r"(here));
    return quad;
}

// Until a word is sent, which is not UNKNOWN.
constexpr int UNKNOWN = -1;

__device__ __forceinline__ void wait_for(u32 here)
{
    int word;
    do
        asm volatile("ld.relaxed.cluster.shared::cta.s32 %0, [%1];" : "=r"(word) : "r"(here) : "memory");
    while (word == UNKNOWN);
}

__device__ __forceinline__ void meet()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A cost for the other cluster, and one from there: costs are words that are EMPTY or not, so nothing else has to be said.
constexpr int EMPTY = 0x80000000;

__device__ __forceinline__ void hand_over(int* there, int cost)
{
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(there), "r"(cost) : "memory");
}

// Costs that are so many words apart.
template <int count, int apart>
__device__ __forceinline__ void receive(int* here, int (&costs)[count])
{
    bool all;
    do
    {
        all = true;
#pragma unroll
        for (int i = 0; i < count; i++)
        {
            asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(costs[i]) : "l"(here + i * apart) : "memory");
            all = all && costs[i] != EMPTY;
        }
    } while (!all);
#pragma unroll
    for (int i = 0; i < count; i++)
        hand_over(here + i * apart, EMPTY);
}
