// A 64-bit hash of memory at nearly the speed of reading it, to notice that a weight was written to. Per-ISA; the
// value depends on the instruction set and is never stored beyond the process.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

typedef uint64_t HashVec __attribute__((vector_size(kLanes * 4)));
typedef uint64_t HashVecAnywhere __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

// Products of the lower halves of the 64-bit lanes.
INTERFUSE_INLINE HashVec multiply_low_halves(HashVec a, HashVec b) {
#if defined(__AVX512F__)
  return (HashVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (HashVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (HashVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

INTERFUSE_INLINE uint64_t hash_mix(uint64_t value) {  // the finaliser of splitmix64: every bit reaches every bit
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// As XXH3 accumulates: sum of low half times high half of (data xor key), plus the data itself so that a zero factor
// hides nothing. The key moves on with the position, so that exchanged pieces change the hash.
inline uint64_t hash_piece(const unsigned char* bytes, int64_t count) {
  constexpr int64_t width = static_cast<int64_t>(sizeof(HashVec)), lanes = width / 8;
  uint64_t start[2 * lanes];
  for (int64_t i = 0; i < 2 * lanes; ++i) start[i] = hash_mix(static_cast<uint64_t>(count + i + 1) * 0x9e3779b97f4a7c15u);
  HashVec sums[2] = {}, keys[2];
  memcpy(keys, start, sizeof keys);
  const auto take = [&](int j, const unsigned char* p) __attribute__((always_inline)) {
    const HashVec data = *reinterpret_cast<const HashVecAnywhere*>(p), mixed = data ^ keys[j];
    sums[j] += multiply_low_halves(mixed, mixed >> 32) + ((data << 32) | (data >> 32));
    keys[j] += 0x9e3779b97f4a7c15u;
  };
  int64_t at = 0;
  for (; at + 2 * width <= count; at += 2 * width) take(0, bytes + at), take(1, bytes + at + width);
  if (at < count) {
    unsigned char rest[2 * sizeof(HashVec)] = {};
    memcpy(rest, bytes + at, static_cast<size_t>(count - at));
    take(0, rest), take(1, rest + width);
  }
  uint64_t hash = static_cast<uint64_t>(count);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t j = 0; j < 2; ++j) hash = hash_mix(hash ^ sums[j][i]) + static_cast<uint64_t>(i);
  return hash;
}

// The hash of `count` bytes, read by up to `threads` threads where that pays; their number does not change it.
inline uint64_t content_hash(const void* data, int64_t count, int threads) {
  constexpr int64_t piece = int64_t(256) << 10, most = 1024;
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  const int64_t length = count <= piece * most ? piece : (count + most - 1) / most;
  const int64_t pieces = (count + length - 1) / length;
  uint64_t parts[most];
  const auto read = [&](int64_t i) { parts[i] = hash_piece(bytes + i * length, i + 1 < pieces ? length : count - i * length); };
  // Waking a team costs some microseconds, in which one thread reads about this much.
  if (pieces < 4) threads = 1;
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(pieces, thread, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) read(i);
  });
  uint64_t hash = static_cast<uint64_t>(count);
  for (int64_t i = 0; i < pieces; ++i) hash = hash_mix(hash ^ parts[i]) + static_cast<uint64_t>(i);
  return hash;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
