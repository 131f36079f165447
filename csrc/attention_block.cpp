// A whole cross-attention for inference: projections, attention and the output's projection, composed of linear and
// attention.
//
// Batch entries have nothing to do with each other. Where they can be divided evenly, each thread takes some of them from
// their projections to their output: keys and values then come out of the cache of the core that made them, and threads
// meet once, at the end. Otherwise every stage is divided among all threads.
#include "common/attention_block.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "common/error.h"
#include "common/inner.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace interfuse {
namespace {

struct Destroy {
  void operator()(interfuse_linear* plan) const { interfuse_linear_destroy(plan); }
};
using Plan = std::unique_ptr<interfuse_linear, Destroy>;

}  // namespace
}  // namespace interfuse

struct interfuse_attention_block {
  interfuse::Attention attention;  // dense but for the mask; its strides are those of one call's layout
  int64_t query_dim, context_dim, out_dim, query_row, context_row;
  // Projections, by what they are of: q alone, k or v alone, both, and all three.
  interfuse::Plan q, one, both, all, out;
  int64_t q_width() const { return attention.heads * attention.head_dim; }
  int64_t kv_width() const { return attention.kv_heads * attention.head_dim; }
};

namespace interfuse {
namespace {

// Multiply-adds that one thread does while another is woken.
constexpr double kWorthAThread = 65536;
// Threads' loads may differ by so much before dividing every stage among them is faster.
constexpr double kUneven = 1.1;
// Rows of a context whose projections are one product: enough to hide what the weight's cutting costs, and few enough to
// be in the second-level cache when attention reads them.
constexpr int64_t kRowsTogether = 256;
// Of memory between projections and output, where threads work on all entries together.
constexpr int64_t kFloatsBetween = int64_t(1) << 24;

Plan projection(int64_t inputs, int64_t row, int64_t outputs) {
  interfuse_linear_spec spec;
  interfuse_linear_defaults(&spec);
  spec.rows = 4;  // any number that is not special: every call brings its own
  spec.out_features = outputs, spec.inputs = 1, spec.widths = &inputs, spec.row_strides = &row;
  interfuse_linear* made = nullptr;
  const interfuse_status status = interfuse_linear_create(&spec, &made);
  if (status == INTERFUSE_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != INTERFUSE_OK) invalid("attention_block: %s", interfuse_last_error());
  return Plan(made);
}

// A thread's memory between the projections and the output.
class Between {
 public:
  explicit Between(int64_t floats) : next_(scratch_floats(Slot::between, floats)) {}
  float* take(int64_t floats) { return (next_ += padded(floats)) - padded(floats); }
  static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  float* next_;
};

class Call {
 public:
  Call(const interfuse_attention_block& p, const interfuse_attention_block_tensors& t, float* y) : p_(p), t_(t), y_(y) {
    const int64_t k_size = p.kv_width() * p.context_dim, q_size = p.q_width() * p.query_dim;
    kv_joined_ = t.v_weight == t.k_weight + k_size && behind(t.k_bias, t.v_bias, p.kv_width());
    all_joined_ = kv_joined_ && t.query == t.context && p.query_dim == p.context_dim && p.query_row == p.context_row &&
                  p.attention.queries == p.attention.keys && t.k_weight == t.q_weight + q_size &&
                  behind(t.q_bias, t.k_bias, p.q_width());
  }

  void run(int threads) {
    const Attention& a = p_.attention;
    if (work() < 2 * kWorthAThread) threads = 1;
    cut_groups(threads);
    if (threads == 1 || divides_evenly(threads)) {
      int64_t next = 0;
      parallel(static_cast<int>(std::min<int64_t>(threads, static_cast<int64_t>(groups_.size()))), [&](int, int) {
        for (;;) {
          const int64_t at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (at >= static_cast<int64_t>(groups_.size())) break;
          entries(groups_[static_cast<size_t>(at)], 1);
        }
      });
      return;
    }
    const int64_t each = std::max<int64_t>(kFloatsBetween / room(1), 1);
    for (int64_t begin = 0; begin < a.batch; begin += each) entries({begin, std::min(begin + each, a.batch)}, threads);
  }

 private:
  static bool behind(const float* first, const float* second, int64_t size) {
    return first ? second == first + size : !second;
  }

  int64_t keys_of(int64_t entry) const { return t_.kv_lengths ? t_.kv_lengths[entry] : p_.attention.keys; }

  // Multiply-adds of one entry.
  double work_of(int64_t entry) const {
    const double queries = static_cast<double>(p_.attention.queries), keys = static_cast<double>(keys_of(entry));
    const double q = static_cast<double>(p_.q_width()), kv = static_cast<double>(p_.kv_width());
    return queries * q * static_cast<double>(p_.query_dim + p_.out_dim) + 2 * keys * kv * static_cast<double>(p_.context_dim) +
           2 * queries * keys * q;
  }
  double work_of(Range entries) const {
    double sum = 0;
    for (int64_t b = entries.begin; b < entries.end; ++b) sum += work_of(b);
    return sum;
  }
  double work() const { return work_of(Range{0, p_.attention.batch}); }

  // Neighbours that one thread takes together, the heaviest first.
  void cut_groups(int threads) {
    const Attention& a = p_.attention;
    const int64_t rows = std::max<int64_t>(std::max(a.keys, a.queries), 1);
    const int64_t most = std::max<int64_t>(a.batch / threads, 1);
    const int64_t each = t_.kv_lengths ? 1 : std::min(std::max<int64_t>((kRowsTogether + rows - 1) / rows, 1), most);
    for (int64_t begin = 0; begin < a.batch; begin += each) groups_.push_back({begin, std::min(begin + each, a.batch)});
    std::stable_sort(groups_.begin(), groups_.end(), [&](Range x, Range y) { return work_of(x) > work_of(y); });
  }

  // Whether threads that take one group after the other end together.
  bool divides_evenly(int threads) const {
    std::vector<double> loads(static_cast<size_t>(threads));
    for (const Range& group : groups_) *std::min_element(loads.begin(), loads.end()) += work_of(group);
    return *std::max_element(loads.begin(), loads.end()) * threads <= kUneven * std::accumulate(loads.begin(), loads.end(), 0.);
  }

  // Floats between projections and output of so many entries.
  int64_t room(int64_t count) const {
    const int64_t queries = count * p_.attention.queries, keys = count * p_.attention.keys;
    return 2 * Between::padded(queries * p_.q_width()) + 2 * Between::padded(keys * p_.kv_width());
  }

  // Entries from their projections to their output.
  void entries(Range which, int threads) {
    const int64_t count = which.end - which.begin, rows = count * p_.attention.queries;
    const int64_t q_width = p_.q_width(), kv_width = p_.kv_width();
    Between between(room(count));
    Attention a = p_.attention;
    a.batch = count;
    AttentionForward call{};
    if (all_joined_) {
      const int64_t row = q_width + 2 * kv_width;
      float* const q = between.take(rows * row);
      project(*p_.all, rows, query(which.begin), {t_.q_weight, nullptr, t_.q_bias}, q, threads);
      call.q = q, call.k = q + q_width, call.v = q + q_width + kv_width;
      a.q = strides(a.queries, row), a.k = a.v = strides(a.keys, row);
    } else {
      float* const q = between.take(rows * q_width);
      project(*p_.q, rows, query(which.begin), {t_.q_weight, nullptr, t_.q_bias}, q, threads);
      call.q = q, a.q = strides(a.queries, q_width);
      const int64_t wide = kv_joined_ ? 2 * kv_width : kv_width;
      float* const k = between.take(count * a.keys * wide);
      project_context(kv_joined_ ? *p_.both : *p_.one, which, {t_.k_weight, nullptr, t_.k_bias}, wide, k, threads);
      call.k = k, call.v = k + kv_width, a.k = a.v = strides(a.keys, wide);
      if (!kv_joined_) {
        float* const v = between.take(count * a.keys * kv_width);
        project_context(*p_.one, which, {t_.v_weight, nullptr, t_.v_bias}, wide, v, threads);
        call.v = v;
      }
    }
    float* const y = between.take(rows * q_width);
    call.y = y, a.y = strides(a.queries, q_width);
    if (t_.mask) {
      const int64_t size = a.mask == INTERFUSE_MASK_BOOLEAN ? 1 : 4;
      call.mask = static_cast<const char*>(t_.mask) + which.begin * a.mask_at.batch * size;
    }
    call.kv_lengths = t_.kv_lengths ? t_.kv_lengths + which.begin : nullptr;
    run_attention(a, call, threads);
    project(*p_.out, rows, y, {t_.out_weight, nullptr, t_.out_bias}, y_ + which.begin * a.queries * p_.out_dim, threads);
  }

  // Of heads side by side in rows so long.
  AttentionStrides strides(int64_t length, int64_t row) const { return {length * row, p_.attention.head_dim, row}; }

  const float* query(int64_t entry) const { return t_.query + entry * p_.attention.queries * p_.query_row; }

  void project(const interfuse_linear& plan, int64_t rows, const float* from, const interfuse_linear_weights& weights, float* to,
               int threads) const {
    if (rows) run_linear(plan, rows, from, weights, to, threads);
  }

  // Rows beyond a length are left out where that is worth several products.
  void project_context(const interfuse_linear& plan, Range which, const interfuse_linear_weights& weights, int64_t outputs,
                       float* to, int threads) const {
    const int64_t keys = p_.attention.keys, count = which.end - which.begin;
    const float* const from = t_.context + which.begin * keys * p_.context_row;
    int64_t real = 0;
    for (int64_t b = which.begin; b < which.end; ++b) real += keys_of(b);
    if (5 * real > 4 * count * keys) return project(plan, count * keys, from, weights, to, threads);
    for (int64_t i = 0; i < count; ++i)
      project(plan, keys_of(which.begin + i), from + i * keys * p_.context_row, weights, to + i * keys * outputs, threads);
  }

  const interfuse_attention_block& p_;
  const interfuse_attention_block_tensors& t_;
  float* const y_;
  bool kv_joined_, all_joined_;
  std::vector<Range> groups_;
};

void check_tensors(const interfuse_attention_block& p, const interfuse_attention_block_tensors& t) {
  const Attention& a = p.attention;
  if (!t.query || !t.q_weight || !t.k_weight || !t.v_weight || !t.out_weight || (a.keys && !t.context))
    invalid("attention_block: query, context or a weight is a null pointer; only biases, the mask and kv_lengths may be.");
  if (a.mask != INTERFUSE_MASK_NONE && a.keys && !t.mask)
    invalid("attention_block: the spec has a mask, but its pointer is null; pass the mask or set mask to INTERFUSE_MASK_NONE.");
  check_lengths("attention", "kv_lengths", t.kv_lengths, a.batch, a.keys);
}

}  // namespace
}  // namespace interfuse

extern "C" {

interfuse_status interfuse_attention_block_create(const interfuse_attention_block_spec* spec, interfuse_attention_block** plan) {
  using namespace interfuse;
  return guarded([&] {
    if (!spec || !plan) invalid("attention_block: create was given a null pointer; pass a spec and a place for the plan.");
    const interfuse_attention_block_spec& s = *spec;
    interfuse_attention_spec inner;
    interfuse_attention_defaults(&inner);
    inner.mask = s.mask, inner.causal = s.causal, inner.scale = s.scale;
    inner.batch = s.batch, inner.heads = s.heads, inner.kv_heads = s.kv_heads, inner.queries = s.queries, inner.keys = s.keys;
    inner.head_dim = inner.value_dim = s.head_dim;
    std::copy(s.mask_strides, s.mask_strides + 3, inner.mask_strides);
    auto made = std::make_unique<interfuse_attention_block>();
    made->attention = checked_attention(inner);
    check_range("attention_block", "query_dim", s.query_dim, 1, INT32_MAX);
    check_range("attention_block", "context_dim", s.context_dim, 1, INT32_MAX);
    check_range("attention_block", "out_dim", s.out_dim, 1, INT32_MAX);
    check_range("attention_block", "query_row", s.query_row, 0, kMostElements);
    check_range("attention_block", "context_row", s.context_row, 0, kMostElements);
    check_range("attention_block", "heads", s.heads, 1, INT32_MAX / s.head_dim / 3);
    made->query_dim = s.query_dim, made->context_dim = s.context_dim, made->out_dim = s.out_dim;
    made->query_row = s.query_row, made->context_row = s.context_row;
    const int64_t q = made->q_width(), kv = made->kv_width();
    made->q = projection(s.query_dim, s.query_row, q);
    made->one = projection(s.context_dim, s.context_row, kv);
    made->both = projection(s.context_dim, s.context_row, 2 * kv);
    made->all = projection(s.query_dim, s.query_row, q + 2 * kv);
    made->out = projection(q, q, s.out_dim);
    *plan = made.release();
  });
}

void interfuse_attention_block_destroy(interfuse_attention_block* plan) { delete plan; }

interfuse_status interfuse_attention_block_forward(const interfuse_attention_block* plan,
                                                   const interfuse_attention_block_tensors* tensors, float* y, int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    if (!plan || !tensors) invalid("attention_block: forward was given a null pointer; pass a plan and its tensors.");
    if (plan->attention.batch == 0 || plan->attention.queries == 0) return;
    check_tensors(*plan, *tensors);
    if (!y) invalid("attention_block: y is a null pointer; pass memory for (batch, queries, out_dim).");
    Call(*plan, *tensors, y).run(usable_threads(threads));
  });
}

}  // extern "C"
