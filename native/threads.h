// A small pool of threads for loops over independent parts.
//
// Each thread has a share of neighbouring parts and goes through them in order. Who ends up with a part is left to chance, where the parts begin is not, and no
// part depends on another: results are the same for any number of threads. Idle workers sleep. A second caller, while the pool is busy, works alone instead of waiting.
#pragma once
#include <cstdint>

namespace septet {

constexpr int kMaxThreads = 1024;

// requested 0: the default (septet_default_threads); returns an error number of septet.h.
int resolve_threads(int requested, int* threads);

// Parts for each thread, so that one that starts late or is held up leaves what it has not begun to the others. Of long loops there are up to kMostParts, of
// some ten microseconds each: what is left when the first thread has nothing to do any more is at most one of them.
constexpr int kPartsPerThread = 4, kMostParts = 64;

using RangeBody = void (*)(const void* context, int64_t first, int64_t last);
void run_ranges(int threads, int64_t count, int parts_per_thread, RangeBody body, const void* context);

// While one exists, workers that have finished a job look out for the next for some microseconds before they sleep, and small jobs are worth sharing:
// for code that calls parallel_for again and again. It does nothing for one thread.
class AwakeThreads {
public:
    explicit AwakeThreads(int threads);
    AwakeThreads(const AwakeThreads&) = delete;
    AwakeThreads& operator=(const AwakeThreads&) = delete;
    ~AwakeThreads();
    static bool exist();

private:
    bool awake_;
};

// Calls body(first, last) for ranges that cover 0 .. count - 1. The body must not throw.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body, int parts_per_thread = kPartsPerThread) {
    run_ranges(threads, count, parts_per_thread, [](const void* context, int64_t first, int64_t last) { (*static_cast<const Body*>(context))(first, last); }, &body);
}

}  // namespace septet
