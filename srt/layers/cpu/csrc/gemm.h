// Rows times packed weights: the one matrix kernel that linear layers, experts, router and attention share.
//
// A packed matrix [N, K] is cut into panels of 32 columns (rows of the stored weight); a panel holds, word by word along
// K, 32 columns side by side: [panels][words][32] of 32-bit words, zero where N or K end. A word is one float32 or two
// bfloat16 (see simd.h).
//
// Each output is one accumulator that walks the words of its row in order, whatever the tile shape: the sum of an output
// depends on its own row and column only, not on how many rows came along, nor on the thread that computed it.
#pragma once

#include <cstddef>

#include "parallel.h"
#include "simd.h"

namespace srt {

constexpr int kPanel = 32;     // columns of a panel
constexpr int kTileRows = 12;  // 12 rows x 2 vectors = 24 accumulators of 32 registers

template <class T> constexpr int words_of(int elements) { return (elements + Word<T>::elements - 1) / Word<T>::elements; }

// Rows of words: `stride` words from one row to the next.
struct Rows {
    const uint32_t* data;
    ptrdiff_t stride;
};

// sums[r][0 .. 32) = (or, with `add`, +=) row r of `a` times one panel, for 1 <= rows <= 12. While it walks, it asks the
// memory for the words `ahead` of it.
template <class T>
void tile(int rows, Rows a, const uint32_t* panel, int words, float* sums, ptrdiff_t sums_stride, bool add, ptrdiff_t ahead);

extern template void tile<float>(int, Rows, const uint32_t*, int, float*, ptrdiff_t, bool, ptrdiff_t);
extern template void tile<bf16>(int, Rows, const uint32_t*, int, float*, ptrdiff_t, bool, ptrdiff_t);

constexpr ptrdiff_t kWordsAhead = 1024;

// rows [begin, end) times one panel, in tiles of nearly equal height: calls take(first row, rows, sums) for each.
// A lone tile is bound by the memory and asks for what it needs next; of several, the last one fetches the next panel
// while it reads this one from the cache.
template <class T, class Take>
inline void rows_times_panel(Rows a, int begin, int end, const uint32_t* panel, int words, Take&& take) {
    alignas(64) float sums[kTileRows * kPanel];
    const int tiles = blocks_of(end - begin, kTileRows);
    for (int t = 0, first = begin; t < tiles; ++t) {
        const int count = blocks_of(end - first, tiles - t);
        const ptrdiff_t ahead = tiles == 1 ? kWordsAhead : t + 1 == tiles ? static_cast<ptrdiff_t>(words) * kPanel : 0;
        tile<T>(count, Rows{a.data + first * a.stride, a.stride}, panel, words, sums, kPanel, false, ahead);
        take(first, count, sums);
        first += count;
    }
}

// Views x [m, k] as rows of words. Rows of an odd number of bfloat16 are copied, with a zero behind the last element.
template <class T> inline Rows words_in(const T* x, int64_t stride, int m, int k, Scratch& scratch) {
    if (k % Word<T>::elements == 0 && stride % Word<T>::elements == 0)
        return Rows{reinterpret_cast<const uint32_t*>(x), stride / Word<T>::elements};
    const int words = words_of<T>(k);
    auto* copy = scratch.reserve<uint32_t>(static_cast<size_t>(m) * words);
    for (int r = 0; r < m; ++r) {
        copy[static_cast<int64_t>(r + 1) * words - 1] = 0;
        std::memcpy(copy + static_cast<int64_t>(r) * words, x + r * stride, sizeof(T) * static_cast<size_t>(k));
    }
    return Rows{copy, words};
}

}  // namespace srt
