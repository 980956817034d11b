// Work shared by the threads of the OpenMP runtime that the process has already loaded (torch's).
//
// The library is compiled without OpenMP: it is handed the runtime's two entry points by address (see native.py), so a
// second pool of threads can never come to life beside torch's. Without them everything runs on the calling thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace srt {

struct Runtime {
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    void (*barrier)() = nullptr;
    int threads = 1;
};

extern Runtime runtime;

// Runs body(member) on up to `threads` threads; members are 0, 1, ... in no order of threads.
template <class Body> void team(int threads, Body&& body) {
    if (threads > runtime.threads) threads = runtime.threads;
    if (threads <= 1 || runtime.parallel == nullptr) {
        body(0);
        return;
    }
    struct Shared {
        Body* body;
        std::atomic<int> members{0};
    } shared{&body};
    runtime.parallel(
        [](void* data) {
            auto* of = static_cast<Shared*>(data);
            (*of->body)(of->members.fetch_add(1, std::memory_order_relaxed));
        },
        &shared, static_cast<unsigned>(threads), 0);
}

// Tasks of one phase, taken one by one: a thread that lost its core holds up no more than the task it has.
class Tasks {
public:
    explicit Tasks(int count) : count_(count) {}
    template <class Task> void work(Task&& task) {
        for (int i = next_.fetch_add(1, std::memory_order_relaxed); i < count_; i = next_.fetch_add(1, std::memory_order_relaxed))
            task(i);
    }

private:
    std::atomic<int> next_{0};
    int count_;
};

inline int at_most(int a, int b) { return a < b ? a : b; }
inline int at_least(int a, int b) { return a > b ? a : b; }
inline int blocks_of(int total, int size) { return (total + size - 1) / size; }

// Runs task(0 .. count - 1) on up to `threads` threads.
template <class Task> void each(int count, int threads, Task&& task) {
    threads = at_most(threads, count);
    if (threads <= 1) {
        for (int i = 0; i < count; ++i) task(i);
        return;
    }
    Tasks tasks(count);
    team(threads, [&](int) { tasks.work(task); });
}

// Waits for the whole team; with one thread there is nobody to wait for.
inline void team_barrier(bool alone) {
    if (!alone) runtime.barrier();
}

// Memory that a thread keeps from call to call, grown when a call needs more. Contents do not survive `reserve`.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }
    template <class T> T* reserve(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(64, bytes);
            bytes_ = memory_ == nullptr ? 0 : bytes;
            if (memory_ == nullptr) std::abort();
        }
        return static_cast<T*>(memory_);
    }

private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace srt
