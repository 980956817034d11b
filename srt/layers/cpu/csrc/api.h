// What the functions that Python calls have in common. Element types travel as a number.
#pragma once

#include <type_traits>

#include "simd.h"

#define SRT_API extern "C" __attribute__((visibility("default")))

namespace srt {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kE4m3Codes = 2 };

struct e4m3 {
    uint8_t bits;
};

// Calls use(pointer) with `data` as const float* or const bf16*.
template <class Use> inline void with_type(int dtype, const void* data, Use&& use) {
    if (dtype == kFloat32)
        use(static_cast<const float*>(data));
    else
        use(static_cast<const bf16*>(data));
}

// Calls use(pointer) with `data` as e4m3*, or as what the computation is in: T*.
template <class T, class Use> inline void with_kv(int dtype, const T*, void* data, Use&& use) {
    if (dtype == kE4m3Codes)
        use(static_cast<e4m3*>(data));
    else
        use(static_cast<T*>(data));
}

template <class T> inline T* same_type(const T*, void* data) { return static_cast<T*>(data); }
template <class T> inline const T* same_type(const T*, const void* data) { return static_cast<const T*>(data); }

}  // namespace srt
