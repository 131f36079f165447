// rnn's C API: checks the problem and sorts the sequences.
#include "common/rnn.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "common/error.h"
#include "common/parallel.h"

namespace interfuse {
namespace {

// One order of sequences and the storage behind it.
struct Order {
  std::vector<int64_t> row, length, active, first;

  // Every `apart`-th sequence of `sorted` (by falling length) from number `at` on.
  Order(const Rnn& p, const int64_t* lengths, const std::vector<int64_t>& sorted, int64_t at, int64_t apart) {
    for (int64_t j = at; j < static_cast<int64_t>(sorted.size()); j += apart) {
      row.push_back(sorted[j]);
      length.push_back(lengths ? lengths[sorted[j]] : p.steps);
    }
    const int64_t steps = row.empty() ? 0 : length[0];
    active.assign(steps + 1, 0);
    first.assign(steps + 1, 0);
    int64_t rows = static_cast<int64_t>(row.size());
    for (int64_t s = 0; s < steps; ++s) {
      while (length[rows - 1] <= s) --rows;
      active[s] = rows;
      first[s + 1] = first[s] + rows;
    }
  }
  RnnOrder view(int64_t before) const {
    return {row.data(), length.data(), active.data(), first.data(), static_cast<int64_t>(row.size()),
            static_cast<int64_t>(first.size()) - 1, first.back(), before};
  }
};

// The batch in `count` parts of about equal work.
struct Parts {
  std::vector<Order> orders;
  std::vector<RnnOrder> views;
  int64_t tokens = 0;

  Parts(const Rnn& p, const int64_t* lengths, int64_t count) {
    std::vector<int64_t> sorted(p.batch);
    std::iota(sorted.begin(), sorted.end(), 0);
    if (lengths) std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t i = 0; i < count; ++i) orders.emplace_back(p, lengths, sorted, i, count);
    for (const Order& order : orders) {
      views.push_back(order.view(tokens));
      tokens += order.first.back();
    }
  }
  RnnParts all() const { return {views.data(), static_cast<int64_t>(views.size()), tokens}; }
};

void check_lengths(const Rnn& p, const int64_t* lengths) {
  for (int64_t b = 0; lengths && b < p.batch; ++b)
    if (lengths[b] < 0 || lengths[b] > p.steps)
      invalid("rnn: the length of sequence %lld is %lld; allowed is 0 to %lld, the number of steps of the input.",
              (long long)b, (long long)lengths[b], (long long)p.steps);
}

// Threads that take sequences of their own need not meet at each step, but each reads all recurrent weights: that pays
// while they fit into its cache and meet several rows, the more the larger they are.
int64_t parts_for(const Rnn& p, const int64_t* lengths, int threads) {
  constexpr int64_t kBytes = int64_t(1) << 20, kFewBytes = int64_t(320) << 10;
  int64_t tokens = 0;
  for (int64_t b = 0; b < p.batch; ++b) tokens += lengths ? lengths[b] : p.steps;
  const int64_t bytes = p.gates() * p.hidden * p.output() * 4;
  const int64_t rows = bytes <= kFewBytes ? 2 : 4;
  return threads > 1 && bytes <= kBytes && tokens >= rows * threads * p.steps ? threads : 1;
}

// Behind what the kernels keep of the tokens stands the number of parts that forward made, which backward must follow,
// once for each token, so that the whole is a multiple of their number. A recorded graph holds the size of the whole and
// may run on another machine: the room is that of the widest vectors, whatever this one has.
int64_t parts_place(const Rnn& p) {
  const auto padded = [](int64_t count) { return (count + 15) / 16 * 16; };
  const int64_t units = padded(p.hidden), gates = p.gates() == 3 ? 4 : p.gates();
  const int64_t token = units * (gates + (p.cell == INTERFUSE_LSTM) + (p.projection > 0)) + padded(p.output());
  return p.batch * p.steps * token * p.layers * p.directions;
}

// What the instruction set does not use of that, and the number of parts.
void fill_rest(const RnnKernels& kernels, const Rnn& p, int64_t parts, float* reserve) {
  float* const place = reserve + parts_place(p);
  std::fill(reserve + kernels.reserve(p, p.batch * p.steps), place, 0.f);
  std::fill_n(place, p.batch * p.steps, static_cast<float>(parts));
}

void check_ids(const Rnn& p, const int64_t* lengths, const int64_t* ids) {
  if (!p.vocabulary) return;
  if (!ids) invalid("rnn: this plan has a vocabulary, but ids is a null pointer; pass the token ids.");
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t t = 0; t < (lengths ? lengths[b] : p.steps); ++t) {
      const int64_t id = ids[t * p.x_step + b * p.x_row];
      if (id < 0 || id >= p.vocabulary)
        invalid("rnn: token id %lld at step %lld of sequence %lld is outside the embedding's %lld rows.", (long long)id,
                (long long)t, (long long)b, (long long)p.vocabulary);
    }
}

void check_weights(const Rnn& p, const interfuse_rnn_weights* weights) {
  if (!weights) invalid("rnn: weights is a null pointer; pass one entry per layer and direction.");
  for (int64_t i = 0; i < p.layers * p.directions; ++i)
    if (!weights[i].w_ih || !weights[i].w_hh || (p.bias && (!weights[i].b_ih || !weights[i].b_hh)) ||
        (p.projection && !weights[i].w_hr))
      invalid("rnn: a weight of layer %lld, direction %lld is a null pointer; w_ih, w_hh%s%s are needed.",
              (long long)(i / p.directions), (long long)(i % p.directions), p.bias ? ", b_ih, b_hh" : "",
              p.projection ? ", w_hr" : "");
}

}  // namespace

Rnn checked_rnn(const interfuse_rnn_spec& s) {
  check_range("rnn", "cell", s.cell, INTERFUSE_RNN_TANH, INTERFUSE_GRU);
  check_range("rnn", "directions", s.directions, 1, 2);
  check_range("rnn", "weight_dtype", s.weight_dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("rnn", "batch", s.batch, 0, INT32_MAX);
  check_range("rnn", "steps", s.steps, 0, INT32_MAX);
  check_range("rnn", "input_size", s.input_size, 1, INT32_MAX);
  check_range("rnn", "hidden_size", s.hidden_size, 1, 1 << 24);
  check_range("rnn", "proj_size", s.proj_size, 0, s.hidden_size - 1);
  check_range("rnn", "layers", s.layers, 1, 1 << 16);
  check_range("rnn", "vocabulary", s.vocabulary, 0, INT32_MAX);
  if (s.proj_size && s.cell != INTERFUSE_LSTM)
    invalid("rnn: proj_size is %lld, but only the LSTM has projections; use 0.", (long long)s.proj_size);
  if (s.save && s.weight_dtype != INTERFUSE_FLOAT32)
    invalid("rnn: bfloat16 weights are for inference; a plan with save = 1 needs float32 weights.");
  const int64_t width = std::max(s.input_size, 4 * s.hidden_size);
  if (s.batch && s.steps > kMostElements / s.batch / width)
    invalid("rnn: %lld steps of %lld sequences are too large together; split the batch.", (long long)s.steps, (long long)s.batch);
  Rnn p{};
  p.cell = s.cell, p.directions = s.directions;
  p.bias = s.bias != 0, p.save = s.save != 0, p.batch_first = s.batch_first != 0;
  p.half_weights = s.weight_dtype == INTERFUSE_BFLOAT16;
  p.batch = s.batch, p.steps = s.steps, p.input = s.input_size, p.hidden = s.hidden_size;
  p.projection = s.proj_size, p.layers = s.layers;
  p.x_step = s.x_strides[0], p.x_row = s.x_strides[1];
  p.vocabulary = s.vocabulary;
  return p;
}

}  // namespace interfuse

struct interfuse_rnn {
  interfuse::Rnn problem;
  const interfuse::RnnKernels* kernels;
};

extern "C" {

void interfuse_rnn_defaults(interfuse_rnn_spec* spec) {
  *spec = interfuse_rnn_spec{};
  spec->directions = 1;
  spec->bias = 1;
  spec->layers = 1;
}

interfuse_status interfuse_rnn_create(const interfuse_rnn_spec* spec, interfuse_rnn** plan) {
  return interfuse::guarded([&] {
    if (!spec || !plan) interfuse::invalid("rnn: create was given a null pointer; pass a spec and a place for the plan.");
    auto made = std::make_unique<interfuse_rnn>();
    made->problem = interfuse::checked_rnn(*spec);
    made->kernels = INTERFUSE_PICK(rnn_kernels);
    *plan = made.release();
  });
}

void interfuse_rnn_destroy(interfuse_rnn* plan) { delete plan; }

int64_t interfuse_rnn_reserve(const interfuse_rnn* plan) {
  using namespace interfuse;
  const Rnn& p = plan->problem;
  return p.save ? parts_place(p) + p.batch * p.steps : 0;
}

interfuse_status interfuse_rnn_forward(const interfuse_rnn* plan, const interfuse_rnn_sequences* sequences,
                                       const interfuse_rnn_weights* weights, float* y, float* hn, float* cn,
                                       float* reserve, int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    if (!plan || !sequences) invalid("rnn: forward was given no plan or no sequences; both are needed.");
    const Rnn& p = plan->problem;
    if (p.batch == 0) return;
    check_weights(p, weights);
    if ((p.steps && (!sequences->x || !y)) || !hn || (p.cell == INTERFUSE_LSTM && !cn))
      invalid("rnn: forward was given a null pointer for x, y, hn%s; all are needed.", p.cell == INTERFUSE_LSTM ? " or cn" : "");
    if (p.save && p.steps && !reserve) invalid("rnn: this plan saves for backward; pass a reserve of interfuse_rnn_reserve floats.");
    check_lengths(p, sequences->lengths);
    check_ids(p, sequences->lengths, sequences->ids);
    const int team = std::min(usable_threads(threads), kMostRnnThreads);
    const Parts parts(p, sequences->lengths, parts_for(p, sequences->lengths, team));
    if (p.save && p.steps) fill_rest(*plan->kernels, p, parts.all().count, reserve);
    plan->kernels->forward(p, parts.all(), {sequences, weights, y, hn, cn, reserve, team, nullptr});
  });
}

interfuse_status interfuse_rnn_backward(const interfuse_rnn* plan, const interfuse_rnn_sequences* sequences,
                                        const interfuse_rnn_weights* weights, const float* reserve, const float* grad_y,
                                        const float* grad_hn, const float* grad_cn, float* grad_x, float* grad_h0,
                                        float* grad_c0, const interfuse_rnn_weights* grad_weights, int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    if (!plan || !sequences || !grad_weights)
      invalid("rnn: backward was given no plan, sequences or grad_weights; all three are needed (entries may be NULL).");
    const Rnn& p = plan->problem;
    if (!p.save) invalid("rnn: backward needs a plan with save = 1, the one its forward ran with.");
    if (p.batch) check_weights(p, weights);
    if (p.batch && p.steps && (!reserve || !sequences->x)) invalid("rnn: backward was given a null pointer for x or reserve; both are needed.");
    check_lengths(p, sequences->lengths);
    check_ids(p, sequences->lengths, sequences->ids);
    int64_t count = 1;
    if (p.batch && p.steps) {
      const float made = reserve[parts_place(p)];
      if (!(made >= 1 && made <= static_cast<float>(p.batch)))
        invalid("rnn: backward was given a reserve that no forward of this plan has written; pass forward's.");
      count = static_cast<int64_t>(made);
    }
    const Parts parts(p, sequences->lengths, count);
    plan->kernels->backward(p, parts.all(), {sequences, weights, reserve, grad_y, grad_hn, grad_cn, grad_x, grad_h0, grad_c0,
                                            grad_weights, std::min(usable_threads(threads), kMostRnnThreads)});
  });
}

}  // extern "C"
