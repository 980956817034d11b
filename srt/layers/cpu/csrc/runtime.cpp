#include "api.h"
#include "parallel.h"

namespace srt {
Runtime runtime;
}

using namespace srt;

// Addresses of GOMP_parallel and GOMP_barrier in the runtime that the process has loaded, or null.
SRT_API void srt_set_runtime(void* parallel, void* barrier) {
    runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(parallel);
    runtime.barrier = reinterpret_cast<decltype(runtime.barrier)>(barrier);
}

SRT_API void srt_set_threads(int threads) {
    runtime.threads = runtime.parallel == nullptr || runtime.barrier == nullptr || threads < 1 ? 1 : threads;
}

// Bit 0: AVX-512, bit 1: its bfloat16 dot product.
SRT_API int srt_vector_units() { return SRT_AVX512 | SRT_AVX512_BF16 << 1; }
