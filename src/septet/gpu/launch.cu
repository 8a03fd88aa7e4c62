// Programmatic dependent launch: a kernel begins while the one before it ends, and waits where it needs what that one wrote.

// Before sm_90 there is nothing to wait for: a launch begins when the one before it has ended.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_the_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
