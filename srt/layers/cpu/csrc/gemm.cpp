#include "gemm.h"

namespace srt {

namespace {

template <class T, int MR>
void tile_of(Rows a, const uint32_t* panel, int words, float* sums, ptrdiff_t sums_stride, bool add, ptrdiff_t ahead) {
    using W = Word<T>;
    // Three rows hang on one pointer (at 0, 1 and 2 strides), so that twelve rows need four registers.
    const uint32_t* row[(MR + 2) / 3];
    vf sum[MR][2];
    const ptrdiff_t stride = a.stride;
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
        if (m % 3 == 0) row[m / 3] = a.data + m * stride;
        sum[m][0] = add ? vload(sums + m * sums_stride) : vzero();
        sum[m][1] = add ? vload(sums + m * sums_stride + kLanes) : vzero();
    }
    for (int k = 0; k < words; ++k) {
        const typename W::lanes left = W::load(panel), right = W::load(panel + kLanes);
        __builtin_prefetch(panel + ahead);
        __builtin_prefetch(panel + ahead + kLanes);
        panel += kPanel;
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
            const typename W::lanes value = W::broadcast(row[m / 3] + (m % 3) * stride);
            sum[m][0] = W::dot(sum[m][0], value, left);
            sum[m][1] = W::dot(sum[m][1], value, right);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (MR + 2) / 3; ++i) ++row[i];
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
        vstore(sums + m * sums_stride, sum[m][0]);
        vstore(sums + m * sums_stride + kLanes, sum[m][1]);
    }
}

template <class T> using TileOf = void (*)(Rows, const uint32_t*, int, float*, ptrdiff_t, bool, ptrdiff_t);

}  // namespace

template <class T>
void tile(int rows, Rows a, const uint32_t* panel, int words, float* sums, ptrdiff_t sums_stride, bool add, ptrdiff_t ahead) {
    static constexpr TileOf<T> kOf[kTileRows] = {tile_of<T, 1>, tile_of<T, 2>,  tile_of<T, 3>,  tile_of<T, 4>,
                                                 tile_of<T, 5>, tile_of<T, 6>,  tile_of<T, 7>,  tile_of<T, 8>,
                                                 tile_of<T, 9>, tile_of<T, 10>, tile_of<T, 11>, tile_of<T, 12>};
    kOf[rows - 1](a, panel, words, sums, sums_stride, add, ahead);
}

template void tile<float>(int, Rows, const uint32_t*, int, float*, ptrdiff_t, bool, ptrdiff_t);
template void tile<bf16>(int, Rows, const uint32_t*, int, float*, ptrdiff_t, bool, ptrdiff_t);

}  // namespace srt
