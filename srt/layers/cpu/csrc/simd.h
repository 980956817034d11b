// Sixteen float32 lanes, and the two element types of the kernels.
//
// One algorithm, two spellings: AVX-512 intrinsics where the compiler targets them, plain loops over sixteen floats
// (which compilers turn into whatever the target has) elsewhere. Both spell the same order of operations, so within one
// build a result never depends on which kernel shape computed it. The build switches contraction off
// (-ffp-contract=off): a multiply-add is fused where it says `fma` and nowhere else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SRT_AVX512 1
#include <immintrin.h>
#else
#define SRT_AVX512 0
#endif

#if SRT_AVX512 && defined(__AVX512BF16__)
#define SRT_AVX512_BF16 1
#else
#define SRT_AVX512_BF16 0
#endif

namespace srt {

constexpr int kLanes = 16;

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 round_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// ---------------------------------------------------------------------------------------------------- sixteen floats

#if SRT_AVX512

using vf = __m512;

inline vf vzero() { return _mm512_setzero_ps(); }
inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline __mmask16 vmask(int n) { return static_cast<__mmask16>(n >= kLanes ? 0xffffu : (1u << n) - 1u); }
inline vf vload_n(const float* p, int n) { return _mm512_maskz_loadu_ps(vmask(n), p); }
inline void vstore_n(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, vmask(n), x); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// Where one of the two is NaN, both return b.
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
// Lane i of x where first <= i < last, `other` elsewhere.
inline vf vkeep(vf x, int first, int last, float other) {
    const auto inside = static_cast<__mmask16>(vmask(last > 0 ? last : 0) & ~vmask(first > 0 ? first : 0));
    return _mm512_mask_blend_ps(inside, _mm512_set1_ps(other), x);
}
inline vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vscale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }

inline vf vload(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline vf vload_n(const bf16* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(vmask(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m256i vround_bf16(vf x) {
#if SRT_AVX512_BF16
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void vstore(bf16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), vround_bf16(x)); }
inline void vstore_n(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, vmask(n), vround_bf16(x)); }

#else  // plain loops

struct vf {
    float lane[kLanes];
};

#define SRT_EACH for (int i = 0; i < kLanes; ++i)
inline vf vset(float x) { vf r; SRT_EACH r.lane[i] = x; return r; }
inline vf vzero() { return vset(0.0f); }
inline vf vload(const float* p) { vf r; SRT_EACH r.lane[i] = p[i]; return r; }
inline void vstore(float* p, vf x) { SRT_EACH p[i] = x.lane[i]; }
inline vf vload_n(const float* p, int n) { vf r; SRT_EACH r.lane[i] = i < n ? p[i] : 0.0f; return r; }
inline void vstore_n(float* p, vf x, int n) { for (int i = 0; i < n && i < kLanes; ++i) p[i] = x.lane[i]; }
inline vf vadd(vf a, vf b) { SRT_EACH a.lane[i] += b.lane[i]; return a; }
inline vf vsub(vf a, vf b) { SRT_EACH a.lane[i] -= b.lane[i]; return a; }
inline vf vmul(vf a, vf b) { SRT_EACH a.lane[i] *= b.lane[i]; return a; }
inline vf vdiv(vf a, vf b) { SRT_EACH a.lane[i] /= b.lane[i]; return a; }
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline vf vfma(vf a, vf b, vf c) { SRT_EACH c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); return c; }
#else
inline vf vfma(vf a, vf b, vf c) { SRT_EACH c.lane[i] += a.lane[i] * b.lane[i]; return c; }
#endif
inline vf vmax(vf a, vf b) { SRT_EACH a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
inline vf vmin(vf a, vf b) { SRT_EACH a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
inline vf vkeep(vf x, int first, int last, float other) {
    SRT_EACH x.lane[i] = (i >= first && i < last) ? x.lane[i] : other;
    return x;
}
inline vf vround(vf x) { SRT_EACH x.lane[i] = std::nearbyintf(x.lane[i]); return x; }
// x * 2^n for whole n in [-126, 127]; 128 gives infinity, less than -126 gives 0.
inline vf vscale2(vf x, vf n) {
    SRT_EACH {
        const int32_t exponent = n.lane[i] < -126.0f ? 0 : static_cast<int32_t>(n.lane[i]) + 127;
        const int32_t bits = exponent << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        x.lane[i] *= power;
    }
    return x;
}
inline vf vload(const bf16* p) { vf r; SRT_EACH r.lane[i] = to_float(p[i]); return r; }
inline vf vload_n(const bf16* p, int n) { vf r; SRT_EACH r.lane[i] = i < n ? to_float(p[i]) : 0.0f; return r; }
inline void vstore(bf16* p, vf x) { SRT_EACH p[i] = round_bf16(x.lane[i]); }
inline void vstore_n(bf16* p, vf x, int n) { for (int i = 0; i < n && i < kLanes; ++i) p[i] = round_bf16(x.lane[i]); }
#undef SRT_EACH

#endif

// Lanes folded in halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1. A fixed order, the same in every build.
inline float vsum(vf x) {
    float lane[kLanes];
    vstore(lane, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}
inline float vlargest(vf x) {
#if SRT_AVX512
    return _mm512_reduce_max_ps(x);
#else
    float best = x.lane[0];
    for (int i = 1; i < kLanes; ++i) best = x.lane[i] > best ? x.lane[i] : best;
    return best;
#endif
}

// e^x within 2 ulp on [-87, 88]; 0 below (minus infinity too), infinity from 88.8 on.
// Source: the classic reduction x = n ln 2 + r with a degree 5 polynomial (Cephes expf).
inline vf vexp(vf x) {
    const vf low = vset(-87.0f);
    const vf inside = vmin(vset(89.0f), vmax(low, x));  // in this order a NaN comes out
    const vf n = vround(vmul(inside, vset(1.44269504088896341f)));
    vf r = vfma(n, vset(-0.693359375f), inside);
    r = vfma(n, vset(2.12194440e-4f), r);
    vf p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(vmul(r, r), p, vadd(r, vset(1.0f)));
    const vf result = vscale2(p, n);
#if SRT_AVX512
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, low, _CMP_LT_OQ), result, _mm512_setzero_ps());
#else
    vf kept = result;
    for (int i = 0; i < kLanes; ++i) kept.lane[i] = x.lane[i] < -87.0f ? 0.0f : result.lane[i];
    return kept;
#endif
}

// 2^x within 3e-7 of itself for x <= 0, exactly 1 at 0 and exactly 0 below -160 (at minus infinity too): shares of a softmax.
inline vf vexp2_shares(vf x) {
    const vf inside = vmax(vset(-200.0f), x);  // in this order a NaN comes out
    const vf n = vround(inside), r = vsub(inside, n);
    vf p = vset(1.3264727313e-3f);
    p = vfma(p, r, vset(9.6715129912e-3f));
    p = vfma(p, r, vset(5.5507335812e-2f));
    p = vfma(p, r, vset(2.4022242427e-1f));
    p = vfma(p, r, vset(6.9314700365e-1f));
    p = vfma(p, r, vset(1.0f));
    return vscale2(p, n);
}

inline vf vsigmoid(vf x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }
inline vf vsilu(vf x) { return vdiv(x, vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }
// min(silu(gate), limit) * clamp(up, -limit, limit); without a limit silu(gate) * up. An infinite limit is no limit.
inline vf vgated(vf gate, vf up, float limit) {
    const vf bound = vset(limit);
    return vmul(vmin(bound, vsilu(gate)), vmax(vset(-limit), vmin(bound, up)));
}

// ------------------------------------------------------------------------------------------------------------- words
//
// The matrix kernels work on 32-bit words: one float32, or two consecutive bfloat16 of a row (k, k + 1).

template <class T> struct Word;

template <> struct Word<float> {
    static constexpr int elements = 1;
#if SRT_AVX512
    using lanes = __m512;
    static lanes load(const uint32_t* p) { return _mm512_loadu_ps(p); }
    static lanes broadcast(const uint32_t* p) { return _mm512_set1_ps(*reinterpret_cast<const float*>(p)); }
    static vf dot(vf sum, lanes a, lanes b) { return _mm512_fmadd_ps(a, b, sum); }
#else
    using lanes = vf;
    static lanes load(const uint32_t* p) { vf r; std::memcpy(&r, p, sizeof r); return r; }
    static lanes broadcast(const uint32_t* p) { float x; std::memcpy(&x, p, sizeof x); return vset(x); }
    static vf dot(vf sum, lanes a, lanes b) { return vfma(a, b, sum); }
#endif
};

template <> struct Word<bf16> {
    static constexpr int elements = 2;
#if SRT_AVX512_BF16
    using lanes = __m512i;
    static lanes load(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static lanes broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static vf dot(vf sum, lanes a, lanes b) { return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a); }
#elif SRT_AVX512
    using lanes = __m512i;
    static lanes load(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static lanes broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static vf even(lanes x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
    static vf odd(lanes x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))); }
    static vf dot(vf sum, lanes a, lanes b) { return vfma(odd(a), odd(b), vfma(even(a), even(b), sum)); }
#else
    struct lanes {
        uint32_t word[kLanes];
    };
    static lanes load(const uint32_t* p) { lanes r; std::memcpy(&r, p, sizeof r); return r; }
    static lanes broadcast(const uint32_t* p) { lanes r; for (uint32_t& w : r.word) w = *p; return r; }
    static vf part(const lanes& x, bool odd) {
        vf r;
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t bits = odd ? x.word[i] & 0xffff0000u : x.word[i] << 16;
            std::memcpy(&r.lane[i], &bits, sizeof bits);
        }
        return r;
    }
    static vf dot(vf sum, const lanes& a, const lanes& b) {
        return vfma(part(a, true), part(b, true), vfma(part(a, false), part(b, false), sum));
    }
#endif
};

}  // namespace srt
