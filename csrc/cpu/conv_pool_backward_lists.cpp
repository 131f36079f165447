// conv_pool's gradients behind max pooling: lists of the nonzero ones, per tile of windows and output channel.
#include "common/transpose.h"
#include "cpu/conv_pool_backward_source.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Up to a vector of windows side by side.
struct Winners {
  IVec table;            // offset of each position of a window, in bytes; of the first kLanes positions
  const int32_t* all;    // of all positions
  bool in_table;
  int32_t step;          // from one window to the next, and the same lane by lane
  IVec lane;
};

// Appends what has a gradient among the first n windows to a list that has room for a whole vector; returns how many.
INTERFUSE_INLINE int32_t append(int32_t* offsets, float* values, const Winners& winners, int32_t first, IVec index,
                                Vec gradient, int n) {
#if defined(__AVX512F__)
  const __m512i from = (__m512i)index;
  const __mmask16 live =
      _mm512_mask_cmpneq_epi32_mask((__mmask16)((1u << n) - 1u), from, _mm512_set1_epi32(kNoGradient));
  // The masked forms: GCC 12 warns about the others' own undefined operand.
  const __m512i winner = winners.in_table
                             ? _mm512_maskz_permutexvar_epi32(live, from, (__m512i)winners.table)
                             : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, from, winners.all, 4);
  _mm512_storeu_si512(offsets, _mm512_maskz_compress_epi32(live, (__m512i)((IVec)winner + winners.lane + first)));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(live, (__m512)gradient));
  return __builtin_popcount(live);
#else
  int32_t count = 0;
  for (int i = 0; i < n; ++i, first += winners.step) {
    offsets[count] = first + winners.all[index[i]];
    values[count] = gradient[i];
    count += index[i] != kNoGradient;
  }
  return count;
#endif
}

struct Lister {
  const BackwardPlan& plan;
  const Strip& strip;
  const SparseLists& lists;
  int64_t begin[3], end[3];  // the strip's windows
  int32_t position[256] = {};
  Winners winners;

  Lister(const BackwardPlan& pl, const Strip& s, const SparseLists& l) : plan(pl), strip(s), lists(l) {
    for (int i = 0; i < 3; ++i) {
      begin[i] = i == plan.axis ? strip.begin : 0;
      end[i] = i == plan.axis ? strip.end : plan.count[i];
    }
    int at = 0;
    for (int64_t d = 0; d < plan.window[0]; ++d)
      for (int64_t h = 0; h < plan.window[1]; ++h)
        for (int64_t w = 0; w < plan.window[2]; ++w, ++at)
          position[at] = bytes(d * plan.stride[0] * strip.step[0] + h * plan.stride[1] * strip.step[1] +
                               w * plan.stride[2] * strip.step[2]);
    winners.step = bytes(plan.window_stride[2] * plan.stride[2] * strip.step[2]);
    for (int i = 0; i < kLanes; ++i) winners.table[i] = position[i], winners.lane[i] = i * winners.step;
    winners.all = position;
    winners.in_table = at <= kLanes;
  }
  static int32_t bytes(int64_t floats) { return static_cast<int32_t>(floats * static_cast<int64_t>(sizeof(float))); }

  // Where window (d, h, w) of the strip's image n starts: may lie before the buffer, its winners do not.
  int32_t origin(int64_t n, int64_t d, int64_t h, int64_t w) const {
    return bytes(n * strip.image_step + place(0, d) + place(1, h) + place(2, w));
  }
  int64_t place(int i, int64_t window) const {
    return ((window * plan.window_stride[i] - plan.window_pad[i]) * plan.stride[i] - strip.lo[i]) * strip.step[i];
  }
  // Calls body(image, d, h, first w, windows, tile) for every run of windows within one tile, a vector at most.
  template <class Body>
  INTERFUSE_INLINE void each_run(Body&& body) const {
    for (int64_t n = 0; n < strip.images; ++n)
      for (int64_t d = begin[0]; d < end[0]; ++d)
        for (int64_t h = begin[1]; h < end[1]; ++h) {
          int64_t tile =
              ((d - begin[0]) / plan.tile[0] * lists.tiles[1] + (h - begin[1]) / plan.tile[1]) * lists.tiles[2];
          for (int64_t w = begin[2]; w < end[2]; ++tile) {
            const int64_t stop = w + plan.tile[2] < end[2] ? w + plan.tile[2] : end[2];
            while (w < stop) {
              const int64_t run = stop - w < kLanes ? stop - w : kLanes;
              body(n, d, h, w, static_cast<int>(run), tile);
              w += run;
            }
          }
        }
  }
};

template <class T>
void list_planes(const Lister& l, int64_t first_channel) {
  const ConvPool& p = *l.plan.p;
  const SparseLists& lists = l.lists;
  const OutputGradient<T> gradient(l.plan);
  for (int64_t k = 0; k < lists.channels; ++k)
    l.each_run([&](int64_t n, int64_t d, int64_t h, int64_t w, int run, int64_t tile) {
      const int64_t at = p.at(p.out, l.strip.image + n, first_channel + k, d, h, w), list = tile * lists.channels + k;
      const int64_t to = list * lists.capacity + lists.counts[list];
      lists.counts[list] += append(lists.offsets + to, lists.values + to, l.winners, l.origin(n, d, h, w),
                                   load_index(l.plan.a->index + at, run), gradient(at, run), run);
    });
}

template <class T>
void list_pixels(const Lister& l, int64_t first_channel) {
  const ConvPool& p = *l.plan.p;
  const SparseLists& lists = l.lists;
  const OutputGradient<T> gradient(l.plan);
  l.each_run([&](int64_t n, int64_t d, int64_t h, int64_t w, int run, int64_t tile) {
    const int32_t origin = l.origin(n, d, h, w);
    for (int64_t k = 0; k < lists.channels; k += kLanes) {
      const int channels = static_cast<int>(lists.channels - k < kLanes ? lists.channels - k : kLanes);
      Vec values[kLanes], indices[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = p.at(p.out, l.strip.image + n, first_channel + k, d, h, w + (i < run ? i : 0));
        values[i] = gradient(at, channels);
        indices[i] = (Vec)load_index(l.plan.a->index + at, channels);
      }
      transpose(values);
      transpose(indices);
      int64_t list = tile * lists.channels + k;
      for (int i = 0; i < channels; ++i, ++list) {
        const int64_t to = list * lists.capacity + lists.counts[list];
        lists.counts[list] +=
            append(lists.offsets + to, lists.values + to, l.winners, origin, (IVec)indices[i], values[i], run);
      }
    }
  });
}

}  // namespace

void plan_lists(const BackwardPlan& plan, const Strip& strip, int64_t channels, SparseLists* lists) {
  int64_t windows = strip.images;
  lists->tile_count = 1;
  lists->channels = channels;
  for (int i = 0; i < 3; ++i) {
    const int64_t count = i == plan.axis ? strip.end - strip.begin : plan.count[i];
    lists->tiles[i] = (count + plan.tile[i] - 1) / plan.tile[i];
    lists->tile_count *= lists->tiles[i];
    windows *= plan.tile[i];
  }
  lists->capacity = windows + kLanes;
}

void list_gradients(const BackwardPlan& plan, const Strip& strip, int64_t first_channel, const SparseLists& lists) {
  const Lister lister(plan, strip, lists);
  memset(lists.counts, 0, static_cast<size_t>(lists.tile_count * lists.channels) * sizeof(int32_t));
  if (plan.p->dtype == INTERFUSE_FLOAT32)
    plan.p->channels_last ? list_pixels<float>(lister, first_channel) : list_planes<float>(lister, first_channel);
  else
    plan.p->channels_last ? list_pixels<uint16_t>(lister, first_channel) : list_planes<uint16_t>(lister, first_channel);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
