// The weights in the order in which the tiles read them. Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// The order of the reduction: blocks of `channel_block` channels, in each the kernel's taps, in each the channels.
// Planar input takes single channels (the weights' own order), interleaved input a cache line of them at a time.
struct ReductionOrder {
  int64_t channels, taps, channel_block;
  bool taps_outside = false;  // in the weight a filter lies [tap][channel], else [channel][tap]
  int64_t depth() const { return channels * taps; }
  int64_t place(int64_t c, int64_t tap) const {
    const int64_t begin = c / channel_block * channel_block;
    const int64_t block = channels - begin < channel_block ? channels - begin : channel_block;
    return begin * taps + tap * block + (c - begin);
  }
};

// rows `first` .. of the weight (as many as `channels` says, at most vectors * kLanes) become
// packed[place][lane]; lanes without a row are zero.
template <class T>
void pack_panel(const ReductionOrder& order, const T* weight, int vectors, int64_t channels, float* packed) {
  const int lanes = vectors * kLanes;
  const int64_t depth = order.depth();
  for (int v = 0; v < vectors; ++v) {
    const int64_t rows = channels - v * kLanes < kLanes ? channels - v * kLanes : kLanes;
    const T* from = weight + v * kLanes * depth;
    int64_t c = 0, tap = 0;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int count = static_cast<int>(depth - k < kLanes ? depth - k : kLanes);
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (j >= rows)
          block[j] = zero();
        else
          block[j] = count == kLanes ? load(from + j * depth + k) : load_first(from + j * depth + k, count);
      }
      transpose(block);
      for (int j = 0; j < count; ++j) {
        store(packed + order.place(c, tap) * lanes + v * kLanes, block[j]);
        if (order.taps_outside) {
          if (++c == order.channels) c = 0, ++tap;
        } else if (++tap == order.taps) {
          tap = 0, ++c;
        }
      }
    }
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
