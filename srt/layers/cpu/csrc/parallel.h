// Work shared by a few threads that do not wait for each other to show up.
//
// The server's other processes want the same cores. A runtime that starts a team and joins it (OpenMP) waits until the
// slowest member has had the processor, milliseconds when another process runs there. Here a helper takes part if it is
// awake: the caller takes tasks from the first moment on and waits only for those that a helper has begun.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace srt {

// Threads that a call may use, the calling one included.
int thread_count();

// Starts helpers up to `threads` - 1; fewer are used from now on if `threads` is smaller.
void set_thread_count(int threads);

// Runs task(context, 0 .. count - 1), each once, on the caller and the helpers that are there in time.
void share(int count, void (*task)(void* context, int index), void* context);

// The same for a callable. With `threads` 1 or a single task the caller does it all.
template <class Task> void each(int count, int threads, Task&& task) {
    if (threads <= 1 || count <= 1) {
        for (int i = 0; i < count; ++i) task(i);
        return;
    }
    share(count, [](void* context, int index) { (*static_cast<std::remove_reference_t<Task>*>(context))(index); }, &task);
}

inline int at_most(int a, int b) { return a < b ? a : b; }
inline int at_least(int a, int b) { return a > b ? a : b; }
inline int blocks_of(int total, int size) { return (total + size - 1) / size; }

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
