// One vector type for every instruction set: the compiler's vector extensions, as wide as the target's registers.
// Included by the files that are compiled once per ISA; everything lives in that ISA's namespace, so that no copy
// compiled for a newer machine can be linked in place of an older one's.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef INTERFUSE_ISA
#error "simd.h is for files that are compiled once per ISA (with -DINTERFUSE_ISA=name)"
#endif

#define INTERFUSE_INLINE inline __attribute__((always_inline))

namespace interfuse {
namespace INTERFUSE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecAnywhere __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));  // also the type of a comparison of two Vec

INTERFUSE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INTERFUSE_INLINE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
INTERFUSE_INLINE int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
INTERFUSE_INLINE int64_t round_up(int64_t count, int64_t unit) { return divide_up(count, unit) * unit; }

INTERFUSE_INLINE Vec zero() { return Vec{}; }
// Subtracting zero is the one arithmetic identity that holds for every float, so this folds to a broadcast.
INTERFUSE_INLINE Vec splat(float value) { return value - Vec{}; }
INTERFUSE_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
INTERFUSE_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecAnywhere*>(p) = v; }

// The first n lanes (0 <= n <= kLanes); no byte beyond them is touched, the other lanes are zero.
INTERFUSE_INLINE Vec load_first(const float* p, int n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
#else
  Vec v = zero();
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}
INTERFUSE_INLINE void store_first(float* p, Vec v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)v);
#else
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}

// The low bytes of the first n lanes (0 <= n <= kLanes).
INTERFUSE_INLINE void store_bytes(uint8_t* p, IVec v, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1u), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  if (n == kLanes) memcpy(p, &bytes, kLanes);
  else memcpy(p, &bytes, static_cast<size_t>(n));
#endif
}

// Written as a product and a sum: the build asks for contraction, so this is one fused instruction where there is one.
INTERFUSE_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }

INTERFUSE_INLINE Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }
// torch's maximum: a NaN on either side wins. (The machine's own max instruction drops one of the two.)
INTERFUSE_INLINE Vec maximum(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }
INTERFUSE_INLINE float maximum(float a, float b) { return (a > b || a != a) ? a : b; }

// The machine's own maximum: the first on a tie, and where one of the two is a NaN.
INTERFUSE_INLINE Vec larger(Vec first, Vec second) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_max_ps((__m512)first, 0xffff, (__m512)second, (__m512)first);  // GCC warns of the plain form
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)second, (__m256)first);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps((__m128)second, (__m128)first);
#else
  return select(second > first, second, first);
#endif
}

INTERFUSE_INLINE float sum_lanes(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// ---- bfloat16, held as its 16 bits ---------------------------------------------------------------------------

INTERFUSE_INLINE float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
// Round to nearest even; a NaN stays one (rounding up its payload could give infinity).
INTERFUSE_INLINE uint16_t to_bf16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  if (value != value) return static_cast<uint16_t>((wide >> 16) | 0x40);
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// Element access that a template over the storage type reads as float: float itself, or bfloat16 as uint16_t.
INTERFUSE_INLINE float to_float(float value) { return value; }
INTERFUSE_INLINE float to_float(uint16_t bits) { return from_bf16(bits); }
INTERFUSE_INLINE void put(float* p, float value) { *p = value; }
INTERFUSE_INLINE void put(uint16_t* p, float value) { *p = to_bf16(value); }

// One widening instruction, where GCC 12 makes four of a __builtin_convertvector: a product whose weight is bfloat16 would
// take longer over these than its memory does.
INTERFUSE_INLINE Vec load(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)((IVec)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif defined(__AVX2__)
  return (Vec)((IVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(kLanes * 4)));
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Wide) << 16);
#endif
}
INTERFUSE_INLINE Vec load_first(const uint16_t* p, int n) {
  uint16_t lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return load(lanes);
}

// What there is of kLanes numbers when `n` are left, perhaps none; the other lanes are zero.
template <class T>
INTERFUSE_INLINE Vec load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n > 0 ? static_cast<int>(n) : 0);
}

// Rounded to nearest even, in the lower halves of the lanes.
INTERFUSE_INLINE IVec bf16_bits(Vec v) {
  typedef uint32_t Wide __attribute__((vector_size(kLanes * 4)));
  Wide bits = (Wide)v;
  Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Wide quiet = (bits >> 16) | 0x40;
  return (v != v) ? (IVec)quiet : (IVec)rounded;
}
INTERFUSE_INLINE void store(uint16_t* p, Vec v) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  *reinterpret_cast<Half*>(p) = __builtin_convertvector(bf16_bits(v), Half);
}
INTERFUSE_INLINE void store_first(uint16_t* p, Vec v, int n) {
  uint16_t lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, static_cast<size_t>(n) * 2);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
