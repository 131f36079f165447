// InfoNCE: each row of one matrix chooses its partner among all rows of another, and in the symmetric loss each of those
// among all rows of the first. The matrix of similarities is computed once, block by block (losses_blocks.h), and gives
// both directions' sums of exponentials; backward computes each block once more, or reads what forward kept.
//
// Where no similarity can be large (the rows' lengths say so), exponentials are summed as they are: one of them serves
// both directions. Otherwise each direction has its own, below its own largest similarity.
//
// Partners are kept apart from the others, beside whose sum they would round a small loss away: a row's loss is
// log(1 + others / own), and the gradient of its partner's similarity -(1 - exp(-loss)).
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

// exp(60) times the number of rows is far below what overflows, and exp(-60) far above what vanishes.
constexpr float kBounded = 60;
// torch.nn.functional.normalize divides by no less.
constexpr float kLeastLength = 1e-12f;

INTERFUSE_INLINE double dot(const float* a, const float* b, int64_t count) {
  Vec sum = zero();
  along_row(count, [&](auto&& read, auto&&) __attribute__((always_inline)) { sum = multiply_add(read(a), read(b), sum); });
  return sum_lanes(sum);
}

template <class T>
class Kernel {
 public:
  explicit Kernel(const InfoNce& call)
      : call_(call),
        spec_(call.spec),
        rows_(call.spec.rows),
        depth_(call.spec.features),
        scale_(1.f / call.spec.temperature),
        symmetric_(call.spec.symmetric != 0) {}

  void run() {
    if (rows_ == 0) return no_rows();
    threads_ = worth_threads(rows_ * rows_ * depth_, call_.threads);
    chunk_.split = on_matrix_units(rows_, rows_, depth_);
    block_ = block_of(rows_, threads_, chunk_.split);
    blocks_ = divide_up(rows_, block_);
    chunk_rows_ = rows_of_chunk(rows_, kMostRows);
    prepare();
    call_.loss ? forward() : backward();
  }

 private:
  // Both matrices as floats, divided by their rows' lengths and the first also by the temperature. Neither is copied
  // where that changes nothing.
  void prepare() {
    const bool changed = sizeof(T) == 2 || spec_.normalize;
    const bool copied[2] = {changed || scale_ != 1.f, changed};
    const int64_t wide = rows_ * depth_;
    float* room = scratch_floats(Slot::other, (copied[0] + copied[1]) * wide + 2 * rows_);
    lengths_[0] = room, lengths_[1] = room + rows_, room += 2 * rows_;
    float longest[2] = {};
    for (int side = 0; side < 2; ++side) {
      const T* const from = static_cast<const T*>(side ? call_.b : call_.a);
      float* const to = copied[side] ? room : nullptr;
      if (to) room += wide;
      if constexpr (sizeof(T) == 4) matrix_[side] = to ? to : from;
      else matrix_[side] = to;
      parallel(threads_, [&](int thread, int team) {
        const Range mine = share(rows_, thread, team);
        for (int64_t r = mine.begin; r < mine.end; ++r) {
          const T* const row = from + r * depth_;
          Vec sum = zero();
          along_row(depth_, [&](auto&& read, auto&&) __attribute__((always_inline)) { sum = multiply_add(read(row), read(row), sum); });
          lengths_[side][r] = __builtin_sqrtf(sum_lanes(sum));
          if (!to) continue;
          const float factor = (side ? 1.f : scale_) / divisor(side, r);
          along_row(depth_, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(to + r * depth_, read(row) * factor); });
        }
      });
      for (int64_t r = 0; r < rows_; ++r) longest[side] = maximum(lengths_[side][r], longest[side]);
    }
    const float largest = spec_.normalize ? scale_ : longest[0] * longest[1] * scale_;
    bounded_ = largest <= kBounded;  // not so for a NaN
  }

  float divisor(int side, int64_t row) const {
    const float length = lengths_[side][row];
    return !spec_.normalize ? 1.f : length < kLeastLength ? kLeastLength : length;
  }

  // What forward keeps of the matrix, one chunk after the other: exponentials where they are summed as they are.
  float* kept(int64_t begin) const { return call_.kept + kept_before_ + begin * chunk_.stride; }

  template <class Body>
  INTERFUSE_INLINE void each_block(int thread, int team, Body&& body) const {
    const Range mine = share(blocks_, thread, team);
    for (int64_t b = mine.begin; b < mine.end; ++b) body(b * block_, least(block_, rows_ - b * block_));
  }

  // step() for each chunk of rows, packed.
  template <class Step>
  void each_chunk(bool turned, bool plain, Step&& step) {
    chunk_.depth = depth_;
    chunk_.make_room(least(chunk_rows_, rows_));
    kept_before_ = 0;
    for (int64_t first = 0; first < rows_; first += chunk_rows_) {
      chunk_.start(first, least(chunk_rows_, rows_ - first));
      parallel(threads_, [&](int thread, int team) { pack(chunk_, matrix_[0] + first * depth_, depth_, turned, plain, thread, team); });
      step();
      kept_before_ += rows_ * chunk_.stride;
    }
  }

  void no_rows() {
    if (call_.loss && spec_.reduction != INTERFUSE_REDUCE_NONE)
      *call_.loss = spec_.reduction == INTERFUSE_REDUCE_MEAN ? __builtin_nanf("") : 0.f;
    if (call_.along) *call_.along = 0;
  }

  // ---- forward

  void forward() {
    const int64_t stride = stride_of(least(chunk_rows_, rows_));
    float* const room = scratch_floats(Slot::rows, 2 * threads_ * stride + 3 * rows_);
    top_ = room, sum_ = room + threads_ * stride;
    own_ = sum_ + threads_ * stride, column_top_ = own_ + rows_, column_sum_ = column_top_ + rows_;
    for (int64_t j = 0; j < rows_; ++j) column_top_[j] = bounded_ ? 0.f : kLowest, column_sum_[j] = 0;
    each_chunk(true, false, [&] {
      parallel(threads_, [&](int thread, int team) { sums(thread, team); });
      parallel(team_, [&](int thread, int team) { row_losses(thread, team); });
    });
    if (symmetric_) parallel(threads_, [&](int thread, int team) {
      const Range mine = share(rows_, thread, team);
      for (int64_t j = mine.begin; j < mine.end; ++j) finish(1, j, column_top_[j], column_sum_[j]);
    });
    double total = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const float loss = symmetric_ ? (call_.sums.loss[0][r] + call_.sums.loss[1][r]) / 2 : call_.sums.loss[0][r];
      if (spec_.reduction == INTERFUSE_REDUCE_NONE) call_.loss[r] = loss;
      total += loss;
    }
    if (spec_.reduction == INTERFUSE_REDUCE_NONE) return;
    *call_.loss = static_cast<float>(spec_.reduction == INTERFUSE_REDUCE_MEAN ? total / static_cast<double>(rows_) : total);
  }

  // A row's loss, or a column's, from the others' sum of exp(similarity - top).
  void finish(int side, int64_t r, double top, double sum) const {
    const double own = own_[r];
    double loss = 0;
    if (bounded_) {
      loss = ::log1p(sum * ::exp(-own));
    } else if (sum != 0) {  // a row alone has no others
      const double ahead = top - own + ::log(sum);
      loss = ahead > 0 ? ahead + ::log1p(::exp(-ahead)) : ::log1p(::exp(ahead));
    }
    call_.sums.loss[side][r] = static_cast<float>(loss);
    call_.sums.lse[side][r] = static_cast<float>(own + loss);
  }

  void row_losses(int thread, int team) const {
    const Range mine = share(chunk_.rows, thread, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float top = top_[r];
      for (int t = 1; t < team_; ++t) top = maximum(top_[t * chunk_.stride + r], top);
      double sum = 0;
      for (int t = 0; t < team_; ++t) {
        const double part = sum_[t * chunk_.stride + r];
        sum += bounded_ ? part : part * ::exp(static_cast<double>(top_[t * chunk_.stride + r]) - top);
      }
      finish(0, chunk_.first + r, top, sum);
    }
  }

  void sums(int thread, int team) {
    if (thread == 0) team_ = team;
    const int64_t stride = chunk_.stride;
    float* const room = scratch_floats(Slot::weight, kBlock * (stride + kLanes));
    float* const columns = room + kBlock * stride;
    float* const top = top_ + thread * stride;
    float* const sum = sum_ + thread * stride;
    for (int64_t r = 0; r < stride; ++r) top[r] = kLowest, sum[r] = 0;
    each_block(thread, team, [&](int64_t begin, int64_t count) {
      float* const z = call_.kept ? kept(begin) : room;
      multiply_rows(chunk_, matrix_[1] + begin * depth_, count, z);
      // What is no other row's similarity counts for nothing in the sums.
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t r = chunk_.rows; r < chunk_.vectors * kLanes; ++r) z[j * stride + r] = -__builtin_inff();
        const int64_t own = begin + j - chunk_.first;
        if (own < 0 || own >= chunk_.rows) continue;
        own_[begin + j] = z[j * stride + own];
        z[j * stride + own] = -__builtin_inff();
      }
      if (bounded_) {
        for (int64_t i = 0; i < count * kLanes; i += kLanes) store(columns + i, zero());
        along_rows(chunk_, [&](auto number, int64_t at) __attribute__((always_inline)) {
          sum_as_they_are<decltype(number)::value>(z + at, count, sum + at, columns);
        });
        for (int64_t j = 0; j < count; ++j) column_sum_[begin + j] += sum_lanes(load(columns + j * kLanes));
        return;
      }
      if (symmetric_)
        for (int64_t j = 0; j < count; ++j) sum_column(z + j * stride, begin + j);
      const float nothing[kBlock] = {};
      along_rows(chunk_, [&](auto number, int64_t at) __attribute__((always_inline)) {
        sum_exponentials<decltype(number)::value>(z + at, stride, nothing, count, top + at, sum + at, false);
      });
    });
  }

  // Some vectors of rows: their sums and the columns', of one exponential each, which stays where it is kept.
  template <int Vectors>
  INTERFUSE_INLINE void sum_as_they_are(float* z, int64_t count, float* sum, float* columns) const {
    const bool keep = call_.kept != nullptr;
    Vec total[Vectors];
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { total[v] = zero(); });
    for (int64_t j = 0; j < count; ++j) {
      Vec column = load(columns + j * kLanes);
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
        float* const at = z + j * chunk_.stride + v * kLanes;
        const Vec e = exp_in_range(load(at));
        total[v] = total[v] + e;
        column = column + e;
        if (keep) store(at, e);
      });
      store(columns + j * kLanes, column);
    }
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { store(sum + v * kLanes, load(sum + v * kLanes) + total[v]); });
  }

  void sum_column(const float* z, int64_t j) const {
    const int64_t end = chunk_.vectors * kLanes;
    Vec most = splat(column_top_[j]), total = zero();
    for (int64_t at = 0; at < end; at += kLanes) most = maximum(load(z + at), most);
    float top = most[0];
    for (int i = 1; i < kLanes; ++i) top = maximum(most[i], top);
    for (int64_t at = 0; at < end; at += kLanes) total = total + exp_in_range(load(z + at) - top);
    const double before = column_sum_[j] == 0 ? 0 : column_sum_[j] * ::exp(static_cast<double>(column_top_[j]) - top);
    column_sum_[j] = static_cast<float>(before + sum_lanes(total));
    column_top_[j] = top;
  }

  // ---- backward

  void backward() {
    const int64_t stride = stride_of(least(chunk_rows_, rows_)), wide = rows_ * depth_;
    const bool first = call_.grad_a || call_.along, second = call_.grad_b;
    const bool direct = sizeof(T) == 4 && !spec_.normalize && scale_ == 1.f;
    float* const room = scratch_floats(Slot::rows, 4 * (rows_ + kLanes) + rows_);
    factor_[0] = room, factor_[1] = room + rows_ + kLanes, lse_[0] = factor_[1] + rows_ + kLanes, lse_[1] = lse_[0] + rows_ + kLanes;
    at_partner_ = lse_[1] + rows_ + kLanes;
    float* grads = scratch_floats(Slot::gradient, (first ? 2 * threads_ * depth_ * stride : 0) + (direct ? 0 : first + second) * wide +
                                                      (direct && first && !call_.grad_a ? wide : 0));
    parts_ = grads, grads += first ? 2 * threads_ * depth_ * stride : 0;
    float* side[2] = {nullptr, nullptr};
    if (first) side[0] = direct && call_.grad_a ? static_cast<float*>(call_.grad_a) : grads;
    if (first && side[0] == grads) grads += wide;
    if (second) side[1] = direct ? static_cast<float*>(call_.grad_b) : grads;
    parallel(threads_, [&](int thread, int team) { factors(thread, team); });
    each_chunk(!call_.kept, second, [&] {
      parallel(threads_, [&](int thread, int team) { block_gradients(first, side[1], thread, team); });
      if (!first) return;
      float* const to = side[0] + chunk_.first * depth_;
      parallel(threads_, [&](int thread, int team) { add_up_inputs(chunk_, parts_, team_, to, thread, team); });
    });
    if (call_.along) {
      double along = 0;
      for (int64_t r = 0; r < rows_; ++r) along += dot(side[0] + r * depth_, matrix_[0] + r * depth_, depth_);
      *call_.along = along;
    }
    if (direct) return;
    parallel(threads_, [&](int thread, int team) {
      if (call_.grad_a) unscale(0, side[0], scale_, static_cast<T*>(call_.grad_a), thread, team);
      if (call_.grad_b) unscale(1, side[1], 1.f, static_cast<T*>(call_.grad_b), thread, team);
    });
  }

  // What a row's and a column's exponentials are multiplied by, and the gradient of the partners' similarities.
  void factors(int thread, int team) const {
    const Range mine = share(rows_, thread, team);
    const double divisor = (spec_.reduction == INTERFUSE_REDUCE_MEAN ? static_cast<double>(rows_) : 1.0) * (symmetric_ ? 2 : 1);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const double grad = call_.grad_loss[spec_.reduction == INTERFUSE_REDUCE_NONE ? r : 0] / divisor;
      double at_partner = 0;
      for (int side = 0; side < 1 + symmetric_; ++side) {
        const double lse = call_.sums.lse[side][r];
        const double loss = call_.sums.loss[side]
                                ? call_.sums.loss[side][r]
                                : lse - dot(matrix_[0] + r * depth_, matrix_[1] + r * depth_, depth_);
        factor_[side][r] = static_cast<float>(bounded_ ? grad * ::exp(-lse) : grad);
        lse_[side][r] = static_cast<float>(lse);
        at_partner += grad * ::expm1(-loss);
      }
      at_partner_[r] = static_cast<float>(at_partner);
    }
    if (mine.end == rows_)
      for (int64_t r = rows_; r < rows_ + kLanes; ++r) factor_[0][r] = lse_[0][r] = 0;
  }

  void block_gradients(bool first, float* second, int thread, int team) {
    if (thread == 0) team_ = team;
    const int64_t stride = chunk_.stride;
    float* const room = scratch_floats(Slot::weight, kBlock * stride + room_of(depth_));
    float* const turned = room + kBlock * stride;
    const auto part = [&](int number) { return parts_ + number * depth_ * stride; };
    InputGradient inputs(chunk_, first ? part(thread) : nullptr, first ? part(threads_ + thread) : nullptr);
    each_block(thread, team, [&](int64_t begin, int64_t count) {
      const float* const weight = matrix_[1] + begin * depth_;
      if (!call_.kept) multiply_rows(chunk_, weight, count, room);
      const float* const z = call_.kept ? kept(begin) : room;
      for (int64_t at = 0; at < chunk_.vectors * kLanes; at += kLanes) similarity_gradients(z + at, begin, count, at, room + at);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t own = begin + j - chunk_.first;
        if (own >= 0 && own < chunk_.rows) room[j * stride + own] = at_partner_[begin + j];
      }
      const bool split = fits_matrix_units(chunk_, count, room);
      if (second) weight_gradient(chunk_, split, count, room, turned, second + begin * depth_, chunk_.first > 0);
      if (first) inputs.add(split, weight, count, room, turned);
    });
    inputs.close();
  }

  // One vector of rows.
  INTERFUSE_INLINE void similarity_gradients(const float* z, int64_t begin, int64_t count, int64_t at, float* to) const {
    const int64_t stride = chunk_.stride;
    const Vec factor = load(factor_[0] + chunk_.first + at), lse = load(lse_[0] + chunk_.first + at);
    const float* const others = factor_[1] + begin;
    for (int64_t j = 0; j < count; ++j) {
      const Vec x = load(z + j * stride);
      Vec grad;
      if (bounded_) {
        grad = (call_.kept ? x : exp_in_range(x)) * (symmetric_ ? factor + others[j] : factor);
      } else {
        grad = exp(x - lse) * factor;
        if (symmetric_) grad = grad + exp(x - lse_[1][begin + j]) * splat(others[j]);
      }
      store(to + j * stride, grad);
    }
  }

  // The gradient of what was divided by its length, none along its own direction, and multiplied by scale.
  void unscale(int side, const float* grads, float scale, T* to, int thread, int team) const {
    const Range mine = share(rows_, thread, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const float* const grad = grads + r * depth_;
      const float* const x = matrix_[side] + r * depth_;
      const bool turns = spec_.normalize && lengths_[side][r] > kLeastLength;
      const float along = turns ? static_cast<float>(dot(grad, x, depth_)) / (scale * scale) : 0.f;
      const float factor = scale / divisor(side, r);
      along_row(depth_, [&](auto&& read, auto&& write) __attribute__((always_inline)) {
        write(to + r * depth_, (read(grad) - read(x) * along) * factor);
      });
    }
  }

  const InfoNce& call_;
  const interfuse_info_nce_spec& spec_;
  const int64_t rows_, depth_;
  const float scale_;
  const bool symmetric_;
  bool bounded_ = false;
  int threads_ = 1, team_ = 1;
  int64_t block_ = 0, blocks_ = 0, chunk_rows_ = 0, kept_before_ = 0;
  const float* matrix_[2] = {};
  float* lengths_[2] = {};
  float *top_ = nullptr, *sum_ = nullptr, *own_ = nullptr, *column_top_ = nullptr, *column_sum_ = nullptr;
  float *factor_[2] = {}, *lse_[2] = {}, *at_partner_ = nullptr, *parts_ = nullptr;
  Chunk chunk_{};
};

void info_nce(const InfoNce& call) {
  if (call.spec.dtype == INTERFUSE_BFLOAT16)
    Kernel<uint16_t>(call).run();
  else
    Kernel<float>(call).run();
}

}  // namespace

extern const InfoNceKernels info_nce_kernels = {info_nce};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
