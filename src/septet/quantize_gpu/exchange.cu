// What blocks of a cluster, and clusters, tell each other while they encode: see encode.cu, which follows.

typedef unsigned int u32;
typedef unsigned char u8;

__device__ __forceinline__ u32 address_in(u32 local, u32 block)
{
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(local), "r"(block));
    return there;
}

// These two say nothing about other memory, so that the compiler can do something else in between, and are no branches.
__device__ __forceinline__ void put(bool when, u32 there, int value)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.shared::cluster.u32 [%0], %1;\n}" ::"r"(there), "r"(value), "r"((int)when));
}

// Four costs for another block, counted by a barrier there.
__device__ __forceinline__ void send(bool when, u32 there, const int (&costs)[4], u32 barrier)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %6, 0;\n"
                 "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];\n}" ::"r"(there),
                 "r"(costs[0]), "r"(costs[1]), "r"(costs[2]), "r"(costs[3]), "r"(barrier), "r"((int)when));
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity)
{
    u32 done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
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

__device__ __forceinline__ int receive(int* here)
{
    int cost;
    do
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(cost) : "l"(here) : "memory");
    while (cost == EMPTY);
    hand_over(here, EMPTY);
    return cost;
}
