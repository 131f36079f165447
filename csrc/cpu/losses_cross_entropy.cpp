// Cross-entropy of a linear layer: logits exist only for some rows at a time.
//
// The rows are cut into chunks. A chunk's logits are kept transposed, [class][row], so that a vector holds rows: the
// largest logit and the sum of the exponentials are then found lane by lane, and one layout serves all three products:
//
//   logits^T = W x^T,   grad_x^T = W^T P^T,   grad_W = P^T x,    P the gradient of the logits
//
// Each thread takes some of the classes, block by block. Where the gradients are computed with the loss, the first pass
// leaves exp(logit - the largest so far) in place of the logits, so that the second one needs one multiplication for
// each instead of another exponential. Where the loss was computed before, the second pass computes the logits again.
#include <math.h>

#include "common/losses.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "common/vector_math.h"
#include "cpu/linear.h"
#include "cpu/linear_product.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Whole tiles of rows for every instruction set; a block's logits stay in the second-level cache.
constexpr int64_t kBlock = 132;
constexpr int64_t kBlockStride = (kBlock + kLanes - 1) / kLanes * kLanes;
// Of the features, that one product takes: a panel of the chunk's rows then stays in the first-level cache.
constexpr int64_t kDepth = 128;
// What a chunk's logits may take, and its rows at least (fewer read the weight too often) and at most.
constexpr int64_t kChunkFloats = int64_t(8) << 20, kLeastRows = 64, kMostRows = 512;
constexpr int64_t kPanel = 4 * kLanes;

// Blocks of classes whose products with the weight are added up before they join the sum over all: one running sum over
// tens of thousands of classes would round several times as much as torch's products do.
constexpr int64_t kGroup = 4;

constexpr float kLowest = -3.4028235e38f;

INTERFUSE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INTERFUSE_INLINE int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

// exp(x) for x <= 0; a NaN stays. One instruction scales by any power of two where there is one.
INTERFUSE_INLINE Vec exp_below_zero(Vec x) {
#if defined(__AVX512F__)
  const Reduced x2 = reduced(at_least(x, -104.f));
  return scaled(multiply_add(multiply_add(x2.r, exp_rest(x2.r), splat(1.f)), x2.r, splat(1.f)), x2.n);
#else
  return exp(x);
#endif
}

// c (rows, vectors) = or += a b, a's rows dense; b's are b_row apart, or packed as panels of four vectors and the rest (0).
__attribute__((noinline)) void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* b,
                                        int64_t b_row, int64_t vectors, float* c, int64_t c_row, bool add) {
  wide_product(rows, depth, a, a_row, 1, b, b_row, b_row ? 1 : depth, vectors, c, c_row, add);
}

// Rows of a matrix as panels of four vectors and one of the rest, their lanes along what `at` walks:
// to[panel][i][vector][lane]. step(i, vector) is the vector.
template <class Read>
INTERFUSE_INLINE void pack_panels(int64_t count, int64_t vectors, float* to, Read&& read) {
  for (int64_t first = 0; first < vectors; first += 4) {
    const int64_t wide = smaller(4, vectors - first);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < wide; ++v, to += kLanes) store(to, read(i, first + v));
  }
}

// to(column, row) of from(row, column): kLanes rows from `row` on, of which `rows` exist, others as zeros; columns
// column to column + columns, a row of `to` being to_row floats.
template <class T>
INTERFUSE_INLINE void turn_rows(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int width = static_cast<int>(smaller(kLanes, columns - c));
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* at = from + i * from_row + c;
      block[i] = i >= rows ? zero() : width == kLanes ? load(at) : load_first(at, width);
    }
    transpose(block);
    for (int i = 0; i < width; ++i) store(to + (c + i) * to_row, block[i]);
  }
}

// One chunk of rows, and the memory that its threads share.
struct Chunk {
  int64_t first, rows, vectors, stride;  // stride: of the transposed logits, an odd number of vectors
  float *turned, *plain;                 // x as [block of features][panel of rows][feature], [panel of features][row]
  float* logits;                         // [class][stride], or null: each thread has a block
  float* tops;                           // [block of classes][stride]: the largest logits when it was exponentiated
  float *top, *sum, *weighted;           // [thread][stride]: largest, sum of exponentials, weighted sum of logits
  float* label;                          // [stride]: the labels' logits
  float* lse;                            // [stride]
  float *by_softmax, *by_label, *by_class;  // [stride]: dz = by_softmax p - by_label [j == label] - by_class w_j
  float* grad_turned;                    // [thread][feature][stride], and as much for each thread's sum over some blocks
};

template <class T>
class Kernel {
 public:
  explicit Kernel(const CrossEntropy& call)
      : call_(call),
        spec_(call.spec),
        input_(static_cast<const T*>(call.in.input)),
        weight_(static_cast<const T*>(call.in.weight)),
        bias_(static_cast<const T*>(call.in.bias)),
        depth_(spec_.features),
        classes_(spec_.classes) {}

  void run() {
    if (spec_.rows == 0) return no_rows();
    threads_ = worth_threads(spec_.rows * classes_ * depth_, call_.threads);
    // With few classes, smaller blocks for all threads to have some.
    block_ = smaller(kBlock, (classes_ + threads_ * 6 - 1) / (threads_ * 6) * 6);
    blocks_ = (classes_ + block_ - 1) / block_;
    make_room();
    double total = 0;
    for (int64_t first = 0; first < spec_.rows; first += chunk_rows_) {
      chunk_.first = first;
      chunk_.rows = smaller(chunk_rows_, spec_.rows - first);
      chunk_.vectors = vectors_of(chunk_.rows);
      chunk_.stride = (chunk_.vectors | 1) * kLanes;
      parallel(threads_, [&](int thread, int team) { pack_rows(thread, team); });
      if (call_.loss) {
        parallel(threads_, [&](int thread, int team) { sums(thread, team); });
        total += losses();
      } else {
        for (int64_t r = 0; r < chunk_.rows; ++r) chunk_.lse[r] = call_.lse[first + r];
      }
      if (call_.wants_gradients()) gradients();
    }
    if (call_.loss && spec_.reduction != INTERFUSE_REDUCE_NONE)
      *call_.loss = static_cast<float>(total / static_cast<double>(call_.denominator));
    if (call_.wants_gradients()) finish();
  }

 private:
  bool keeps_logits() const { return call_.loss && call_.wants_gradients(); }

  void make_room() {
    const int64_t most = keeps_logits() ? kChunkFloats / classes_ / kPanel * kPanel - kLanes : kMostRows;
    chunk_rows_ = smaller(kMostRows, most < kLeastRows ? kLeastRows : most / kPanel * kPanel);
    const int64_t chunks = (spec_.rows + chunk_rows_ - 1) / chunk_rows_;
    // As many rows in each: a last chunk of few would read the weight for little.
    chunk_rows_ = ((spec_.rows + chunks - 1) / chunks + kPanel - 1) / kPanel * kPanel;
    const int64_t stride = (vectors_of(smaller(chunk_rows_, spec_.rows)) | 1) * kLanes;
    const int64_t wide = vectors_of(depth_) * kLanes;

    float* room = scratch_floats(Slot::pack, depth_ * stride + stride * wide);
    chunk_.turned = room, chunk_.plain = room + depth_ * stride;
    chunk_.logits = keeps_logits() ? scratch_floats(Slot::products, classes_ * stride) : nullptr;
    room = scratch_floats(Slot::rows, (blocks_ + 3 * threads_ + 5) * stride);
    chunk_.tops = room, room += blocks_ * stride;
    chunk_.top = room, room += threads_ * stride;
    chunk_.sum = room, room += threads_ * stride;
    chunk_.weighted = room, room += threads_ * stride;
    chunk_.label = room, room += stride;
    chunk_.lse = room, room += stride;
    chunk_.by_softmax = room, room += stride;
    chunk_.by_label = room, room += stride;
    chunk_.by_class = room;
    // bfloat16: sums over chunks stay float until the last one.
    const bool half = sizeof(T) == 2;
    const int64_t weights = half && call_.grads.weight ? classes_ * depth_ : 0, biases = half && call_.grads.bias ? classes_ : 0;
    room = scratch_floats(Slot::gradient, (call_.grads.input ? 2 * threads_ * depth_ * stride : 0) + weights + biases);
    grad_weight_ = weights ? room : half ? nullptr : static_cast<float*>(call_.grads.weight);
    grad_bias_ = biases ? room + weights : half ? nullptr : static_cast<float*>(call_.grads.bias);
    chunk_.grad_turned = room + weights + biases;
  }

  void pack_rows(int thread, int team) {
    const Range mine = share((chunk_.vectors + 3) / 4, thread, team);
    const T* const rows = input_ + chunk_.first * spec_.input_row_stride;
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      const int64_t wide = smaller(4, chunk_.vectors - panel * 4);
      for (int64_t k = 0; k < depth_; k += kDepth) {
        const int64_t deep = smaller(kDepth, depth_ - k);
        float* const to = chunk_.turned + k * chunk_.vectors * kLanes + panel * deep * kPanel;
        for (int64_t v = 0; v < wide; ++v) {
          const int64_t row = (panel * 4 + v) * kLanes;
          turn_rows(rows + row * spec_.input_row_stride + k, spec_.input_row_stride, chunk_.rows - row, deep, to + v * kLanes,
                    wide * kLanes);
        }
      }
    }
    if (!call_.grads.weight) return;
    const int64_t vectors = vectors_of(depth_);
    const Range panels = share((vectors + 3) / 4, thread, team);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      pack_panels(chunk_.rows, smaller(4, vectors - panel * 4), chunk_.plain + panel * kPanel * chunk_.rows,
                  [&](int64_t r, int64_t v) __attribute__((always_inline)) {
                    const int64_t column = (panel * 4 + v) * kLanes;
                    const T* at = rows + r * spec_.input_row_stride + column;
                    return depth_ - column >= kLanes ? load(at) : load_first(at, static_cast<int>(depth_ - column));
                  });
  }

  // A block's rows of the weight as floats; bfloat16 is converted into `room`.
  const float* weight_rows(int64_t begin, int64_t count, float* room) const {
    if constexpr (sizeof(T) == 4) {
      return weight_ + begin * depth_;
    } else {
      convert_row(weight_ + begin * depth_, room, count * depth_);
      return room;
    }
  }

  void logits_of(const float* weight, int64_t count, float* to) const {
    for (int64_t k = 0; k < depth_; k += kDepth)
      multiply(count, smaller(kDepth, depth_ - k), weight + k, depth_, chunk_.turned + k * chunk_.vectors * kLanes, 0,
               chunk_.vectors, to, chunk_.stride, k > 0);
  }

  // Room of one thread: a block's logits, its weights as floats, its weights transposed or their gradient.
  float* block_room(int64_t* weights, int64_t* turned) const {
    *weights = kBlock * chunk_.stride;
    *turned = *weights + (sizeof(T) == 2 ? kBlock * depth_ : 0);
    return scratch_floats(Slot::weight, *turned + kBlockStride * (depth_ + kLanes));
  }

  // Body(block, first class, number of classes, the block's logits) for a thread's blocks, in order.
  template <class Body>
  INTERFUSE_INLINE void each_block(int thread, int team, float* room, Body&& body) const {
    const Range mine = share(blocks_, thread, team);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t begin = b * block_;
      body(b, begin, smaller(block_, classes_ - begin), chunk_.logits ? chunk_.logits + begin * chunk_.stride : room);
    }
  }

  // The first pass: the logits, each row's largest, and the sum of exponentials.
  void sums(int thread, int team) {
    if (thread == 0) team_ = team;
    int64_t weights, turned;
    float* const room = block_room(&weights, &turned);
    const int64_t stride = chunk_.stride;
    float* const top = chunk_.top + thread * stride;
    float* const sum = chunk_.sum + thread * stride;
    float* const weighted = chunk_.weighted + thread * stride;
    for (int64_t r = 0; r < stride; ++r) top[r] = kLowest, sum[r] = weighted[r] = 0;
    each_block(thread, team, room, [&](int64_t b, int64_t begin, int64_t count, float* z) {
      logits_of(weight_rows(begin, count, room + weights), count, z);
      float biases[kBlock];
      for (int64_t j = 0; j < count; ++j) biases[j] = bias_ ? to_float(bias_[begin + j]) : 0.f;
      for (int64_t r = 0; r < chunk_.rows; ++r) {
        const int64_t at = call_.in.target[chunk_.first + r] - begin;
        if (at >= 0 && at < count) chunk_.label[r] = z[at * stride + r] + biases[at];
      }
      if (spec_.label_smoothing > 0) add_weighted(z, biases, begin, count, weighted);
      const auto lanes = [&](auto number, int64_t at) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(number)::value;
        exponentiate<kVectors>(z + at, biases, count, top + at, sum + at, chunk_.tops + b * stride + at);
        return at + kVectors * kLanes;
      };
      int64_t at = 0;
      const int64_t end = chunk_.vectors * kLanes;
      while (at + kPanel <= end) at = lanes(Count<4>{}, at);
      while (at < end) at = lanes(Count<1>{}, at);
    });
  }

  // A block's logits, of a few vectors of rows: the largest, and exp(logit - largest) in their place where they are kept.
  template <int Vectors>
  void exponentiate(float* z, const float* biases, int64_t count, float* top, float* sum, float* tops) const {
    const int64_t stride = chunk_.stride;
    Vec most[Vectors], total[Vectors];
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { most[v] = load(top + v * kLanes); });
    for (int64_t j = 0; j < count; ++j)
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
        most[v] = maximum(load(z + j * stride + v * kLanes) + biases[j], most[v]);
      });
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
      total[v] = load(sum + v * kLanes) * exp_below_zero(load(top + v * kLanes) - most[v]);
      store(top + v * kLanes, most[v]);
      store(tops + v * kLanes, most[v]);
    });
    const bool keep = chunk_.logits != nullptr;
    for (int64_t j = 0; j < count; ++j)
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
        float* const at = z + j * stride + v * kLanes;
        const Vec e = exp_below_zero(load(at) + biases[j] - most[v]);
        total[v] = total[v] + e;
        if (keep) store(at, e);
      });
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { store(sum + v * kLanes, total[v]); });
  }

  void add_weighted(const float* z, const float* biases, int64_t begin, int64_t count, float* weighted) const {
    for (int64_t at = 0; at < chunk_.vectors * kLanes; at += kLanes) {
      Vec total = load(weighted + at);
      for (int64_t j = 0; j < count; ++j)
        total = multiply_add(load(z + j * chunk_.stride + at) + biases[j], splat(call_.class_weight(begin + j)), total);
      store(weighted + at, total);
    }
  }

  // What the threads found, together: each row's log of the sum of exponentials and loss. Returns the losses' sum.
  double losses() {
    const float smoothing = spec_.label_smoothing, share_of_all = smoothing / static_cast<float>(classes_);
    double total = 0;
    for (int64_t r = 0; r < chunk_.vectors * kLanes; ++r) {
      float top = chunk_.top[r];
      for (int t = 1; t < team_; ++t) top = maximum(chunk_.top[t * chunk_.stride + r], top);
      double sum = 0, weighted = 0;
      for (int t = 0; t < team_; ++t) {
        sum += static_cast<double>(chunk_.sum[t * chunk_.stride + r]) * ::exp(static_cast<double>(chunk_.top[t * chunk_.stride + r]) - top);
        weighted += chunk_.weighted[t * chunk_.stride + r];
      }
      const double lse = ::log(sum) + top;
      chunk_.lse[r] = static_cast<float>(lse);
      if (r >= chunk_.rows) continue;
      const int64_t at = chunk_.first + r, target = call_.in.target[at];
      if (call_.lse_out) call_.lse_out[at] = chunk_.lse[r];
      double loss = 0;
      if (target != spec_.ignore_index) {
        loss = (1.0 - smoothing) * call_.class_weight(target) * (lse - chunk_.label[r]);
        if (smoothing > 0) loss += share_of_all * (call_.weights * lse - weighted);
      }
      if (spec_.reduction == INTERFUSE_REDUCE_NONE) call_.loss[at] = static_cast<float>(loss);
      total += loss;
    }
    return total;
  }

  void gradients() {
    const int64_t stride = chunk_.stride;
    const float smoothing = spec_.label_smoothing;
    for (int64_t r = 0; r < stride; ++r) {
      chunk_.by_softmax[r] = chunk_.by_label[r] = chunk_.by_class[r] = 0;
      if (r >= chunk_.rows) {
        if (!call_.loss) chunk_.lse[r] = 0;
        continue;
      }
      const int64_t at = chunk_.first + r, target = call_.in.target[at];
      if (target == spec_.ignore_index) continue;
      const float grad = call_.grad_loss ? call_.grad_loss[spec_.reduction == INTERFUSE_REDUCE_NONE ? at : 0] : 1.f;
      const float scale = grad / call_.denominator;
      chunk_.by_label[r] = scale * (1.f - smoothing) * call_.class_weight(target);
      chunk_.by_class[r] = scale * smoothing / static_cast<float>(classes_);
      chunk_.by_softmax[r] = chunk_.by_label[r] + chunk_.by_class[r] * call_.weights;
    }
    parallel(threads_, [&](int thread, int team) { block_gradients(thread, team); });
    if (call_.grads.input) parallel(threads_, [&](int thread, int team) { add_up_inputs(thread, team); });
  }

  // The second pass: the gradient of a block's logits, and what it gives.
  void block_gradients(int thread, int team) {
    if (thread == 0) team_ = team;
    int64_t weights, turned;
    float* const room = block_room(&weights, &turned);
    const int64_t stride = chunk_.stride, rows = chunk_.rows;
    float* const sum = chunk_.grad_turned + thread * depth_ * stride;
    float* const group = chunk_.grad_turned + (threads_ + thread) * depth_ * stride;
    int64_t grouped = 0;
    if (call_.grads.input)
      for (int64_t i = 0; i < depth_ * stride; i += kLanes) store(sum + i, zero());
    const auto close_group = [&] {
      for (int64_t i = 0; i < depth_ * stride; i += kLanes) store(sum + i, load(sum + i) + load(group + i));
      grouped = 0;
    };
    each_block(thread, team, room, [&](int64_t b, int64_t begin, int64_t count, float* z) {
      const float* const weight = weight_rows(begin, count, room + weights);
      if (!chunk_.logits) logits_of(weight, count, z);
      for (int64_t at = 0; at < chunk_.vectors * kLanes; at += kLanes) logit_gradients(b, begin, count, z + at, at);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = call_.in.target[chunk_.first + r] - begin;
        if (at >= 0 && at < count) z[at * stride + r] -= chunk_.by_label[r];
      }
      if (grad_bias_)
        for (int64_t j = 0; j < count; ++j) {
          float sum = chunk_.first ? grad_bias_[begin + j] : 0.f;
          Vec parts = zero();
          int64_t r = 0;
          for (; r + kLanes <= rows; r += kLanes) parts = parts + load(z + j * stride + r);
          if (r < rows) parts = parts + load_first(z + j * stride + r, static_cast<int>(rows - r));
          grad_bias_[begin + j] = sum + sum_lanes(parts);
        }
      if (grad_weight_) add_weight_gradient(begin, count, z, room + turned);
      if (call_.grads.input) {
        for (int64_t j = 0; j < count; j += kLanes)
          turn_rows(weight + j * depth_, depth_, count - j, depth_, room + turned + j, kBlockStride);
        multiply(depth_, count, room + turned, kBlockStride, z, stride, chunk_.vectors, group, stride, grouped > 0);
        if (++grouped == kGroup) close_group();
      }
    });
    if (grouped) close_group();
  }

  // In place of one vector of rows of a block's logits, or of their exponentials. (The labels' part comes after.)
  void logit_gradients(int64_t block, int64_t begin, int64_t count, float* z, int64_t at) const {
    const Vec scale = load(chunk_.by_softmax + at), lse = load(chunk_.lse + at), by_class = load(chunk_.by_class + at);
    const int64_t stride = chunk_.stride;
    if (chunk_.logits) {
      const Vec factor = exp_below_zero(load(chunk_.tops + block * stride + at) - lse) * scale;
      for (int64_t j = 0; j < count; ++j) store(z + j * stride, load(z + j * stride) * factor);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const float bias = bias_ ? to_float(bias_[begin + j]) : 0.f;
        store(z + j * stride, exp(load(z + j * stride) + bias - lse) * scale);
      }
    }
    if (spec_.label_smoothing > 0)
      for (int64_t j = 0; j < count; ++j)
        store(z + j * stride, load(z + j * stride) - by_class * call_.class_weight(begin + j));
  }

  // Each chunk's sum is formed by itself before it is added: one running sum over thousands of rows would round several
  // times as much as torch's products do.
  void add_weight_gradient(int64_t begin, int64_t count, const float* z, float* sums) const {
    const int64_t vectors = vectors_of(depth_), wide = vectors * kLanes;
    multiply(count, chunk_.rows, z, chunk_.stride, chunk_.plain, 0, vectors, sums, wide, false);
    for (int64_t j = 0; j < count; ++j) {
      float* const to = grad_weight_ + (begin + j) * depth_;
      const float* const from = sums + j * wide;
      int64_t k = 0;
      if (chunk_.first == 0) {
        for (; k + kLanes <= depth_; k += kLanes) store(to + k, load(from + k));
        if (k < depth_) store_first(to + k, load(from + k), static_cast<int>(depth_ - k));
      } else {
        for (; k + kLanes <= depth_; k += kLanes) store(to + k, load(to + k) + load(from + k));
        const int left = static_cast<int>(depth_ - k);
        if (left) store_first(to + k, load_first(to + k, left) + load(from + k), left);
      }
    }
  }

  // The threads' parts of the inputs' gradient, added and turned back.
  void add_up_inputs(int thread, int team) const {
    const int64_t stride = chunk_.stride;
    const Range mine = share(chunk_.vectors, thread, team);
    T* const to = static_cast<T*>(call_.grads.input) + chunk_.first * depth_;
    for (int64_t v = mine.begin; v < mine.end; ++v)
      for (int64_t k = 0; k < depth_; k += kLanes) {
        const int width = static_cast<int>(smaller(kLanes, depth_ - k));
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          block[i] = zero();
          if (i < width)
            for (int t = 0; t < team_; ++t)
              block[i] = block[i] + load(chunk_.grad_turned + (t * depth_ + k + i) * stride + v * kLanes);
        }
        transpose(block);
        for (int i = 0; i < kLanes && v * kLanes + i < chunk_.rows; ++i)
          store_first(to + (v * kLanes + i) * depth_ + k, block[i], width);
      }
  }

  void no_rows() {
    const size_t size = sizeof(T), all = static_cast<size_t>(classes_ * depth_);
    if (call_.loss && spec_.reduction != INTERFUSE_REDUCE_NONE) *call_.loss = 0.f / call_.denominator;
    if (call_.grads.weight) memset(call_.grads.weight, 0, all * size);
    if (call_.grads.bias) memset(call_.grads.bias, 0, static_cast<size_t>(classes_) * size);
  }

  // What was summed in float goes where it belongs.
  void finish() {
    if constexpr (sizeof(T) == 2) {
      T* const weight = static_cast<T*>(call_.grads.weight);
      T* const bias = static_cast<T*>(call_.grads.bias);
      if (weight)
        parallel(threads_, [&](int thread, int team) {
          const Range mine = share(classes_ * depth_, thread, team);
          convert_row(grad_weight_ + mine.begin, weight + mine.begin, mine.end - mine.begin);
        });
      if (bias) convert_row(grad_bias_, bias, classes_);
    }
  }

  const CrossEntropy& call_;
  const interfuse_cross_entropy_spec& spec_;
  const T *input_, *weight_, *bias_;
  const int64_t depth_, classes_;
  int threads_ = 1, team_ = 1;
  int64_t block_ = 0, blocks_ = 0, chunk_rows_ = 0;
  float *grad_weight_ = nullptr, *grad_bias_ = nullptr;
  Chunk chunk_{};
};

void cross_entropy(const CrossEntropy& call) {
  if (call.spec.dtype == INTERFUSE_BFLOAT16)
    Kernel<uint16_t>(call).run();
  else
    Kernel<float>(call).run();
}

}  // namespace

extern const LossKernels loss_kernels = {cross_entropy};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
