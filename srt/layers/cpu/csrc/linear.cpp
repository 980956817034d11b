// Packing of weights, and y = x W^T for any number of rows.
#include "api.h"
#include "gemm.h"

namespace srt {

namespace {

constexpr int kRowsOfTask = 16 * kTileRows;
// Fewer words of weights (times a quarter of the rows) than this are not worth waking another thread for.
constexpr int64_t kWordsWorthATeam = 16 * 1024;

template <class T>
void pack(const T* w, int64_t stride, int n, int k, const int32_t* order, uint32_t* packed) {
    const int words = words_of<T>(k);
    each(blocks_of(n, kPanel), thread_count(), [&](int panel) {
        uint32_t* out = packed + static_cast<int64_t>(panel) * words * kPanel;
        for (int c = 0; c < kPanel; ++c) {
            const int column = panel * kPanel + c;
            const int row = column >= n ? -1 : order == nullptr ? column : order[column];
            for (int i = 0; i < words; ++i) {
                const int first = i * Word<T>::elements;
                uint32_t word = 0;
                if (row >= 0) std::memcpy(&word, w + row * stride + first, sizeof(T) * at_most(k - first, Word<T>::elements));
                out[static_cast<int64_t>(i) * kPanel + c] = word;
            }
        }
    });
}

template <class T>
void linear(const T* x, int64_t x_stride, const uint32_t* packed, T* y, int64_t y_stride, int m, int n, int k) {
    thread_local Scratch scratch;
    const Rows rows = words_in(x, x_stride, m, k, scratch);
    const int words = words_of<T>(k), panels = blocks_of(n, kPanel), row_blocks = blocks_of(m, kRowsOfTask);
    const int64_t work = static_cast<int64_t>(words) * panels * kPanel * at_least(1, m / 4);
    const int threads = work < kWordsWorthATeam ? 1 : thread_count();
    // Panels of a task: enough to stream, few enough that nobody waits long for the last one.
    const int group = m > kTileRows ? 1 : at_least(1, at_most(8, panels / (4 * threads)));
    each(blocks_of(panels, group) * row_blocks, threads, [&](int task) {
        const int first_panel = (task / row_blocks) * group, begin = (task % row_blocks) * kRowsOfTask;
        const int last_panel = at_most(panels, first_panel + group), count = at_most(m - begin, kRowsOfTask);
        for (int panel = first_panel; panel < last_panel; ++panel) {
            const int column = panel * kPanel, wide = at_most(n - column, kPanel);
            const uint32_t* weights = packed + static_cast<int64_t>(column) * words;
            rows_times_panel<T>(rows, begin, begin + count, weights, words, [&](int first, int height, const float* sums) {
                T* out = y + first * y_stride + column;
                for (int r = 0; r < height; ++r, out += y_stride) {
                    vstore_n(out, vload(sums + r * kPanel), wide);
                    if (wide > kLanes) vstore_n(out + kLanes, vload(sums + r * kPanel + kLanes), wide - kLanes);
                }
            });
        }
    });
}

}  // namespace

}  // namespace srt

using namespace srt;

SRT_API int64_t srt_packed_words(int dtype, int n, int k) {
    const int words = dtype == kFloat32 ? words_of<float>(k) : words_of<bf16>(k);
    return static_cast<int64_t>(blocks_of(n, kPanel)) * words * kPanel;
}

SRT_API void srt_pack(int dtype, const void* weight, int64_t stride, int n, int k, const int32_t* order, uint32_t* packed) {
    with_type(dtype, weight, [&](auto* w) { pack(w, stride, n, k, order, packed); });
}

SRT_API void srt_linear(int dtype, const void* x, int64_t x_stride, const uint32_t* packed, void* y, int64_t y_stride, int m,
                        int n, int k) {
    with_type(dtype, x, [&](auto* from) {
        linear(from, x_stride, packed, same_type(from, y), y_stride, m, n, k);
    });
}
