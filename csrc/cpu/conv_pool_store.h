// Rows of results on their way into dense tensors of either layout. Per-ISA (see common/simd.h).
#pragma once

#include "common/activation.h"
#include "common/conv_pool.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "cpu/conv_pool_geometry.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Pooling before activating is the same and cheaper where the activation never decreases.
INTERFUSE_INLINE bool monotone(const ConvPool& p) {
  if (p.activation == INTERFUSE_LEAKY_RELU) return p.slope > 0;
  return !p.needs_preactivation();
}
// The maximum over activated values needs both: the activated ones and, where it is saved, what they came from.
INTERFUSE_INLINE bool keeps_activated(const ConvPool& p) { return p.pool == INTERFUSE_POOL_MAX && !monotone(p); }

template <int Kind>
void activate_run_as(float slope, const float* from, float* to, int64_t count) {
  const Activation f{Kind, slope};
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, activate(f, load(from + i)));
}

// to[i] = activation(from[i]); both may be the same, and have room up to the next whole vector.
INTERFUSE_INLINE void activate_run(const ConvPool& p, const float* from, float* to, int64_t count) {
  using Run = void (*)(float, const float*, float*, int64_t);
  static constexpr Run kRuns[] = {activate_run_as<0>, activate_run_as<1>, activate_run_as<2>, activate_run_as<3>,
                                  activate_run_as<4>, activate_run_as<5>, activate_run_as<6>, activate_run_as<7>};
  kRuns[p.activation](p.slope, from, to, count);
}

INTERFUSE_INLINE void store_some(float* to, Vec v, int count) {
  count == kLanes ? store(to, v) : store_first(to, v, count);
}
INTERFUSE_INLINE void store_some(uint16_t* to, Vec v, int count) {
  count == kLanes ? store(to, v) : store_first(to, v, count);
}
// The index travels as integers in float lanes.
INTERFUSE_INLINE void store_some(uint8_t* to, Vec v, int count) { store_bytes(to, (IVec)v, count); }
INTERFUSE_INLINE void put_bits(float* to, float v) { *to = v; }
INTERFUSE_INLINE void put_bits(uint16_t* to, float v) { *to = to_bf16(v); }
INTERFUSE_INLINE void put_bits(uint8_t* to, float v) {
  int32_t integer;
  memcpy(&integer, &v, 4);
  *to = static_cast<uint8_t>(integer);
}

// Some output channels of one image: `vectors` vectors of them lie side by side in every pixel of the working
// memory, of which the first `channels` lanes are real.
struct Panel {
  int64_t image, first;
  int vectors, channels;
  int lanes() const { return vectors * kLanes; }
};

// row[pixel][lane] goes to pixels (d, h, w...) of a dense tensor of `size`.
template <class T>
void put_pixels(T* tensor, const ConvPool& p, const Triple& size, const Panel& panel, int64_t d, int64_t h, int64_t w,
                const float* row, int64_t pixels) {
  const int lanes = panel.lanes();
  T* to = tensor + dense_offset(p.channels_last, p.out_channels, size, panel.image, panel.first, d, h, w);
  if (p.channels_last) {
    for (int64_t i = 0; i < pixels; ++i, to += p.out_channels, row += lanes)
      for (int v = 0; v < panel.vectors; ++v)
        store_some(to + v * kLanes, load(row + v * kLanes),
                   static_cast<int>(least(kLanes, panel.channels - v * kLanes)));
    return;
  }
  const int64_t plane = size.volume();
  for (int v = 0; v < panel.vectors; ++v) {
    const int channels = static_cast<int>(least(kLanes, panel.channels - v * kLanes));
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const int count = static_cast<int>(least(kLanes, pixels - i));
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = j < count ? load(row + (i + j) * lanes + v * kLanes) : zero();
      transpose(block);
      T* at = to + v * kLanes * plane + i;
      if (count == kLanes && channels == kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store_some(at + j * plane, block[j], kLanes);
      } else {
        for (int j = 0; j < channels; ++j) store_some(at + j * plane, block[j], count);
      }
    }
  }
}

// row[pixel] of one channel; the row has room up to the next whole vector.
template <class T>
void put_channel(T* tensor, const ConvPool& p, const Triple& size, int64_t image, int64_t channel, int64_t d, int64_t h,
                 int64_t w, const float* row, int64_t pixels) {
  T* to = tensor + dense_offset(p.channels_last, p.out_channels, size, image, channel, d, h, w);
  if (p.channels_last) {
    for (int64_t i = 0; i < pixels; ++i) put_bits(to + i * p.out_channels, row[i]);
    return;
  }
  for (int64_t i = 0; i < pixels; i += kLanes)
    store_some(to + i, load(row + i), static_cast<int>(least(kLanes, pixels - i)));
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
