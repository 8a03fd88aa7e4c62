// What blocks of a cluster, and clusters, tell each other while they encode: see encode.cu, which follows.

typedef unsigned int u32;
typedef unsigned char u8;

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
