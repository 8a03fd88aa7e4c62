#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "septet.h"

namespace septet {
namespace {

// Each thread has a share of the parts, one behind the other: what it asks memory for ahead of itself is what it needs next. When that is done it helps out
// with the shares of the others.
class Job {
public:
    Job(RangeBody body, const void* context, int64_t count, int threads, int64_t parts)
        : body_(body), context_(context), count_(count), parts_(parts), share_count_(std::min(threads, kMostShares)) {
        for (int share = 0; share < share_count_; share++) shares_[share].next.store(begin_of(share), std::memory_order_relaxed);
    }

    // `thread`: who works, from 0 on.
    void work(int thread) {
        for (int tried = 0; tried < share_count_; tried++) {
            const int share = (thread + tried) % share_count_;
            const int64_t end = begin_of(share + 1);
            for (int64_t part; (part = shares_[share].next.fetch_add(1, std::memory_order_relaxed)) < end;)
                body_(context_, count_ * part / parts_, count_ * (part + 1) / parts_);
        }
    }

private:
    static constexpr int kMostShares = 64;
    struct alignas(64) Share { std::atomic<int64_t> next; };  // in a cache line of its own

    int64_t begin_of(int share) const { return parts_ * share / share_count_; }

    RangeBody body_;
    const void* context_;
    int64_t count_, parts_;
    int share_count_;
    Share shares_[kMostShares];
};

// How many AwakeThreads there are.
std::atomic<int> awake{0};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Looks for `done` a while without falling asleep, which would cost the time to wake up. Whoever else wants the processor gets it in between: the thread that
// is waited for may have lost its own to another process. False when it gave up.
template <class Done>
bool look_out(const Done& done) {
    constexpr auto limit = std::chrono::microseconds(100);
    constexpr int looks = 64;
    const auto begin = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < looks; i++) {
            if (done()) return true;
            pause();
        }
        std::this_thread::yield();
    } while (std::chrono::steady_clock::now() - begin < limit);
    return done();
}

// A job is open from when it is published until its caller has run out of parts. Workers enter an open job, and the caller waits until all have left.
class Pool {
public:
    void run(int threads, Job& job) {
        std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
        if (!caller.owns_lock()) return job.work(0);
        start_workers(threads - 1);
        job_ = &job;
        helpers_ = threads - 1;
        gate_.store(kOpen);
        round_.fetch_add(1);
        if (sleepers_.load() > 0) {
            { const std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        job.work(0);
        gate_.fetch_and(~kOpen);
        if (look_out([this] { return gate_.load() == 0; })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return gate_.load() == 0; });
    }

private:
    static constexpr int64_t kOpen = 1, kWorker = 2;

    // Fewer workers than wanted when the system gives no more.
    void start_workers(int wanted) {
        try {
            for (; workers_ < wanted; workers_++) std::thread([this, index = workers_] { serve(index); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void serve(int index) {
        for (uint64_t seen = 0;;) {
            const auto published = [&] { return round_.load() != seen; };
            if (awake.load() == 0 || !look_out(published)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, published);
                sleepers_.fetch_sub(1);
            }
            seen = round_.load();
            if (!enter()) continue;
            if (index < helpers_) job_->work(index + 1);
            if (gate_.fetch_sub(kWorker) == kWorker) {
                { const std::lock_guard<std::mutex> lock(mutex_); }
                done_.notify_one();
            }
        }
    }

    bool enter() {
        for (int64_t gate = gate_.load(); gate & kOpen;)
            if (gate_.compare_exchange_weak(gate, gate + kWorker)) return true;
        return false;
    }

    std::mutex caller_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int64_t> gate_{0};  // kOpen, plus kWorker for each worker inside
    std::atomic<int> sleepers_{0};
    Job* job_ = nullptr;
    int workers_ = 0, helpers_ = 0;
};

// Never destroyed: workers may be asleep in it when the process ends. A forked child has no workers, so it gets a pool of its own.
std::atomic<Pool*> shared_pool{nullptr};

Pool& pool() {
    static const bool registered = [] {
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });
#endif
        return true;
    }();
    static_cast<void>(registered);
    Pool* current = shared_pool.load();
    if (current == nullptr) {
        Pool* fresh = new Pool;
        if (shared_pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

// The number at the start of a variable; 0 when unset, -1 when it is not a positive number. OpenMP allows a list: "4,2".
int number_from(const char* variable, bool list) {
    const char* text = std::getenv(variable);
    if (text == nullptr || *text == 0) return 0;
    char* end = nullptr;
    errno = 0;
    const long value = std::strtol(text, &end, 10);
    if (end == text || (*end != 0 && !(list && *end == ',')) || errno != 0 || value < 1) return -1;
    return static_cast<int>(std::min<long>(value, kMaxThreads));
}

}  // namespace

void run_ranges(int threads, int64_t count, int parts_per_thread, RangeBody body, const void* context) {
    if (count <= 0) return;
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    if (threads <= 1) return body(context, 0, count);
    Job job(body, context, count, threads, std::min<int64_t>(count, static_cast<int64_t>(threads) * parts_per_thread));
    pool().run(threads, job);
}

AwakeThreads::AwakeThreads(int threads) : awake_(threads > 1) {
    if (awake_) awake.fetch_add(1);
}

AwakeThreads::~AwakeThreads() {
    if (awake_) awake.fetch_sub(1);
}

bool AwakeThreads::exist() { return awake.load(std::memory_order_relaxed) > 0; }

int resolve_threads(int requested, int* threads) {
    if (requested < 0) return SEPTET_ERROR_THREADS;
    if (requested == 0) return septet_default_threads(threads);
    *threads = std::min(requested, kMaxThreads);
    return SEPTET_OK;
}

}  // namespace septet

extern "C" int septet_default_threads(int* threads) {
    using namespace septet;
    if (threads == nullptr) return SEPTET_ERROR_NULL;
    const int own = number_from("SEPTET_THREADS", false);
    if (own < 0) return SEPTET_ERROR_THREADS;
    const int openmp = number_from("OMP_NUM_THREADS", true);
    const int processors = std::max(1, std::min<int>(static_cast<int>(std::thread::hardware_concurrency()), kMaxThreads));
    *threads = own > 0 ? own : openmp > 0 ? openmp : processors;
    return SEPTET_OK;
}
