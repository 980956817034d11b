// A packed weight matrix in any of its codings, and rows times one panel of it.
//
// Coded panels hold 32 columns like plain ones (see gemm.h), two elements along K at a time: e4m3 [K / 2][32][2] codes,
// e2m1 [K / 2][32] bytes with the even element in the low four bits, and its group scales [K / 16][32] as e4m3 codes.
// What the codes stand for, but for the outer scales, is exact in both element types: 128 elements of K are decoded at a
// time into a piece that stays in the first-level cache, and multiplied like plain weights. Outer scales multiply sums:
// those of every 128 elements with e4m3, the whole sum with e2m1; the two halves of a panel, 16 columns each, have
// their own. The order of additions of an output is fixed, as with plain weights.
#pragma once

#include "codes.h"
#include "gemm.h"

namespace srt {

enum Coding : int32_t { kPlain = 0, kE4m3Blocks = 1, kE2m1Groups = 2 };

constexpr int kBlockElements = 128;  // of K that have one scale with e4m3; decoded at once with both codings
constexpr int kGroupElements = 16;   // of K that have one group scale with e2m1
constexpr int kCodedRows = 96;       // rows that share one decoding

struct Matrix {
    int32_t coding;
    int32_t elements;       // K
    const uint8_t* data;    // panels of words, or of codes
    const uint8_t* groups;  // e2m1: panels of group scales
    const float* scales;    // coded: [panels][scales along K][2], a factor for each half of a panel's columns

    template <class T> int64_t panel_bytes() const {
        const int64_t pairs_of_k = (elements + 1) / 2;
        if (coding == kPlain) return static_cast<int64_t>(words_of<T>(elements)) * kPanel * sizeof(uint32_t);
        return pairs_of_k * kPanel * (coding == kE4m3Blocks ? 2 : 1);
    }
    int64_t panel_groups() const { return coding == kE2m1Groups ? static_cast<int64_t>(elements / kGroupElements) * kPanel : 0; }
    int panel_scales() const { return coding == kE4m3Blocks ? 2 * blocks_of(elements, kBlockElements) : coding == kPlain ? 0 : 2; }

    // The matrix that begins `panels` panels further on.
    template <class T> Matrix after(int64_t panels) const {
        return Matrix{coding, elements, data + panels * panel_bytes<T>(), groups + panels * panel_groups(),
                      scales + panels * panel_scales()};
    }
};

// Elements [block * 128, + count) of a panel as words of T: [words][32].
template <class T> inline void decode(const Matrix& m, const uint8_t* codes, const uint8_t* groups, int block, int count, uint32_t* to) {
    constexpr int kPairs = kBlockElements / 2, kWordsOfPair = 2 / Word<T>::elements;
    const int pairs_here = (count + 1) / 2;
    const T* type = nullptr;
    if (m.coding == kE4m3Blocks) {
        codes += static_cast<int64_t>(block) * kPairs * kPanel * 2;
        for (int p = 0; p < pairs_here; ++p, codes += 2 * kPanel, to += kWordsOfPair * kPanel) {
            put(type, to, e4m3_pairs(codes), kPanel);
            put(type, to + kLanes, e4m3_pairs(codes + 2 * kLanes), kPanel);
        }
        return;
    }
    codes += static_cast<int64_t>(block) * kPairs * kPanel;
    groups += static_cast<int64_t>(block) * (kBlockElements / kGroupElements) * kPanel;
    for (int p = 0; p < pairs_here; p += kGroupElements / 2, groups += kPanel) {
        const vf left = e4m3_lanes(groups), right = e4m3_lanes(groups + kLanes);
        for (int i = 0; i < kGroupElements / 2; ++i, codes += kPanel, to += kWordsOfPair * kPanel) {
            put(type, to, e2m1_pairs(codes, left), kPanel);
            put(type, to + kLanes, e2m1_pairs(codes + kLanes, right), kPanel);
        }
    }
}

// totals[r][0 .. 32) += (or, with `first`, =) sums times the factor of their half.
inline void add_scaled(const float* sums, int rows, const float* factors, bool first, float* totals) {
    const vf left = vset(factors[0]), right = vset(factors[1]);
    for (int r = 0; r < rows; ++r, sums += kPanel, totals += kPanel) {
        vstore(totals, vfma(vload(sums), left, first ? vzero() : vload(totals)));
        vstore(totals + kLanes, vfma(vload(sums + kLanes), right, first ? vzero() : vload(totals + kLanes)));
    }
}

template <class T, class Take>
inline void rows_times_coded(Rows a, int begin, int end, const Matrix& m, int panel, Take&& take) {
    alignas(64) uint32_t decoded[kBlockElements / Word<T>::elements * kPanel];
    alignas(64) float sums[kCodedRows * kPanel], totals[kCodedRows * kPanel];
    const Matrix at = m.after<T>(panel);
    const int blocks = blocks_of(m.elements, kBlockElements);
    const bool sum_by_block = m.coding == kE4m3Blocks;
    for (int first = begin; first < end; first += kCodedRows) {
        const int rows = at_most(kCodedRows, end - first);
        for (int block = 0; block < blocks; ++block) {
            const int start = block * kBlockElements, count = at_most(kBlockElements, m.elements - start);
            const int words = words_of<T>(count);
            decode<T>(m, at.data, at.groups, block, count, decoded);
            for (int r = 0; r < rows; r += kTileRows) {
                const Rows from{a.data + (first + r) * a.stride + start / Word<T>::elements, a.stride};
                tile<T>(at_most(kTileRows, rows - r), from, decoded, words, sums + r * kPanel, kPanel, !sum_by_block && block > 0, 0);
            }
            if (sum_by_block) add_scaled(sums, rows, at.scales + 2 * block, block == 0, totals);
        }
        if (!sum_by_block) add_scaled(sums, rows, at.scales, true, totals);
        take(first, rows, totals);
    }
}

// Rows [begin, end) times one panel: calls take(first row, rows, sums) for some at a time.
template <class T, class Take>
inline void rows_times(Rows a, int begin, int end, const Matrix& m, int panel, Take&& take) {
    if (m.coding == kPlain) {
        const auto* words = reinterpret_cast<const uint32_t*>(m.data + panel * m.panel_bytes<T>());
        rows_times_panel<T>(a, begin, end, words, words_of<T>(m.elements), take);
    } else {
        rows_times_coded<T>(a, begin, end, m, panel, take);
    }
}

}  // namespace srt
