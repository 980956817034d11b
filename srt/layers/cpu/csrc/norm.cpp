// RMS norms with a zero-centred weight: y = x * rsqrt(mean(x^2) + eps) * (1 + w), in float32, rounded once.
#include "norm.h"

#include "api.h"

namespace srt {

namespace {

constexpr int64_t kElementsWorthATeam = 64 * 1024;

// `residual` (or null) is added to x first; the sum, rounded to T, goes to `sum` and is what gets normalised.
template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const T* weight, T* sum, T* y, int m,
              int n, float eps) {
    const int rows = 16;
    const int threads = static_cast<int64_t>(m) * n < kElementsWorthATeam ? 1 : thread_count();
    each(blocks_of(m, rows), threads, [&](int block) {
        for (int r = block * rows; r < at_most(m, (block + 1) * rows); ++r) {
            const T* from = x + r * x_stride;
            if (residual != nullptr) {
                const T* other = residual + r * residual_stride;
                T* total = sum + static_cast<int64_t>(r) * n;
                for (int i = 0; i < n; i += kLanes) {
                    const int left = n - i;
                    vstore_n(total + i, vadd(vload_n(from + i, left), vload_n(other + i, left)), left);
                }
                from = total;
            }
            normalise(from, weight, y + static_cast<int64_t>(r) * n, n, eps);
        }
    });
}

}  // namespace

}  // namespace srt

using namespace srt;

SRT_API void srt_rms_norm(int dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                          const void* weight, void* sum, void* y, int m, int n, float eps) {
    with_type(dtype, x, [&](auto* from) {
        rms_norm(from, x_stride, same_type(from, residual), residual_stride, same_type(from, weight), same_type(from, sum),
                 same_type(from, y), m, n, eps);
    });
}
