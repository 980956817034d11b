// The choice of experts, the gated activation of the dense layers, and the arg max of logits.
#include "api.h"
#include "gemm.h"

namespace srt {

namespace {

constexpr int64_t kElementsWorthATeam = 64 * 1024;

// The `chosen` largest of sigmoid(logits) + bias, largest first, the lower number first among equals; weights are the
// unbiased scores, made to sum to `factor`.
void choose(const float* logits, const float* bias, int experts, int chosen, float factor, float* scores, float* biased,
            int32_t* ids, float* weights) {
    for (int e = 0; e < experts; e += kLanes) {
        const int left = experts - e;
        const vf score = vsigmoid(vload_n(logits + e, left));
        vstore_n(scores + e, score, left);
        vstore_n(biased + e, vadd(score, vload_n(bias + e, left)), left);
    }
    float sum = 0.0f;
    for (int k = 0; k < chosen; ++k) {
        int best = -1;
        for (int e = 0; e < experts; ++e)
            if (biased[e] > (best < 0 ? -INFINITY : biased[best])) best = e;
        if (best < 0) best = 0;  // nothing but NaN: any expert will carry it on
        biased[best] = -INFINITY;
        ids[k] = best;
        sum += scores[best];
        weights[k] = scores[best];
    }
    const float share = factor / (sum + 1e-20f);  // the tiny term: should every chosen score have underflowed
    for (int k = 0; k < chosen; ++k) weights[k] *= share;
}

template <class T>
void route(const T* x, int64_t stride, int n, int hidden, const uint32_t* packed, const float* bias, int experts, int chosen,
           float factor, int32_t* ids, float* weights) {
    const int panels = blocks_of(experts, kPanel), wide = panels * kPanel;
    const int64_t work = static_cast<int64_t>(n) * hidden * wide / kPanel;
    each(blocks_of(n, kTileRows), work < kElementsWorthATeam ? 1 : thread_count(), [&](int task) {
        thread_local Scratch scratch;
        const int first = task * kTileRows, rows = at_most(kTileRows, n - first);
        const int padded = blocks_of(hidden, kLanes) * kLanes;
        float* copy = scratch.reserve<float>(static_cast<size_t>(rows) * padded + static_cast<size_t>(kTileRows + 2) * wide);
        float *logits = copy + rows * padded, *scores = logits + kTileRows * wide, *biased = scores + wide;
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < hidden; i += kLanes) vstore(copy + r * padded + i, vload_n(x + (first + r) * stride + i, hidden - i));
        const Rows from{reinterpret_cast<const uint32_t*>(copy), padded};
        for (int p = 0; p < panels; ++p)
            tile<float>(rows, from, packed + static_cast<int64_t>(p) * hidden * kPanel, hidden, logits + p * kPanel, wide, false, 0);
        for (int r = 0; r < rows; ++r) {
            const int64_t at = static_cast<int64_t>(first + r) * chosen;
            choose(logits + r * wide, bias, experts, chosen, factor, scores, biased, ids + at, weights + at);
        }
    });
}

template <class T> void gated_silu(const T* x, int64_t stride, int n, int width, float limit, T* y) {
    const int rows = 8;
    const int64_t elements = static_cast<int64_t>(n) * width;
    each(blocks_of(n, rows), elements < kElementsWorthATeam / 4 ? 1 : thread_count(), [&](int task) {
        for (int r = task * rows; r < at_most(n, (task + 1) * rows); ++r)
            for (int i = 0; i < width; i += kLanes) {
                const T *gate = x + r * stride + i, *up = gate + width;
                const int left = width - i;
                vstore_n(y + static_cast<int64_t>(r) * width + i, vgated(vload_n(gate, left), vload_n(up, left), limit), left);
            }
    });
}

// The first index of the largest value; a NaN counts as larger than any number.
template <class T> int64_t argmax(const T* x, int n) {
    vf largest = vset(-INFINITY), doubt = vzero();
    for (int i = 0; i < n; i += kLanes) {
        vf value = vload_n(x + i, n - i);
        if (n - i < kLanes) value = vkeep(value, 0, n - i, -INFINITY);
        largest = vmax(largest, value);
        doubt = vadd(doubt, vmul(vzero(), value));  // NaN for NaN and for infinities
    }
    const float best = vlargest(largest);
    const bool clean = vsum(doubt) == 0.0f;
    for (int i = 0; i < n; ++i) {
        const float value = to_float(x[i]);
        if (!clean && std::isnan(value)) return i;
    }
    for (int i = 0; i < n; ++i)
        if (to_float(x[i]) == best) return i;
    return 0;
}

}  // namespace

}  // namespace srt

using namespace srt;

SRT_API void srt_route(int dtype, const void* x, int64_t stride, int n, int hidden, const uint32_t* packed, const float* bias,
                       int experts, int chosen, float factor, int32_t* ids, float* weights) {
    with_type(dtype, x, [&](auto* from) { route(from, stride, n, hidden, packed, bias, experts, chosen, factor, ids, weights); });
}

// x [n, 2 * width], gate first.
SRT_API void srt_gated_silu(int dtype, const void* x, int64_t stride, int n, int width, float limit, void* y) {
    with_type(dtype, x, [&](auto* from) { gated_silu(from, stride, n, width, limit, same_type(from, y)); });
}

SRT_API void srt_argmax(int dtype, const void* x, int64_t stride, int n, int columns, int64_t* out) {
    with_type(dtype, x, [&](auto* from) {
        const int64_t elements = static_cast<int64_t>(n) * columns;
        each(n, elements < kElementsWorthATeam ? 1 : thread_count(), [&](int r) { out[r] = argmax(from + r * stride, columns); });
    });
}
