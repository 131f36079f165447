// Gradients behind max pooling: one in (pool volume) is nonzero at most, and its position is known. Each nonzero value
// is multiplied with the patch of x around it (for the weights) or with its channel's weights (for x). A patch is a few
// rows of contiguous floats, (kernel width x channels) each, held in registers for one output channel.
//
// Zeros are skipped, so 0 * Inf and 0 * NaN, which dense arithmetic would turn into NaN, do not arise.
#include "cpu/conv_pool_backward.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kMostVectors = 6;  // of one row
constexpr int kMostRows = 9;
// What may stay in registers: room is left for the value, and for addresses the compiler may spill.
constexpr int kAccumulators = kRegisters == 32 ? 27 : 12;

struct List {
  const int32_t* offsets;
  const float* values;
  int64_t count;
};

typedef void (*WeightKernel)(List, const float*, const int64_t*, float*, const int64_t*);
typedef void (*InputKernel)(List, float*, const int64_t*, const float*, const int64_t*);

INTERFUSE_INLINE const float* bytes_on(const float* p, int64_t bytes) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(p) + bytes);
}
INTERFUSE_INLINE float* bytes_on(float* p, int64_t bytes) {
  return reinterpret_cast<float*>(reinterpret_cast<char*>(p) + bytes);
}

// Sums start at zero and are added at the end: shorter chains of rounding than one sum through the whole batch.
template <int R, int V>
void weight_kernel(List list, const float* x, const int64_t* rows, float* sums, const int64_t* sums_row) {
  Vec s[R][V] = {};
  int64_t row[R];  // a copy: the stores below could alias the caller's
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  for (int64_t i = 0; i < list.count; ++i) {
    const float* at = bytes_on(x, list.offsets[i]);
    const Vec g = splat(list.values[i]);
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r) {
      const float* from = bytes_on(at, row[r]);
#pragma GCC unroll 9
      for (int v = 0; v < V; ++v) s[r][v] = multiply_add(g, load(from + v * kLanes), s[r][v]);
    }
  }
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 9
    for (int v = 0; v < V; ++v) {
      float* to = sums + sums_row[r] + v * kLanes;
      store(to, load(to) + s[r][v]);
    }
}

template <int R, int V>
void input_kernel(List list, float* grad_x, const int64_t* rows, const float* weight, const int64_t* weight_row) {
  Vec w[R][V];
  int64_t row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 9
    for (int v = 0; v < V; ++v) w[r][v] = load(weight + weight_row[r] + v * kLanes);
  for (int64_t i = 0; i < list.count; ++i) {
    float* at = bytes_on(grad_x, list.offsets[i]);
    const Vec g = splat(list.values[i]);
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r) {
      float* to = bytes_on(at, row[r]);
#pragma GCC unroll 9
      for (int v = 0; v < V; ++v) store(to + v * kLanes, multiply_add(g, w[r][v], load(to + v * kLanes)));
    }
  }
}

struct Kernels {
  WeightKernel weight;
  InputKernel input;
};

template <int R, int V>
constexpr Kernels kernels() {
  if constexpr (R * V <= kAccumulators)
    return {weight_kernel<R, V>, input_kernel<R, V>};
  else
    return {nullptr, nullptr};
}

#define ROW_COUNTS(V)                                                                                     \
  {                                                                                                       \
    kernels<1, V>(), kernels<2, V>(), kernels<3, V>(), kernels<4, V>(), kernels<5, V>(), kernels<6, V>(), \
        kernels<7, V>(), kernels<8, V>(), kernels<9, V>()                                                 \
  }
constexpr Kernels kKernels[kMostVectors][kMostRows] = {ROW_COUNTS(1), ROW_COUNTS(2), ROW_COUNTS(3),
                                                       ROW_COUNTS(4), ROW_COUNTS(5), ROW_COUNTS(6)};
#undef ROW_COUNTS

int most_rows(int vectors) {
  int rows = kAccumulators / vectors;
  return rows < kMostRows ? rows : kMostRows;
}

// The rows of a patch that one kernel call takes.
struct Group {
  const Kernels* kernels;
  int64_t in_strip[kMostRows],
      in_taps[kMostRows];  // where the rows lie in the strip's buffers, in bytes, and in [tap][lane]
};

// Cuts the patch into groups of even size and calls body(group) for each.
template <class Body>
INTERFUSE_INLINE void for_each_group(const BackwardPlan& plan, const Strip& strip, Body&& body) {
  const bool joined = plan.dilation[2] == 1;  // the taps of a row lie side by side
  const int64_t width = joined ? plan.kernel[2] : 1;
  const int64_t vectors = width * plan.lanes / kLanes, rows = plan.taps / width;
  for (int64_t v = 0; v < vectors;) {
    const int64_t pieces = divide_up(vectors - v, kMostVectors);
    const int size = static_cast<int>(divide_up(vectors - v, pieces));
    for (int64_t r = 0; r < rows;) {
      const int64_t groups = (rows - r + most_rows(size) - 1) / most_rows(size);
      const int height = static_cast<int>(divide_up(rows - r, groups));
      Group group;
      group.kernels = &kKernels[size - 1][height - 1];
      for (int i = 0; i < height; ++i) {
        const int64_t tap = (r + i) * width, w = tap % plan.kernel[2], h = tap / plan.kernel[2] % plan.kernel[1];
        const int64_t d = tap / plan.kernel[2] / plan.kernel[1];
        const int64_t floats = d * plan.dilation[0] * strip.step[0] + h * plan.dilation[1] * strip.step[1] +
                               w * plan.dilation[2] * strip.step[2] + v * kLanes;
        group.in_strip[i] = floats * static_cast<int64_t>(sizeof(float));
        group.in_taps[i] = tap * plan.lanes + v * kLanes;
      }
      body(group);
      r += height;
    }
    v += size;
  }
}

// Calls body(list, group, channel) so that a tile and a group's rows are used by all channels one after the other.
template <class Body>
INTERFUSE_INLINE void for_each_list(const BackwardPlan& plan, const Strip& strip, const SparseLists& lists,
                                    Body&& body) {
  for (int64_t tile = 0; tile < lists.tile_count; ++tile)
    for_each_group(plan, strip, [&](const Group& group) {
      for (int64_t k = 0, list = tile * lists.channels; k < lists.channels; ++k, ++list)
        body(List{lists.offsets + list * lists.capacity, lists.values + list * lists.capacity, lists.counts[list]},
             group, k);
    });
}

}  // namespace

void sparse_weight_gradient(const BackwardPlan& plan, const Strip& strip, const SparseLists& lists, const float* x,
                            float* sums) {
  for_each_list(plan, strip, lists, [&](List list, const Group& group, int64_t k) {
    group.kernels->weight(list, x, group.in_strip, sums + k * plan.taps * plan.lanes, group.in_taps);
  });
}

void sparse_input_gradient(const BackwardPlan& plan, const Strip& strip, const SparseLists& lists, const float* weight,
                           float* grad_x) {
  for_each_list(plan, strip, lists, [&](List list, const Group& group, int64_t k) {
    group.kernels->input(list, grad_x, group.in_strip, weight + k * plan.taps * plan.lanes, group.in_taps);
  });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
