// Paged attention: norm, rotate and store new keys and values; then causal, optionally windowed attention with a head gate.
//
// Keys are taken in blocks of 64 that start at absolute positions 0, 64, 128, ..., one after the other, for prefill chunks
// and for single decode rows alike. A block whose keys are all masked for a query changes nothing of its state, bit for
// bit, so the output of a query depends on its own keys only: not on the chunk it came in, the page size or the batch.
//
// KV memory holds numbers of the computation's type, or e4m3 codes of numbers divided by a scale. Codes are decoded as
// they are read; the scale of keys joins that of the scores, the scale of values the head's gate.
#include "api.h"
#include "codes.h"
#include "gemm.h"
#include "norm.h"

namespace srt {

namespace {

constexpr int kKeys = 64;        // keys of a block: two panels
constexpr int kBlockRows = 96;   // (query, head) rows of a task
constexpr float kNone = -1e30f;  // the maximum before any key was seen; finite, so that differences stay numbers
constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kElementsWorthATeam = 32 * 1024;

// ------------------------------------------------------------------------------------------------------------- store

struct Heads {
    int query, kv, dim;
};

// Rotates the first `rotary` elements of x in place; dim j pairs with j + rotary / 2. `angles` is cos | sin.
inline void rotate(float* x, const float* angles, int rotary) {
    const int half = rotary / 2;
    for (int j = 0; j < half; j += kLanes) {
        const int left = half - j;
        const vf cosine = vload_n(angles + j, left), sine = vload_n(angles + half + j, left);
        const vf a = vload_n(x + j, left), b = vload_n(x + half + j, left);
        vstore_n(x + j, vfma(a, cosine, vsub(vzero(), vmul(b, sine))), left);
        vstore_n(x + half + j, vfma(b, cosine, vmul(a, sine)), left);
    }
}

// Sixteen numbers as T would hold them.
inline vf as_held(const float*, vf x) { return x; }
inline vf as_held(const bf16*, vf x) {
    bf16 held[kLanes];
    vstore(held, x);
    return vload(held);
}

// A head's key or value to its place in memory.
template <class T, class From> inline void keep(const From* from, int dim, float, T* to) {
    for (int i = 0; i < dim; i += kLanes) vstore_n(to + i, vload_n(from + i, dim - i), dim - i);
}
template <class T, class From> inline void keep(const From* from, int dim, float scale, e4m3* to) {
    const vf divisor = vset(scale);
    const T* type = nullptr;
    for (int i = 0; i < dim; i += kLanes)
        e4m3_store_n(&to[i].bits, vdiv(as_held(type, vload_n(from + i, dim - i)), divisor), dim - i);
}

// S: what the memory holds; k_scale and v_scale count for codes only.
template <class T, class S>
void store(const T* qkv, int64_t stride, int tokens, Heads heads, int rotary, const T* q_norm, const T* k_norm,
           const float* rope, const int64_t* positions, const int64_t* slots, S* k, S* v, float k_scale, float v_scale, T* q,
           float eps) {
    const int dim = heads.dim, kv_width = heads.kv * dim, per_task = 8;
    const int64_t elements = static_cast<int64_t>(tokens) * (heads.query + 2 * heads.kv) * dim;
    each(blocks_of(tokens, per_task), elements < kElementsWorthATeam ? 1 : thread_count(), [&](int task) {
        thread_local Scratch scratch;
        float* head = scratch.reserve<float>(static_cast<size_t>(dim));
        const auto prepare = [&](const T* from, const T* weight, const float* angles) {
            normalise(from, weight, head, dim, eps);
            rotate(head, angles, rotary);
        };
        for (int t = task * per_task; t < at_most(tokens, (task + 1) * per_task); ++t) {
            const T* from = qkv + t * stride;
            const float* angles = rope + positions[t] * rotary;
            T* to = q + static_cast<int64_t>(t) * heads.query * dim;
            for (int h = 0; h < heads.query; ++h, from += dim, to += dim) {
                prepare(from, q_norm, angles);
                keep<T>(head, dim, 1.0f, to);
            }
            S *key = k + slots[t] * kv_width, *value = v + slots[t] * kv_width;
            for (int h = 0; h < heads.kv; ++h, from += dim, key += dim) {
                prepare(from, k_norm, angles);
                keep<T>(head, dim, k_scale, key);
            }
            for (int h = 0; h < heads.kv; ++h, from += dim, value += dim) keep<T>(from, dim, v_scale, value);
        }
    });
}

// ------------------------------------------------------------------------------------------------ a block of keys

#if SRT_AVX512
// Sixteen rows of sixteen words become sixteen columns.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#endif

// Sixteen keys as columns [words][32] (the panel's left or right half).
template <class T> inline void pack_keys(const T* const* rows, int words, uint32_t* panel) {
#if SRT_AVX512
    for (int w = 0; w < words; w += 16) {
        const __mmask16 here = vmask(words - w);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            r[i] = rows[i] == nullptr ? _mm512_setzero_si512()
                                      : _mm512_maskz_loadu_epi32(here, reinterpret_cast<const uint32_t*>(rows[i]) + w);
        transpose(r);
        if (words - w >= 16) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (w + i) * kPanel, r[i]);
        } else {
            alignas(64) uint32_t block[16][16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_si512(block[i], r[i]);
            for (int i = 0; i < words - w; ++i) std::memcpy(panel + (w + i) * kPanel, block[i], sizeof block[i]);
        }
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int w = 0; w < words; ++w)
            panel[w * kPanel + i] = rows[i] == nullptr ? 0 : reinterpret_cast<const uint32_t*>(rows[i])[w];
#endif
}

// Values as panels of 32 dims: [panels][words of keys][32]; dims past the head are zero.
inline void pack_values(const float* const* rows, int keys, int dim, uint32_t* panels) {
    for (int c = 0; c < dim; c += kLanes) {
        uint32_t* out = panels + (c / kPanel) * kKeys * kPanel + c % kPanel;
        for (int j = 0; j < keys; ++j, out += kPanel) {
            const vf x = rows[j] == nullptr ? vzero() : vload_n(rows[j] + c, dim - c);
            vstore(reinterpret_cast<float*>(out), x);
        }
    }
}
inline void pack_values(const bf16* const* rows, int keys, int dim, uint32_t* panels) {
    constexpr int kPairs = kKeys / 2;
    for (int c = 0; c < dim; c += kLanes) {
        uint32_t* out = panels + (c / kPanel) * kPairs * kPanel + c % kPanel;
        const int left = at_most(dim - c, kLanes);
        for (int j = 0; j < keys; j += 2, out += kPanel) {
            const bf16* second = j + 1 < keys ? rows[j + 1] : nullptr;
#if SRT_AVX512
            const __mmask16 here = vmask(left);
            const __m256i none = _mm256_setzero_si256();
            const __m256i low = rows[j] == nullptr ? none : _mm256_maskz_loadu_epi16(here, rows[j] + c);
            const __m256i high = second == nullptr ? none : _mm256_maskz_loadu_epi16(here, second + c);
            const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            _mm512_storeu_si512(out, pair);
#else
            for (int i = 0; i < kLanes; ++i) {
                const uint32_t low = rows[j] == nullptr || i >= left ? 0 : rows[j][c + i].bits;
                const uint32_t high = second == nullptr || i >= left ? 0 : second[c + i].bits;
                out[i] = low | high << 16;
            }
#endif
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ attend

template <class S> struct Pool {
    const S* k;
    const S* v;
    float k_scale, v_scale;
    const int32_t* tables;
    int64_t table_stride;
    int page_size;

    // Calls use(position, element) for positions [first, last): where a head's key and value begin in k and v.
    template <class Use> void locate(const int32_t* table, Heads heads, int head, int first, int last, Use&& use) const {
        const int64_t token = static_cast<int64_t>(heads.kv) * heads.dim;
        int page = first / page_size, offset = first % page_size;
        for (int j = first; j < last; ++page, offset = 0) {
            int64_t at = (static_cast<int64_t>(table[page]) * page_size + offset) * token + head * heads.dim;
            for (const int end = at_most(last, j + page_size - offset); j < end; ++j, at += token) use(j, at);
        }
    }

    // Asks the memory for the keys and values at positions [first, last) of a head.
    void prefetch(const int32_t* table, Heads heads, int head, int first, int last) const {
        locate(table, heads, head, first, last, [&](int, int64_t at) {
            for (int i = 0; i < heads.dim; i += 64 / static_cast<int>(sizeof(S))) {
                __builtin_prefetch(k + at + i);
                __builtin_prefetch(v + at + i);
            }
        });
    }
};

// The state of a task: (query, head) rows of one sequence and one kv head.
template <class T> struct Block {
    int rows, group, first_position, words, padded_dim;
    uint32_t* q;       // [rows][words]
    float* scores;     // [rows][64]
    T* shares;         // [rows][64] e^(score - max), what the values are weighed by
    float* sums;       // [rows][padded_dim] weighed values so far
    float* largest;    // [rows]
    float* totals;     // [rows][16] sums of shares so far, lane by lane
    uint32_t* keys;    // two panels
    uint32_t* values;  // padded_dim / 32 panels
    T* decoded;        // [2][64][padded_dim] keys and values that the memory holds as codes

    static constexpr int kKeyWords = kKeys / Word<T>::elements;
};

template <class T> Block<T> make_block(Scratch& scratch, int rows, int group, int first_position, int dim, bool codes) {
    Block<T> b{};
    b.rows = rows, b.group = group, b.first_position = first_position;
    b.words = words_of<T>(dim), b.padded_dim = blocks_of(dim, kPanel) * kPanel;
    const size_t n = static_cast<size_t>(rows), words = static_cast<size_t>(b.words), wide = static_cast<size_t>(b.padded_dim);
    const size_t decoded = codes ? 2 * kKeys * wide : 0;
    const size_t sizes[] = {n * kKeys, n * wide, n * kLanes, words * kKeys, Block<T>::kKeyWords * wide, n * kKeys, n * words, n, decoded};
    size_t total = 0;
    for (const size_t size : sizes) total += (size + 15) / 16 * 16;
    float* at = scratch.reserve<float>(total);
    const auto take = [&](int i) {
        float* begin = at;
        at += (sizes[i] + 15) / 16 * 16;
        return begin;
    };
    b.scores = take(0), b.sums = take(1), b.totals = take(2);
    b.keys = reinterpret_cast<uint32_t*>(take(3)), b.values = reinterpret_cast<uint32_t*>(take(4));
    b.shares = reinterpret_cast<T*>(take(5)), b.q = reinterpret_cast<uint32_t*>(take(6)), b.largest = take(7);
    b.decoded = reinterpret_cast<T*>(take(8));
    std::memset(b.sums, 0, n * wide * sizeof(float));
    std::memset(b.totals, 0, n * kLanes * sizeof(float));
    for (int r = 0; r < rows; ++r) b.largest[r] = kNone;
    return b;
}

// Scores of row r against the block's keys [first, last) become shares; what the row has summed so far is scaled to the
// new maximum. Keys outside get a share of exactly 0. `scale` has log2(e) in it.
template <class T> inline void weigh(Block<T>& b, int r, int first, int last, float scale) {
    constexpr int kVectors = kKeys / kLanes;
    const float* scores = b.scores + r * kKeys;
    T* shares = b.shares + r * kKeys;
    if (first >= last) {
        std::memset(shares, 0, sizeof(T) * kKeys);
        return;
    }
    vf x[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) x[i] = vload(scores + i * kLanes);
    if (first > 0 || last < kKeys) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) x[i] = vkeep(x[i], first - i * kLanes, last - i * kLanes, -INFINITY);
    }
    const float peak = vlargest(vmax(vmax(x[0], x[1]), vmax(x[2], x[3])));
    const float before = b.largest[r], now = peak > before ? peak : before;
    vf total = vload(b.totals + r * kLanes);
    if (now != before) {
        const vf shrink = vexp2_shares(vset((before - now) * scale));
        total = vmul(total, shrink);
        float* sums = b.sums + static_cast<int64_t>(r) * b.padded_dim;
        for (int i = 0; i < b.padded_dim; i += kLanes) vstore(sums + i, vmul(vload(sums + i), shrink));
        b.largest[r] = now;
    }
    const vf factor = vset(scale), top = vset(-now * scale);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
        const vf share = vexp2_shares(vfma(x[i], factor, top));
        total = vadd(total, share);
        vstore(shares + i * kLanes, share);
    }
    vstore(b.totals + r * kLanes, total);
}

// A head's key or value as numbers; codes are decoded into `room`.
template <class T> inline const T* numbers(const T* held, int, T*) { return held; }
template <class T> inline const T* numbers(const e4m3* held, int dim, T* room) {
    for (int i = 0; i < dim; i += kLanes) {
        uint8_t codes[kLanes] = {};
        std::memcpy(codes, held + i, static_cast<size_t>(at_most(dim - i, kLanes)));
        vstore(room + i, e4m3_lanes(codes));
    }
    return room;
}

// Adds the keys [first, last) of the block that starts at `start` to every row.
template <class T, class S>
void add_keys(Block<T>& b, const Pool<S>& pool, const int32_t* table, Heads heads, int head, int start, int first, int last,
              int window, float scale) {
    const T *keys[kKeys] = {}, *values[kKeys] = {};
    pool.locate(table, heads, head, first, last, [&](int j, int64_t at) {
        T* room = b.decoded + static_cast<int64_t>(j - start) * 2 * b.padded_dim;
        keys[j - start] = numbers(pool.k + at, heads.dim, room);
        values[j - start] = numbers(pool.v + at, heads.dim, room + b.padded_dim);
    });
    const int count = last - start, panels = blocks_of(count, kPanel);
    for (int j = 0; j < panels * kPanel; j += 16)
        pack_keys(keys + j, b.words, b.keys + (j / kPanel) * b.words * kPanel + j % kPanel);
    pack_values(values, count, heads.dim, b.values);
    const int tiles = blocks_of(b.rows, kTileRows), key_words = words_of<T>(count);
    for (int t = 0, row = 0; t < tiles; ++t) {
        const int height = blocks_of(b.rows - row, tiles - t);
        const Rows q{b.q + row * b.words, b.words};
        for (int p = 0; p < panels; ++p)
            tile<T>(height, q, b.keys + p * b.words * kPanel, b.words, b.scores + row * kKeys + p * kPanel, kKeys, false, 0);
        for (int r = row; r < row + height; ++r) {
            const int position = b.first_position + r / b.group;
            const int oldest = window > 0 ? at_least(first, position - window + 1) : first;
            weigh(b, r, oldest - start, at_most(last, position + 1) - start, scale);
        }
        const Rows shares{reinterpret_cast<const uint32_t*>(b.shares + row * kKeys), Block<T>::kKeyWords};
        for (int p = 0; p < b.padded_dim / kPanel; ++p)
            tile<T>(height, shares, b.values + p * Block<T>::kKeyWords * kPanel, key_words,
                    b.sums + static_cast<int64_t>(row) * b.padded_dim + p * kPanel, b.padded_dim, true, 0);
        row += height;
    }
}

struct Work {
    int row, first_query, queries, position;  // of the first query
};

template <class T, class S>
void attend_block(const Work& work, int head, const T* q, const T* gates, int64_t gates_stride, const Pool<S>& pool,
                  Heads heads, int window, float scale, T* out) {
    thread_local Scratch scratch;
    const int group = heads.query / heads.kv, dim = heads.dim;
    Block<T> b = make_block<T>(scratch, work.queries * group, group, work.position, dim, !std::is_same_v<S, T>);
    for (int r = 0; r < b.rows; ++r) {
        const int64_t from = static_cast<int64_t>(work.first_query + r / group) * heads.query + head * group + r % group;
        std::memcpy(b.q + static_cast<int64_t>(r) * b.words, q + from * dim, sizeof(T) * static_cast<size_t>(dim));
    }
    const int end = work.position + work.queries;
    const int begin = window > 0 ? at_least(0, work.position - window + 1) : 0;
    const int32_t* table = pool.tables + work.row * pool.table_stride;
    for (int start = begin / kKeys * kKeys; start < end; start += kKeys) {
        const int next = start + kKeys;
        if (next < end) pool.prefetch(table, heads, head, next, at_most(next + kKeys, end));
        add_keys(b, pool, table, heads, head, start, at_least(start, begin), at_most(next, end), window, scale);
    }
    for (int r = 0; r < b.rows; ++r) {
        const int64_t token = work.first_query + r / group;
        const int query_head = head * group + r % group;
        const vf gate = vsigmoid(vset(to_float(gates[token * gates_stride + query_head])));
        const vf factor = vmul(vdiv(gate, vset(vsum(vload(b.totals + r * kLanes)))), vset(pool.v_scale));
        const float* sums = b.sums + static_cast<int64_t>(r) * b.padded_dim;
        T* to = out + (token * heads.query + query_head) * dim;
        for (int i = 0; i < dim; i += kLanes) vstore_n(to + i, vmul(vload(sums + i), factor), dim - i);
    }
}

template <class T, class S>
void attend(const T* q, const T* gates, int64_t gates_stride, const Pool<S>& pool, const int32_t* query_starts,
            const int32_t* kv_lens, int rows, Heads heads, int window, float scale, T* out) {
    thread_local Scratch scratch;
    const int per_task = at_least(1, kBlockRows / (heads.query / heads.kv));
    int count = 0;
    for (int r = 0; r < rows; ++r) count += blocks_of(query_starts[r + 1] - query_starts[r], per_task);
    Work* list = scratch.reserve<Work>(static_cast<size_t>(count) + 1);
    int64_t keys = 0;
    for (int r = 0, i = 0; r < rows; ++r) {
        const int queries = query_starts[r + 1] - query_starts[r];
        // Last queries first: they see the most keys, and long tasks should not start late.
        for (int q0 = (blocks_of(queries, per_task) - 1) * per_task; q0 >= 0 && queries > 0; q0 -= per_task) {
            const int position = kv_lens[r] - queries + q0, here = at_most(per_task, queries - q0);
            list[i++] = Work{r, query_starts[r] + q0, here, position};
            keys += window > 0 ? at_most(position + here, window + here) : position + here;
        }
    }
    const int threads = keys * heads.kv * heads.dim < kElementsWorthATeam ? 1 : thread_count();
    each(count * heads.kv, threads, [&](int task) {
        attend_block(list[task / heads.kv], task % heads.kv, q, gates, gates_stride, pool, heads, window, scale * pool.k_scale * kLog2E, out);
    });
}

}  // namespace

}  // namespace srt

using namespace srt;

// Tensors of one call are of one dtype, except rope (float32), positions and slots (int64), and KV memory, which may hold
// e4m3 codes.
struct StoreCall {
    int32_t dtype, kv_dtype, q_heads, kv_heads, head_dim, rotary_dim;
    float eps;
    const void *q_norm, *k_norm;
    const float* rope;
    void *k, *v;
    const float *k_scale, *v_scale;
};

SRT_API void srt_store(const StoreCall* c, const void* qkv, int64_t stride, int tokens, const int64_t* positions,
                       const int64_t* slots, void* q) {
    with_type(c->dtype, qkv, [&](auto* from) {
        with_kv(c->kv_dtype, from, c->k, [&](auto* k) {
            store(from, stride, tokens, Heads{c->q_heads, c->kv_heads, c->head_dim}, c->rotary_dim, same_type(from, c->q_norm),
                  same_type(from, c->k_norm), c->rope, positions, slots, k, same_type(k, c->v), *c->k_scale, *c->v_scale,
                  same_type(from, q), c->eps);
        });
    });
}

struct AttendCall {
    int32_t dtype, kv_dtype, q_heads, kv_heads, head_dim, window;  // window 0: none
    float scale;
    int32_t page_size;
    void *k, *v;
    const float *k_scale, *v_scale;
};

struct AttendBatch {
    const int32_t* tables;
    int64_t table_stride;
    const int32_t *query_starts, *kv_lens;
    int32_t rows;
};

SRT_API void srt_attend(const AttendCall* c, const AttendBatch* b, const void* q, const void* gates, int64_t gates_stride,
                        void* out) {
    with_type(c->dtype, q, [&](auto* from) {
        with_kv(c->kv_dtype, from, c->k, [&](auto* k) {
            using S = std::remove_pointer_t<decltype(k)>;
            const bool codes = c->kv_dtype == kE4m3Codes;
            const Pool<S> pool{k,         same_type(k, c->v), codes ? *c->k_scale : 1.0f, codes ? *c->v_scale : 1.0f,
                               b->tables, b->table_stride,    c->page_size};
            attend(from, same_type(from, gates), gates_stride, pool, b->query_starts, b->kv_lens, b->rows,
                   Heads{c->q_heads, c->kv_heads, c->head_dim}, c->window, c->scale, same_type(from, out));
        });
    });
}
