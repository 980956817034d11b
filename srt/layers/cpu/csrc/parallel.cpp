#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "api.h"

namespace srt {

namespace {

// How long a helper stays awake for the next call before it leaves the core to others: longer than the Python code
// between two calls of a step, shorter than the pause between two steps.
constexpr std::chrono::microseconds kAwake{80};
constexpr int kGlances = 256;    // looks at the job between two looks at the clock
constexpr int kPatience = 4096;  // looks at a helper's last task before the caller offers it the core

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One job at a time. `ticket_` is its number of tasks and the next one, in 32 bits each, so that taking a task is one
// addition whose result says everything: a thread that reads next < tasks owns that task, and the job's other fields
// stand still until all its tasks are done. A ticket with next >= tasks is no work.
class Pool {
public:
    void resize(int threads) {
        const std::lock_guard<std::mutex> lock(calling_);
        threads_.store(threads < 1 ? 1 : threads, std::memory_order_relaxed);
        for (; helpers_ < threads - 1; ++helpers_) start(helpers_ + 1);
    }

    int threads() const { return threads_.load(std::memory_order_relaxed); }

    void share(int count, void (*task)(void*, int), void* context) {
        const std::unique_lock<std::mutex> lock(calling_, std::try_to_lock);
        if (!lock.owns_lock()) {  // another thread's job runs: do this one alone
            for (int i = 0; i < count; ++i) task(context, i);
            return;
        }
        task_ = task, context_ = context;
        done_.store(0, std::memory_order_relaxed);
        ticket_.store(static_cast<uint64_t>(count) << 32, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            { const std::lock_guard<std::mutex> door(sleeping_); }
            bell_.notify_all();
        }
        work();
        for (int looks = 0; done_.load(std::memory_order_acquire) != count; ++looks) {
            pause_briefly();
            if (looks > kPatience) std::this_thread::yield();
        }
    }

private:
    static bool open(uint64_t ticket) { return (ticket & 0xffffffff) < ticket >> 32; }

    void work() {
        while (open(ticket_.load(std::memory_order_acquire))) {
            const uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
            if (!open(mine)) return;
            task_(context_, static_cast<int>(mine & 0xffffffff));
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    // A helper keeps out while the thread count is below its number.
    bool wanted(int number) const { return number < threads() && open(ticket_.load(std::memory_order_seq_cst)); }

    void help(int number) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kAwake;
            bool worked = false;
            while (!worked && std::chrono::steady_clock::now() < until)
                for (int look = 0; look < kGlances && !worked; ++look) {
                    worked = wanted(number);
                    if (!worked) pause_briefly();
                }
            if (worked) {
                work();
                continue;
            }
            std::unique_lock<std::mutex> door(sleeping_);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            bell_.wait(door, [&] { return wanted(number); });
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    // Helpers live as long as the process. Signals are for the threads that Python knows.
    void start(int number) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        std::thread([this, number] { help(number); }).detach();
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    void (*task_)(void*, int) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<int> threads_{1};
    int helpers_ = 0;
    std::mutex calling_, sleeping_;
    std::condition_variable bell_;
};

// Never destroyed: helpers may look at it until the process is gone.
Pool& pool() {
    static Pool* const one = new Pool;
    return *one;
}

}  // namespace

int thread_count() { return pool().threads(); }
void set_thread_count(int threads) { pool().resize(threads); }
void share(int count, void (*task)(void*, int), void* context) { pool().share(count, task, context); }

}  // namespace srt

using namespace srt;

SRT_API void srt_set_threads(int threads) { set_thread_count(threads); }

// Bit 0: AVX-512, bit 1: its bfloat16 dot product.
SRT_API int srt_vector_units() { return SRT_AVX512 | SRT_AVX512_BF16 << 1; }
