// The product of a step: a block's recurrent weights, kept on the chip, times what the step before left.
//
// The depth of a product runs over units (backwards: over a unit group's gates, then its units). Inside a group of 16
// their order is free as long as both factors agree, so the 16-bit types pair unit u with unit u + 8: these two are in
// one lane's hands after the product, and one word carries them to the next.
#pragma once

#include "cuda/device.h"
#include "cuda/rnn_team.h"

namespace interfuse {
namespace cuda {

template <class T>
INTERFUSE_DEVICE uint32_t word_of(T low, T high) {
  union {
    T halves[2];
    uint32_t word;
  } both;
  both.halves[0] = low;
  both.halves[1] = high;
  return both.word;
}

// How each arithmetic lays out a fragment of weights (16 rows) and a tile of the other factor (8 columns).
template <class T, Arithmetic kArithmetic>
struct Fragments {  // 16 bits: 16 deep
  using Element = T;
  static constexpr int kTilesOfGroup = 1;
  static constexpr bool kHeld = true;
  // Word j of a lane's part of a fragment; get(row, unit of the tile) is a weight.
  template <class Get>
  INTERFUSE_DEVICE static uint32_t weights(int lane, int j, const Get& get) {
    const int row = lane / 4 + 8 * (j & 1), unit = lane % 4 + 4 * (j >> 1);
    return word_of(get(row, unit), get(row, unit + 8));
  }
  INTERFUSE_DEVICE static void multiply_add(float* acc, const uint32_t* weights, const char*, const char* tile,
                                            int lane) {
    const uint32_t* p = reinterpret_cast<const uint32_t*>(tile) + 2 * lane;
    const uint32_t b[2] = {p[0], p[1]};
    multiply(T{}, acc, weights, b);
  }
  // Units u and u + 8 of a group, of one column; `tile` is the group's first, others follow at `stride`.
  INTERFUSE_DEVICE static void place(char* tile, int, int u, int column, float value, float value_8) {
    T low, high;
    put(&low, value);
    put(&high, value_8);
    reinterpret_cast<uint32_t*>(tile)[2 * (4 * column + u % 4) + u / 4] = word_of(low, high);
  }
};

template <>
struct Fragments<float, Arithmetic::tf32> {  // 8 deep
  using Element = float;
  static constexpr int kTilesOfGroup = 2;
  static constexpr bool kHeld = true;
  template <class Get>
  INTERFUSE_DEVICE static uint32_t weights(int lane, int j, const Get& get) {
    return tf32_bits(get(lane / 4 + 8 * (j & 1), lane % 4 + 4 * (j >> 1)));
  }
  INTERFUSE_DEVICE static void multiply_add(float* acc, const uint32_t* weights, const char*, const char* tile,
                                            int lane) {
    const uint32_t* p = reinterpret_cast<const uint32_t*>(tile) + lane % 4 * 8 + lane / 4;
    const uint32_t b[2] = {p[0], p[32]};
    multiply(float{}, acc, weights, b);
  }
  INTERFUSE_DEVICE static void place(char* tile, int stride, int u, int column, float value, float value_8) {
    reinterpret_cast<uint32_t*>(tile)[8 * u + column] = tf32_bits(value);
    reinterpret_cast<uint32_t*>(tile + stride)[8 * u + column] = tf32_bits(value_8);
  }
};

template <>
struct Fragments<float, Arithmetic::float32> {  // 8 deep, on the vector units: 4 deep of all rows, then the other 4
  using Element = float;
  static constexpr int kTilesOfGroup = 2;
  static constexpr bool kHeld = false;
  template <class Get>
  INTERFUSE_DEVICE static uint32_t weights(int lane, int j, const Get& get) {
    return bits_of(get(lane % 16, lane / 16 * 4 + j));
  }
  INTERFUSE_DEVICE static void multiply_add(float* acc, const uint32_t*, const char* fragment, const char* tile,
                                            int lane) {
    const float* b = reinterpret_cast<const float*>(tile) + 2 * (lane % 4);
    INTERFUSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float* a = reinterpret_cast<const float*>(fragment) + half * 64 + lane / 4 * 4;
      INTERFUSE_UNROLL
      for (int k = 0; k < 4; ++k, b += 8) {
        acc[0] += a[k] * b[0];
        acc[1] += a[k] * b[1];
        acc[2] += a[k + 32] * b[0];
        acc[3] += a[k + 32] * b[1];
      }
    }
  }
  INTERFUSE_DEVICE static void place(char* tile, int stride, int u, int column, float value, float value_8) {
    reinterpret_cast<float*>(tile)[8 * u + column] = value;
    reinterpret_cast<float*>(tile + stride)[8 * u + column] = value_8;
  }
};

// A team's weights in the order in which its warps read them: for each direction, block and warp its fragments, 16 bytes
// a lane. get(row tile, row, depth tile, unit of the tile) is an element, zero outside of the matrix, where rows are
// counted from the group's first unit.
template <class Kind, class T>
INTERFUSE_DEVICE void pack_weights(const RnnWalk& walk, const RnnTeam& team, bool backward, const T* w_hh, char* packed) {
  const int64_t fragments = int64_t(walk.directions) * team.fragments();
  const int64_t at = int64_t(blockIdx.x) * (32 * kWarps) + threadIdx.x, fragment = at / 32;
  if (fragment >= fragments) return;
  const int lane = static_cast<int>(at % 32), m = static_cast<int>(fragment % team.row_tiles);
  const int i = static_cast<int>(fragment / team.row_tiles % team.each);
  const int64_t warp = fragment / team.row_tiles / team.each;  // of all blocks and directions
  const int64_t group = warp / team.slices, groups = int64_t(team.blocks()) * team.groups, direction = group / groups;
  const int tile = static_cast<int>(warp % team.slices) * team.each + i;
  const int64_t hidden = walk.hidden, rows = group % groups * kGroup;
  constexpr int kHere = Kind::kTilesOfGroup;
  const int gate = backward ? tile / kHere % walk.gates : m;
  const int64_t units = int64_t(backward ? tile / kHere / walk.gates : tile / kHere) * kGroup + tile % kHere * (kGroup / kHere);
  const T* w = w_hh + (direction * walk.gates + gate) * hidden * hidden;
  const auto get = [&](int row, int unit) {
    const int64_t to = rows + row, from = units + unit;
    T value;
    if (tile < team.depth && to < hidden && from < hidden)
      value = backward ? w[from * hidden + to] : w[to * hidden + from];
    else
      put(&value, 0.f);
    return value;
  };
  uint32_t* out = reinterpret_cast<uint32_t*>(packed + fragment * kFragment) + 4 * lane;
  INTERFUSE_UNROLL
  for (int j = 0; j < 4; ++j) out[j] = Kind::weights(lane, j, get);
}

// One warp's part of the weights: kRowTiles times 16 rows, a slice of the depth.
template <class Kind, int kRowTiles, int kColumnTiles>
struct Weights {
  static constexpr int kHeld = Kind::kHeld ? held_fragments(kColumnTiles) / kRowTiles : 0;

  uint32_t held[kHeld ? kHeld : 1][kRowTiles][4];
  char* rest;          // what registers do not hold, in shared memory
  int first, count;    // of the depth
  int lane;

  INTERFUSE_DEVICE void begin(char* shared, const RnnTeam& team) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    first = warp % team.slices * team.each;
    count = team.depth - first < team.each ? team.depth - first : team.each;
    rest = shared + team.weights_at() + warp * kRowTiles * (team.each > kHeld ? team.each - kHeld : 0) * kFragment;
  }

  INTERFUSE_DEVICE void load(const char* packed, const RnnTeam& team, int64_t direction, int rank) {
    const int64_t warp = (direction * team.blocks() + rank) * team.warps() + static_cast<int>(threadIdx.x) / 32;
    const Words* from = reinterpret_cast<const Words*>(packed + warp * team.each * kRowTiles * kFragment) + lane;
    INTERFUSE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (i >= count) continue;
      INTERFUSE_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        const Words words = from[(i * kRowTiles + m) * 32];
        held[i][m][0] = words.x, held[i][m][1] = words.y, held[i][m][2] = words.z, held[i][m][3] = words.w;
      }
    }
    INTERFUSE_ROLLED
    for (int f = kHeld * kRowTiles; f < count * kRowTiles; ++f)
      reinterpret_cast<Words*>(rest)[(f - kHeld * kRowTiles) * 32 + lane] = from[f * 32];
  }

  // acc = weights * operand, of this slice; the lane's elements of the 16 by 8 tiles.
  INTERFUSE_DEVICE void product(const char* operand, float (&acc)[kRowTiles][kColumnTiles][4]) const {
    INTERFUSE_UNROLL
    for (int m = 0; m < kRowTiles; ++m)
      INTERFUSE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n)
        INTERFUSE_UNROLL
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
    const char* tiles = operand + first * kColumnTiles * kOperandTile;
    INTERFUSE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      if (i < count) add(acc, tiles, i, [&](int m) { return held[i][m]; });
    INTERFUSE_ROLLED
    for (int i = kHeld; i < count; ++i) {
      uint32_t a[kRowTiles][4];
      if (Kind::kHeld) {
        INTERFUSE_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          const Words words = *reinterpret_cast<const Words*>(fragment(m, i) + 16 * lane);
          a[m][0] = words.x, a[m][1] = words.y, a[m][2] = words.z, a[m][3] = words.w;
        }
      }
      add(acc, tiles, i, [&](int m) { return a[m]; });
    }
  }

 private:
  INTERFUSE_DEVICE char* fragment(int m, int i) const {
    return rest + ((i - kHeld) * kRowTiles + m) * kFragment;
  }
  template <class Words4>
  INTERFUSE_DEVICE void add(float (&acc)[kRowTiles][kColumnTiles][4], const char* tiles, int i,
                            const Words4& words) const {
    INTERFUSE_UNROLL
    for (int m = 0; m < kRowTiles; ++m)
      INTERFUSE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n)
        Kind::multiply_add(acc[m][n], words(m), Kind::kHeld ? nullptr : fragment(m, i),
                           tiles + (i * kColumnTiles + n) * kOperandTile, lane);
  }
};

}  // namespace cuda
}  // namespace interfuse
