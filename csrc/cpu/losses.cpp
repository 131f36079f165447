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
#include "cpu/linear.h"
#include "cpu/losses_blocks.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

using namespace blocks;

// What a chunk's logits may take, and its rows at least: fewer read the weight too often.
constexpr int64_t kChunkFloats = int64_t(8) << 20, kLeastRows = 64;

// What the threads share of one chunk of rows.
struct Shared {
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
    chunk_.split = on_matrix_units(spec_.rows, classes_, depth_);
    block_ = block_of(classes_, threads_, chunk_.split);
    blocks_ = divide_up(classes_, block_);
    make_room();
    double total = 0;
    for (int64_t first = 0; first < spec_.rows; first += chunk_rows_) {
      chunk_.start(first, least(chunk_rows_, spec_.rows - first));
      const T* const rows = input_ + first * spec_.input_row_stride;
      parallel(threads_, [&](int thread, int team) {
        pack(chunk_, rows, spec_.input_row_stride, true, call_.grads.weight != nullptr, thread, team);
      });
      if (call_.loss) {
        parallel(threads_, [&](int thread, int team) { sums(thread, team); });
        total += losses();
      } else {
        for (int64_t r = 0; r < chunk_.rows; ++r) shared_.lse[r] = call_.lse[first + r];
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
    chunk_rows_ = rows_of_chunk(spec_.rows, least(kMostRows, most < kLeastRows ? kLeastRows : most / kPanel * kPanel));
    const int64_t stride = stride_of(least(chunk_rows_, spec_.rows));

    chunk_.depth = depth_;
    chunk_.make_room(least(chunk_rows_, spec_.rows));
    shared_.logits = keeps_logits() ? scratch_floats(Slot::products, classes_ * stride) : nullptr;
    float* room = scratch_floats(Slot::rows, (blocks_ + 3 * threads_ + 5) * stride);
    shared_.tops = room, room += blocks_ * stride;
    shared_.top = room, room += threads_ * stride;
    shared_.sum = room, room += threads_ * stride;
    shared_.weighted = room, room += threads_ * stride;
    shared_.label = room, room += stride;
    shared_.lse = room, room += stride;
    shared_.by_softmax = room, room += stride;
    shared_.by_label = room, room += stride;
    shared_.by_class = room;
    // bfloat16: sums over chunks stay float until the last one.
    const bool half = sizeof(T) == 2;
    const int64_t weights = half && call_.grads.weight ? classes_ * depth_ : 0, biases = half && call_.grads.bias ? classes_ : 0;
    room = scratch_floats(Slot::gradient, (call_.grads.input ? 2 * threads_ * depth_ * stride : 0) + weights + biases);
    grad_weight_ = weights ? room : half ? nullptr : static_cast<float*>(call_.grads.weight);
    grad_bias_ = biases ? room + weights : half ? nullptr : static_cast<float*>(call_.grads.bias);
    shared_.grad_turned = room + weights + biases;
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

  // Room of one thread: a block's logits, its weights as floats, its weights transposed or their gradient.
  float* block_room(int64_t* weights, int64_t* turned) const {
    *weights = kBlock * chunk_.stride;
    *turned = *weights + (sizeof(T) == 2 ? kBlock * depth_ : 0);
    return scratch_floats(Slot::weight, *turned + room_of(depth_));
  }

  // Body(block, first class, number of classes, the block's logits) for a thread's blocks, in order.
  template <class Body>
  INTERFUSE_INLINE void each_block(int thread, int team, float* room, Body&& body) const {
    const Range mine = share(blocks_, thread, team);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t begin = b * block_;
      body(b, begin, least(block_, classes_ - begin), shared_.logits ? shared_.logits + begin * chunk_.stride : room);
    }
  }

  // The first pass: the logits, each row's largest, and the sum of exponentials.
  void sums(int thread, int team) {
    if (thread == 0) team_ = team;
    int64_t weights, turned;
    float* const room = block_room(&weights, &turned);
    const int64_t stride = chunk_.stride;
    float* const top = shared_.top + thread * stride;
    float* const sum = shared_.sum + thread * stride;
    float* const weighted = shared_.weighted + thread * stride;
    for (int64_t r = 0; r < stride; ++r) top[r] = kLowest, sum[r] = weighted[r] = 0;
    each_block(thread, team, room, [&](int64_t b, int64_t begin, int64_t count, float* z) {
      multiply_rows(chunk_, weight_rows(begin, count, room + weights), count, z);
      float biases[kBlock];
      for (int64_t j = 0; j < count; ++j) biases[j] = bias_ ? to_float(bias_[begin + j]) : 0.f;
      for (int64_t r = 0; r < chunk_.rows; ++r) {
        const int64_t at = call_.in.target[chunk_.first + r] - begin;
        if (at >= 0 && at < count) shared_.label[r] = z[at * stride + r] + biases[at];
      }
      if (spec_.label_smoothing > 0) add_weighted(z, biases, begin, count, weighted);
      along_rows(chunk_, [&](auto number, int64_t at) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(number)::value;
        sum_exponentials<kVectors>(z + at, stride, biases, count, top + at, sum + at, shared_.logits != nullptr);
      });
      for (int64_t at = 0; at < chunk_.vectors * kLanes; at += kLanes) store(shared_.tops + b * stride + at, load(top + at));
    });
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
      float top = shared_.top[r];
      for (int t = 1; t < team_; ++t) top = maximum(shared_.top[t * chunk_.stride + r], top);
      double sum = 0, weighted = 0;
      for (int t = 0; t < team_; ++t) {
        sum += static_cast<double>(shared_.sum[t * chunk_.stride + r]) * ::exp(static_cast<double>(shared_.top[t * chunk_.stride + r]) - top);
        weighted += shared_.weighted[t * chunk_.stride + r];
      }
      const double lse = ::log(sum) + top;
      shared_.lse[r] = static_cast<float>(lse);
      if (r >= chunk_.rows) continue;
      const int64_t at = chunk_.first + r, target = call_.in.target[at];
      if (call_.lse_out) call_.lse_out[at] = shared_.lse[r];
      double loss = 0;
      if (target != spec_.ignore_index) {
        loss = (1.0 - smoothing) * call_.class_weight(target) * (lse - shared_.label[r]);
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
      shared_.by_softmax[r] = shared_.by_label[r] = shared_.by_class[r] = 0;
      if (r >= chunk_.rows) {
        if (!call_.loss) shared_.lse[r] = 0;
        continue;
      }
      const int64_t at = chunk_.first + r, target = call_.in.target[at];
      if (target == spec_.ignore_index) continue;
      const float grad = call_.grad_loss ? call_.grad_loss[spec_.reduction == INTERFUSE_REDUCE_NONE ? at : 0] : 1.f;
      const float scale = grad / call_.denominator;
      shared_.by_label[r] = scale * (1.f - smoothing) * call_.class_weight(target);
      shared_.by_class[r] = scale * smoothing / static_cast<float>(classes_);
      shared_.by_softmax[r] = shared_.by_label[r] + shared_.by_class[r] * call_.weights;
    }
    parallel(threads_, [&](int thread, int team) { block_gradients(thread, team); });
    if (!call_.grads.input) return;
    T* const to = static_cast<T*>(call_.grads.input) + chunk_.first * depth_;
    parallel(threads_, [&](int thread, int team) { add_up_inputs(chunk_, shared_.grad_turned, team_, to, thread, team); });
  }

  // The second pass: the gradient of a block's logits, and what it gives.
  void block_gradients(int thread, int team) {
    if (thread == 0) team_ = team;
    int64_t weights, turned;
    float* const room = block_room(&weights, &turned);
    const int64_t stride = chunk_.stride, rows = chunk_.rows;
    const auto part = [&](int number) { return shared_.grad_turned + number * depth_ * stride; };
    InputGradient inputs(chunk_, call_.grads.input ? part(thread) : nullptr, call_.grads.input ? part(threads_ + thread) : nullptr);
    each_block(thread, team, room, [&](int64_t b, int64_t begin, int64_t count, float* z) {
      const float* const weight = weight_rows(begin, count, room + weights);
      if (!shared_.logits) multiply_rows(chunk_, weight, count, z);
      for (int64_t at = 0; at < chunk_.vectors * kLanes; at += kLanes) logit_gradients(b, begin, count, z + at, at);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = call_.in.target[chunk_.first + r] - begin;
        if (at >= 0 && at < count) z[at * stride + r] -= shared_.by_label[r];
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
      const bool split = fits_matrix_units(chunk_, count, z);
      if (grad_weight_)
        weight_gradient(chunk_, split, count, z, room + turned, grad_weight_ + begin * depth_, chunk_.first > 0);
      if (call_.grads.input) inputs.add(split, weight, count, z, room + turned);
    });
    inputs.close();
  }

  // In place of one vector of rows of a block's logits, or of their exponentials. (The labels' part comes after.)
  void logit_gradients(int64_t block, int64_t begin, int64_t count, float* z, int64_t at) const {
    const Vec scale = load(shared_.by_softmax + at), lse = load(shared_.lse + at), by_class = load(shared_.by_class + at);
    const int64_t stride = chunk_.stride;
    if (shared_.logits) {
      const Vec factor = exp_in_range(load(shared_.tops + block * stride + at) - lse) * scale;
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
  Shared shared_{};
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
