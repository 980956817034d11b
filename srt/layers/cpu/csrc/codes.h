// The small number formats of coded weights and KV memory: e4m3 (one code a byte) and e2m1 (two).
//
// An e4m3 number, and the product of an e2m1 and an e4m3 number, are exact in bfloat16. So codes are decoded to bfloat16
// words (see simd.h), and to float32 from there, without rounding anything.
#pragma once

#include <array>
#include <cstddef>

#include "simd.h"

namespace srt {

constexpr float kE4m3Max = 448.0f;

// An e4m3 code as bfloat16 bits: the exponent's bias moves from 7 to 127; eight codes of each sign are subnormal.
constexpr uint16_t e4m3_bits(int code) {
    constexpr uint16_t kSubnormal[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // n * 2^-9
    const int magnitude = code & 0x7f;
    const int bits = magnitude == 0x7f ? 0x7fc0 : magnitude < 8 ? kSubnormal[magnitude] : (magnitude << 4) + (120 << 7);
    return static_cast<uint16_t>(bits | (code & 0x80) << 8);
}

constexpr std::array<uint16_t, 256> e4m3_table() {
    std::array<uint16_t, 256> table{};
    for (int code = 0; code < 256; ++code) table[static_cast<size_t>(code)] = e4m3_bits(code);
    return table;
}
inline constexpr std::array<uint16_t, 256> kE4m3 = e4m3_table();

// Sixteen 32-bit words of two bfloat16 each.
#if SRT_AVX512
using pairs = __m512i;

inline __m512i e4m3_to_bf16(__m256i codes) {
    const __m512i wide = _mm512_cvtepu8_epi16(codes), magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    const __m512i subnormal = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    bits = _mm512_mask_permutexvar_epi16(bits, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, subnormal);
    bits = _mm512_mask_mov_epi16(bits, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(bits, _mm512_slli_epi16(_mm512_xor_si512(wide, magnitude), 8));
}
// 32 e4m3 codes.
inline pairs e4m3_pairs(const uint8_t* codes) {
    return e4m3_to_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}
// Sixteen e4m3 codes.
inline vf e4m3_lanes(const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i half = _mm512_castsi512_si256(e4m3_to_bf16(_mm256_zextsi128_si256(bytes)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// Sixteen bytes of two e2m1 codes, the low four bits first, each times the scale of its lane.
inline pairs e2m1_pairs(const uint8_t* bytes, vf scale) {
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const vf low = vmul(_mm512_permutexvar_ps(wide, values), scale);
    const vf high = vmul(_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), values), scale);
    const __m512i upper = _mm512_and_si512(_mm512_castps_si512(high), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), upper);
}
// Words of T: for bfloat16 one vector; for float32 the two elements lie `next` words apart.
inline void put(const bf16*, uint32_t* to, pairs x, ptrdiff_t) { _mm512_storeu_si512(to, x); }
inline void put(const float*, uint32_t* to, pairs x, ptrdiff_t next) {
    _mm512_storeu_si512(to, _mm512_slli_epi32(x, 16));
    _mm512_storeu_si512(to + next, _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Sixteen numbers as e4m3 codes: nearest, ties to even, saturated at 448; NaN stays NaN.
inline void e4m3_store_n(uint8_t* to, vf x, int n) {
    const __m512i bits = _mm512_castps_si512(x), magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const vf size = vmin(vset(kE4m3Max), _mm512_castsi512_ps(magnitude));
    const __m512i kept = _mm512_castps_si512(size);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(kept, 20), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(kept, _mm512_set1_epi32(0x7ffff)), odd), 20);
    const __m512i normal = _mm512_sub_epi32(nearest, _mm512_set1_epi32(120 << 3));
    const __m512i subnormal = _mm512_cvtps_epi32(vmul(size, vset(512.0f)));  // in steps of 2^-9; 8 of them are the first normal
    __m512i code = _mm512_mask_mov_epi32(normal, _mm512_cmp_ps_mask(size, vset(0.015625f), _CMP_LT_OQ), subnormal);
    code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7f));
    code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80)));
    _mm_mask_storeu_epi8(to, vmask(n), _mm512_cvtepi32_epi8(code));
}

#else  // plain loops

struct pairs {
    uint32_t word[kLanes];
};

inline float from_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
inline uint32_t to_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return bits;
}
inline pairs e4m3_pairs(const uint8_t* codes) {
    pairs r;
    for (int i = 0; i < kLanes; ++i) r.word[i] = kE4m3[codes[2 * i]] | static_cast<uint32_t>(kE4m3[codes[2 * i + 1]]) << 16;
    return r;
}
inline vf e4m3_lanes(const uint8_t* codes) {
    vf r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = from_bits(static_cast<uint32_t>(kE4m3[codes[i]]) << 16);
    return r;
}
inline pairs e2m1_pairs(const uint8_t* bytes, vf scale) {
    static constexpr float kValues[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                          -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    pairs r;
    for (int i = 0; i < kLanes; ++i) {
        const float low = kValues[bytes[i] & 0xf] * scale.lane[i], high = kValues[bytes[i] >> 4] * scale.lane[i];
        r.word[i] = to_bits(low) >> 16 | (to_bits(high) & 0xffff0000u);
    }
    return r;
}
inline void put(const bf16*, uint32_t* to, pairs x, ptrdiff_t) { std::memcpy(to, x.word, sizeof x); }
inline void put(const float*, uint32_t* to, pairs x, ptrdiff_t next) {
    for (int i = 0; i < kLanes; ++i) to[i] = x.word[i] << 16, to[next + i] = x.word[i] & 0xffff0000u;
}
inline void e4m3_store_n(uint8_t* to, vf x, int n) {
    for (int i = 0; i < n && i < kLanes; ++i) {
        const uint32_t bits = to_bits(x.lane[i]);
        const float magnitude = from_bits(bits & 0x7fffffffu), size = magnitude > kE4m3Max ? kE4m3Max : magnitude;
        const uint32_t kept = to_bits(size);
        uint32_t code = ((kept + 0x7ffffu + (kept >> 20 & 1u)) >> 20) - (120u << 3);
        if (size < 0.015625f) code = static_cast<uint32_t>(std::nearbyintf(size * 512.0f));
        if (magnitude != magnitude) code = 0x7f;
        to[i] = static_cast<uint8_t>(code | (bits >> 24 & 0x80u));
    }
}

#endif

}  // namespace srt
