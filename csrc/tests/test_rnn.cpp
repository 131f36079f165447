// The recurrent core through the C API against the naive double loops: every cell, sequences of different lengths,
// stacks of one and two directions, projections, token ids, and what a caller may leave out, on guarded buffers.
#include <memory>

#include "tests/naive_rnn.h"

using namespace interfuse_test;

namespace {

struct Problem {
  const char* name;
  int cell;
  int64_t batch, steps, input, hidden, projection, layers;
  int directions, bias;
  std::vector<int64_t> lengths;  // empty: all have every step
};

constexpr int kCells[] = {INTERFUSE_RNN_TANH, INTERFUSE_RNN_RELU, INTERFUSE_LSTM, INTERFUSE_GRU};
const char* const kCellNames[] = {"RNN tanh", "RNN relu", "LSTM", "GRU"};

// Of every cell.
const Problem kCommon[] = {
    {"one sequence", 0, 1, 17, 6, 64, 0, 1, 1, 1, {}},
    {"tails of every vector", 0, 5, 9, 7, 21, 0, 1, 1, 1, {}},
    {"two directions, two layers, ragged", 0, 13, 8, 5, 33, 0, 2, 2, 1, {8, 1, 3, 8, 0, 5, 2, 7, 1, 4, 6, 0, 8}},
    {"one of everything", 0, 2, 1, 1, 1, 0, 1, 1, 1, {}},
    {"wide, for several threads", 0, 3, 6, 40, 150, 0, 1, 1, 1, {6, 2, 5}},
    {"many sequences, without bias", 0, 37, 5, 12, 20, 0, 2, 1, 0, {}},
    {"matrix tiles and their tails", 0, 30, 9, 40, 45, 0, 2, 1, 1, {}},
};
const Problem kOthers[] = {
    {"projection", INTERFUSE_LSTM, 4, 7, 9, 24, 5, 2, 2, 1, {7, 3, 0, 6}},
    {"projection, many sequences", INTERFUSE_LSTM, 30, 9, 20, 45, 17, 2, 2, 1, {}},
    {"projection, wide", INTERFUSE_LSTM, 1, 6, 10, 70, 33, 1, 1, 0, {}},
    {"one pair of matrix panels, deep", INTERFUSE_RNN_TANH, 30, 5, 300, 30, 0, 1, 1, 1, {}},
    {"long", INTERFUSE_GRU, 2, 120, 3, 18, 0, 1, 1, 1, {120, 77}},
    {"three layers, two directions", INTERFUSE_LSTM, 6, 5, 4, 10, 0, 3, 2, 1, {5, 4, 4, 2, 1, 1}},
    {"no steps", INTERFUSE_GRU, 3, 0, 4, 10, 0, 2, 1, 1, {}},
    {"no sequences", INTERFUSE_LSTM, 0, 4, 4, 10, 0, 1, 1, 1, {}},
};

struct Run {
  int threads;
  Flush flush;
  int64_t offset;
  bool batch_first, states, ids;
};

// The buffers of one problem, float and double side by side.
class Case {
 public:
  Case(const Problem& problem, const Run& how, int weight_dtype = INTERFUSE_FLOAT32) : how_(how) {
    interfuse_rnn_defaults(&spec);
    spec.cell = problem.cell, spec.directions = problem.directions, spec.bias = problem.bias;
    spec.save = weight_dtype == INTERFUSE_FLOAT32, spec.weight_dtype = weight_dtype;
    spec.batch_first = how.batch_first;
    spec.batch = problem.batch, spec.steps = problem.steps, spec.input_size = problem.input;
    spec.hidden_size = problem.hidden, spec.proj_size = problem.projection, spec.layers = problem.layers;
    spec.vocabulary = how.ids ? kVocabulary : 0;
    const int64_t element = how.ids ? 1 : spec.input_size;
    spec.x_strides[0] = how.batch_first ? element : spec.batch * element;
    spec.x_strides[1] = how.batch_first ? spec.steps * element : element;
    every_length.assign(static_cast<size_t>(spec.batch), spec.steps);
    if (!problem.lengths.empty()) every_length = problem.lengths;
    naive = std::make_unique<NaiveRnn>(spec, every_length);
    truth = naive->zeros();
    lengths = buffer<int64_t>(problem.lengths.empty() ? 0 : spec.batch);
    std::copy(problem.lengths.begin(), problem.lengths.end(), lengths->data());
    draw_inputs();
    draw_weights();
  }

  void forward() {
    const int64_t cells = spec.cell == INTERFUSE_LSTM ? naive->runs() * spec.batch * spec.hidden_size : 0;
    y = buffer<float>(spec.batch * spec.steps * spec.directions * naive->output());
    hn = buffer<float>(naive->runs() * spec.batch * naive->output());
    cn = buffer<float>(cells);
    CHECK_EQUAL(interfuse_rnn_create(&spec, &plan), INTERFUSE_OK);
    reserve = buffer<float>(interfuse_rnn_reserve(plan));
    const interfuse_rnn_sequences sequences = inputs();
    CHECK_EQUAL(interfuse_rnn_forward(plan, &sequences, weights.data(), y->data(), hn->data(), cn->data(),
                                      reserve->data(), how_.threads),
                INTERFUSE_OK);
  }
  ~Case() { interfuse_rnn_destroy(plan); }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  // Sequences first, whatever the layout.
  Doubles by_sequence(const Doubles& values, int64_t width) const {
    if (spec.batch_first) return values;
    Doubles out(values.size());
    for (int64_t t = 0; t < spec.steps; ++t)
      for (int64_t b = 0; b < spec.batch; ++b)
        std::copy_n(values.begin() + (t * spec.batch + b) * width, width, out.begin() + (b * spec.steps + t) * width);
    return out;
  }

  bool lstm() const { return spec.cell == INTERFUSE_LSTM; }

  // Each step's sums round, and later steps and layers carry that on, each contracting on average.
  double allowed() const {
    const double terms = std::sqrt(static_cast<double>(spec.hidden_size + spec.input_size));
    return std::ldexp(4, -23) * terms * (static_cast<double>(spec.layers) + std::sqrt(static_cast<double>(spec.steps)));
  }

  interfuse_rnn_sequences inputs() const {
    return {x->data(), how_.ids ? ids->data() : nullptr, lengths->size() ? lengths->data() : nullptr,
            how_.states ? h0->data() : nullptr, how_.states && lstm() ? c0->data() : nullptr};
  }

  bool intact() const {
    bool all = x->intact() && ids->intact() && lengths->intact() && h0->intact() && c0->intact() && y->intact() &&
               hn->intact() && cn->intact() && reserve->intact();
    for (const auto& weight : storage) all = all && weight->intact();
    return all;
  }

  template <class T>
  std::unique_ptr<Guarded<T>> buffer(int64_t count) const {
    return std::make_unique<Guarded<T>>(count, how_.flush, how_.offset);
  }

  interfuse_rnn_spec spec;
  interfuse_rnn* plan = nullptr;
  std::vector<int64_t> every_length;
  std::unique_ptr<NaiveRnn> naive;
  RnnInputs truth;
  std::unique_ptr<Guarded<float>> x, h0, c0, y, hn, cn, reserve;
  std::unique_ptr<Guarded<int64_t>> ids, lengths;
  std::vector<std::unique_ptr<Guarded<float>>> storage;  // five for each layer and direction
  std::vector<interfuse_rnn_weights> weights;

 private:
  static constexpr int64_t kVocabulary = 11;

  void draw_inputs() {
    const int64_t tokens = spec.batch * spec.steps, width = spec.input_size;
    x = buffer<float>((how_.ids ? kVocabulary : tokens) * width);
    ids = buffer<int64_t>(how_.ids ? tokens : 0);
    const Doubles values = fill(*x, Values::reals, 1);
    for (int64_t i = 0; i < ids->size(); ++i) (*ids)[i] = (7 * i + i / 3) % kVocabulary;
    for (int64_t b = 0; b < spec.batch; ++b)
      for (int64_t t = 0; t < spec.steps; ++t) {
        const int64_t token = how_.batch_first ? b * spec.steps + t : t * spec.batch + b;
        const int64_t row = how_.ids ? (*ids)[token] : token;
        std::copy_n(values.begin() + row * width, width, truth.x[static_cast<size_t>(b)].begin() + t * width);
      }
    h0 = buffer<float>(static_cast<int64_t>(truth.h0.size()));
    c0 = buffer<float>(static_cast<int64_t>(truth.c0.size()));
    const Doubles h = fill(*h0, Values::reals, 2, 0.5f), c = fill(*c0, Values::reals, 3, 0.5f);
    if (how_.states) truth.h0 = h;
    if (how_.states && lstm()) truth.c0 = c;
  }

  void draw_weights() {
    // An unbounded activation gets smaller weights, so that its states do not grow with the steps.
    const float gain = spec.cell == INTERFUSE_RNN_RELU ? 0.4f : 1.0f;
    const float scale = gain / std::sqrt(static_cast<float>(spec.hidden_size));
    unsigned seed = 10;
    for (RnnParameters& run : truth.runs) {
      interfuse_rnn_weights pointers{};
      float** places[] = {&pointers.w_ih, &pointers.w_hh, &pointers.b_ih, &pointers.b_hh, &pointers.w_hr};
      Doubles* truths[] = {&run.w_ih, &run.w_hh, &run.b_ih, &run.b_hh, &run.w_hr};
      for (size_t i = 0; i < 5; ++i) {
        storage.push_back(buffer<float>(static_cast<int64_t>(truths[i]->size())));
        *truths[i] = fill(*storage.back(), Values::reals, ++seed, scale);
        if (!truths[i]->empty()) *places[i] = storage.back()->data();
      }
      weights.push_back(pointers);
    }
  }

  Run how_;
};

std::string text(const Problem& problem, const Run& how) {
  std::ostringstream out;
  out << problem.name << ", " << kCellNames[problem.cell] << ", threads " << how.threads
      << (how.batch_first ? ", batch first" : ", steps first") << (how.states ? "" : ", no initial states")
      << (how.ids ? ", token ids" : "") << ", offset " << how.offset
      << (how.flush == Flush::front ? " from the front" : " from the back");
  return out.str();
}

void check_outputs(const Case& c, double allowed) {
  const RnnOutputs expected = c.naive->forward(c.truth);
  const auto least = [](const Doubles& t) { return std::sqrt(static_cast<double>(t.size())) / 4; };
  const int64_t width = c.spec.directions * c.naive->output();
  compare("y", c.by_sequence(read(*c.y), width), expected.y, allowed, least(expected.y));
  compare("hn", read(*c.hn), expected.hn, allowed, least(expected.hn));
  if (c.lstm()) compare("cn", read(*c.cn), expected.cn, allowed, least(expected.cn));
}

void run(const Problem& problem, const Run& how) {
  const Context context(text(problem, how));
  Case c(problem, how);
  c.forward();
  check_outputs(c, c.allowed());

  const auto y = c.buffer<float>(c.y->size()), hn = c.buffer<float>(c.hn->size()), cn = c.buffer<float>(c.cn->size());
  RnnOutputs grad{c.by_sequence(fill(*y, Values::reals, 4), c.spec.directions * c.naive->output()),
                  fill(*hn, Values::reals, 5), fill(*cn, Values::reals, 6)};
  grad.cn.resize(c.truth.c0.size());
  const RnnInputs expected = c.naive->backward(c.truth, grad);
  const int64_t tokens = c.spec.batch * c.spec.steps;
  const auto grad_x = c.buffer<float>(tokens * c.spec.input_size), grad_h0 = c.buffer<float>(c.h0->size()),
             grad_c0 = c.buffer<float>(c.lstm() ? c.c0->size() : 0);
  std::vector<std::unique_ptr<Guarded<float>>> storage;
  std::vector<interfuse_rnn_weights> grads;
  for (size_t run = 0; run < c.weights.size(); ++run) {
    float* of[5];
    for (size_t i = 0; i < 5; ++i) {
      storage.push_back(c.buffer<float>(c.storage[5 * run + i]->size()));
      of[i] = storage.back()->size() ? storage.back()->data() : nullptr;
    }
    grads.push_back({of[0], of[1], of[2], of[3], of[4]});
  }
  const interfuse_rnn_sequences sequences = c.inputs();
  CHECK_EQUAL(interfuse_rnn_backward(c.plan, &sequences, c.weights.data(), c.reserve->data(), y->data(), hn->data(),
                                     c.lstm() ? cn->data() : nullptr, grad_x->data(), grad_h0->data(),
                                     c.lstm() ? grad_c0->data() : nullptr, grads.data(), how.threads),
              INTERFUSE_OK);
  // A gradient sums over all steps and rows what the forward's errors enter once.
  const auto close = [&](const char* name, const Doubles& ours, const Doubles& truth) {
    compare(name, ours, truth, 4 * c.allowed(), std::sqrt(static_cast<double>(truth.size())) / 4);
  };
  Doubles every_x;
  for (const Doubles& x : expected.x) every_x.insert(every_x.end(), x.begin(), x.end());
  close("grad_x", c.by_sequence(read(*grad_x), c.spec.input_size), every_x);
  close("grad_h0", read(*grad_h0), expected.h0);
  if (c.lstm()) close("grad_c0", read(*grad_c0), expected.c0);
  bool intact = c.intact() && grad_x->intact() && grad_h0->intact() && grad_c0->intact();
  for (size_t i = 0; i < storage.size(); ++i) {
    const RnnParameters& run = expected.runs[i / 5];
    const Doubles* truths[] = {&run.w_ih, &run.w_hh, &run.b_ih, &run.b_hh, &run.w_hr};
    const char* names[] = {"grad w_ih", "grad w_hh", "grad b_ih", "grad b_hh", "grad w_hr"};
    close(names[i % 5], read(*storage[i]), *truths[i % 5]);
    intact = intact && storage[i]->intact();
  }
  CHECK(intact);
}

void run_all(const Run& how) {
  for (Problem problem : kCommon)
    for (int cell : kCells) problem.cell = cell, run(problem, how);
  for (const Problem& problem : kOthers) run(problem, how);
}

}  // namespace

TEST(rnn_one_thread) { run_all({1, Flush::back, 0, true, true, false}); }
TEST(rnn_two_threads_steps_first) { run_all({2, Flush::front, 0, false, true, false}); }
TEST(rnn_five_threads_without_states_misaligned) { run_all({5, Flush::back, 1, true, false, false}); }
TEST(rnn_token_ids) { run_all({2, Flush::back, 0, true, true, true}); }
TEST(rnn_token_ids_steps_first) { run(kCommon[2], {1, Flush::front, 0, false, false, true}); }

// The naive gradients are those of the naive forward: difference quotients along every single number.
TEST(rnn_the_naive_gradients_are_gradients) {
  for (int cell : kCells)
    for (int64_t projection : {0, 2}) {
      if (projection && cell != INTERFUSE_LSTM) continue;
      const Problem problem = {"small", cell, 2, 3, 2, 3, projection, 2, 2, 1, {3, 2}};
      const Context context(std::string(kCellNames[cell]) + (projection ? " with projection" : ""));
      Case c(problem, {1, Flush::back, 0, true, true, false});
      RnnOutputs weights = c.naive->forward(c.truth);
      const auto scramble = [](Doubles& values) {
        for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(1.0 + 3.0 * static_cast<double>(i));
      };
      scramble(weights.y), scramble(weights.hn), scramble(weights.cn);
      const auto loss = [&] {
        const RnnOutputs out = c.naive->forward(c.truth);
        double sum = 0;
        const auto add = [&](const Doubles& a, const Doubles& b) {
          for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
        };
        add(out.y, weights.y), add(out.hn, weights.hn), add(out.cn, weights.cn);
        return sum;
      };
      const RnnInputs grad = c.naive->backward(c.truth, weights);
      const auto check = [&](const char* name, Doubles& values, const Doubles& gradient) {
        Doubles quotients(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
          const double value = values[i], step = 1e-5;
          values[i] = value + step;
          const double above = loss();
          values[i] = value - step;
          quotients[i] = (above - loss()) / (2 * step);
          values[i] = value;
        }
        compare(name, gradient, quotients, 1e-7, 1e-3);  // step squared, and 1e-16 / step
      };
      for (size_t b = 0; b < grad.x.size(); ++b) check("x", c.truth.x[b], grad.x[b]);
      check("h0", c.truth.h0, grad.h0), check("c0", c.truth.c0, grad.c0);
      for (size_t i = 0; i < grad.runs.size(); ++i) {
        RnnParameters& of = c.truth.runs[i];
        check("w_ih", of.w_ih, grad.runs[i].w_ih), check("w_hh", of.w_hh, grad.runs[i].w_hh);
        check("b_ih", of.b_ih, grad.runs[i].b_ih), check("b_hh", of.b_hh, grad.runs[i].b_hh);
        check("w_hr", of.w_hr, grad.runs[i].w_hr);
      }
    }
}

TEST(rnn_bfloat16_rounds_the_recurrent_weights) {
  for (int cell : kCells)
    for (const Problem& shape : {kCommon[0], kCommon[2], kCommon[4]}) {
      Problem problem = shape;
      problem.cell = cell;
      const Run how = {2, Flush::back, 0, true, true, false};
      const Context context(text(problem, how));
      Case c(problem, how, INTERFUSE_BFLOAT16);
      for (RnnParameters& run : c.truth.runs)
        for (double& v : run.w_hh) {
          uint16_t half;
          store(static_cast<float>(v), half);
          v = load(half);
        }
      c.forward();
      check_outputs(c, c.allowed());
      CHECK(c.intact());
    }
}

// A gradient that nobody wants, and an incoming one that counts as zero.
TEST(rnn_backward_leaves_out_what_is_null) {
  for (int cell : kCells) {
    Problem problem = kCommon[2];
    problem.cell = cell;
    const Run how = {2, Flush::back, 0, true, true, false};
    const Context context(text(problem, how));
    Case c(problem, how);
    c.forward();
    const interfuse_rnn_sequences sequences = c.inputs();
    const auto zeros = c.buffer<float>(c.hn->size()), zero_cells = c.buffer<float>(c.cn->size());
    std::fill_n(zeros->data(), zeros->size(), 0.0f), std::fill_n(zero_cells->data(), zero_cells->size(), 0.0f);
    const auto grad_y = c.buffer<float>(c.y->size());
    fill(*grad_y, Values::reals, 4);
    const auto gradients = [&](bool incoming, bool of_x) {
      const auto grad = c.buffer<float>(of_x ? c.x->size() : c.storage[1]->size());
      std::vector<interfuse_rnn_weights> none(c.weights.size(), interfuse_rnn_weights{});
      if (!of_x) none[0].w_hh = grad->data();
      CHECK_EQUAL(interfuse_rnn_backward(c.plan, &sequences, c.weights.data(), c.reserve->data(), grad_y->data(),
                                         incoming ? zeros->data() : nullptr,
                                         incoming && c.lstm() ? zero_cells->data() : nullptr,
                                         of_x ? grad->data() : nullptr, nullptr, nullptr, none.data(), 2),
                  INTERFUSE_OK);
      CHECK(grad->intact());
      return read(*grad);
    };
    for (bool of_x : {false, true}) CHECK(gradients(false, of_x) == gradients(true, of_x));
  }
}

// A graph recorded on one machine may run on another.
TEST(rnn_reserve_is_alike_on_every_instruction_set) {
  interfuse_rnn_spec spec;
  interfuse_rnn_defaults(&spec);
  spec.cell = INTERFUSE_LSTM, spec.save = 1, spec.layers = 2;
  spec.batch = 2, spec.steps = 3, spec.input_size = 5, spec.hidden_size = 20;
  interfuse_rnn* plan = nullptr;
  CHECK_EQUAL(interfuse_rnn_create(&spec, &plan), INTERFUSE_OK);
  // For each token and layer four gates, cell and output of 32 units, and one float for the token.
  CHECK_EQUAL(interfuse_rnn_reserve(plan), 6 * (2 * 32 * 6 + 1));
  interfuse_rnn_destroy(plan);
}

TEST(rnn_refuses_with_a_sentence) {
  interfuse_rnn_spec spec;
  interfuse_rnn* plan = nullptr;
  interfuse_rnn_defaults(&spec);
  spec.cell = INTERFUSE_GRU, spec.batch = 2, spec.steps = 3, spec.input_size = 4, spec.hidden_size = 5;
  spec.proj_size = 2;
  CHECK_EQUAL(interfuse_rnn_create(&spec, &plan), INTERFUSE_INVALID);
  CHECK(std::string(interfuse_last_error()).find("only the LSTM") != std::string::npos);
  CHECK(plan == nullptr);

  Problem problem = kCommon[1];
  problem.cell = INTERFUSE_LSTM;
  Case c(problem, {1, Flush::back, 0, true, true, false});
  c.forward();
  interfuse_rnn_sequences sequences = c.inputs();
  const int64_t lengths[] = {9, 9, 10, 9, 9};
  sequences.lengths = lengths;
  CHECK_EQUAL(interfuse_rnn_forward(c.plan, &sequences, c.weights.data(), c.y->data(), c.hn->data(), c.cn->data(),
                                    c.reserve->data(), 1),
              INTERFUSE_INVALID);
  CHECK(std::string(interfuse_last_error()).find("sequence 2 is 10") != std::string::npos);
}
