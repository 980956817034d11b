#pragma once

#include "parallel.h"
#include "simd.h"

namespace srt {

// 1 / rms of n elements. Two running sums, so that a row of any length is summed in one order.
template <class T> inline float inverse_rms(const T* x, int n, float eps) {
    vf even = vzero(), odd = vzero();
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const vf a = vload(x + i), b = vload(x + i + kLanes);
        even = vfma(a, a, even);
        odd = vfma(b, b, odd);
    }
    for (; i < n; i += kLanes) {
        const vf a = vload_n(x + i, n - i);
        even = vfma(a, a, even);
    }
    return 1.0f / std::sqrt(vsum(vadd(even, odd)) / static_cast<float>(n) + eps);
}

template <class T, class Y> inline void normalise(const T* x, const T* weight, Y* y, int n, float eps) {
    const vf scale = vset(inverse_rms(x, n, eps)), one = vset(1.0f);
    for (int i = 0; i < n; i += kLanes) {
        const int left = n - i;
        const vf gain = vadd(one, vload_n(weight + i, left));
        vstore_n(y + i, vmul(vmul(vload_n(x + i, left), scale), gain), left);
    }
}

}  // namespace srt
