// Stores past the caches. A plain store to a line that no cache holds reads the line first and writes it back later; of a
// matrix that is larger than the caches, that is twice the traffic. Per-ISA (see simd.h).
#pragma once

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Matrices from here on are seldom in a cache when they are read next.
constexpr int64_t kStreamedBytes = int64_t(16) << 20;

// How many floats lie between p and the next address that store_past may be given.
INTERFUSE_INLINE int before_line(const float* p) {
  const uintptr_t over = reinterpret_cast<uintptr_t>(p) % sizeof(Vec);
  return over ? static_cast<int>((sizeof(Vec) - over) / sizeof(float)) : 0;
}

// p is aligned to a vector. A thread calls end_stores_past() before another may read what it stored.
INTERFUSE_INLINE void store_past(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
INTERFUSE_INLINE void end_stores_past() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
