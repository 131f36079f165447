// The CUDA kernels of rnn, executed on the CPU and compared with the recurrence in double precision.
#include <string>

#include "cuda/rnn_launches.h"
#include "tests/emulated_rnn.h"
#include "tests/test.h"

namespace {

using namespace interfuse;
using cuda::Arithmetic;

using Doubles = std::vector<double>;

struct Case {
  const char* name;
  int cell, directions;
  Arithmetic arithmetic;
  int64_t batch, steps, hidden;
  bool ragged, states;
  cuda::RnnMachine machine;
  int cluster, clusters, column_tiles;  // that the choice must come to
};

// Machines small enough for small sizes to need every way of sharing the work.
constexpr cuda::RnnMachine kHopper = {16, 200 << 10, 132}, kAmpere = {1, 160 << 10, 108};

const Case kCases[] = {
    {"one block, bfloat16", INTERFUSE_LSTM, 2, Arithmetic::bfloat16, 3, 4, 40, true, true, kHopper, 1, 1, 1},
    {"one block, many slices", INTERFUSE_GRU, 1, Arithmetic::float16, 9, 3, 24, true, true, kHopper, 1, 1, 1},
    {"one block, no states", INTERFUSE_RNN_RELU, 1, Arithmetic::bfloat16, 2, 3, 16, false, false, kHopper, 1, 1, 1},
    {"one block, float32", INTERFUSE_LSTM, 1, Arithmetic::float32, 5, 3, 35, true, true, kHopper, 1, 1, 1},
    {"one block, tf32", INTERFUSE_RNN_TANH, 2, Arithmetic::tf32, 4, 5, 50, true, true, kHopper, 1, 1, 1},
    {"two column tiles", INTERFUSE_GRU, 1, Arithmetic::bfloat16, 11, 3, 33, true, true, {16, 200 << 10, 1}, 1, 1, 2},
    {"cluster of four", INTERFUSE_LSTM, 1, Arithmetic::bfloat16, 3, 3, 136, true, true, kHopper, 4, 1, 1},
    {"cluster with idle blocks", INTERFUSE_GRU, 1, Arithmetic::tf32, 2, 3, 140, false, true, kHopper, 8, 1, 1},
    {"two clusters", INTERFUSE_LSTM, 1, Arithmetic::float16, 3, 3, 200, true, true, {2, 60 << 10, 132}, 2, 2, 1},
    {"two clusters, jobs in turn", INTERFUSE_RNN_TANH, 2, Arithmetic::float32, 17, 3, 60, true, true, {2, 13000, 5}, 2, 2, 1},
    {"cooperating blocks of Ampere", INTERFUSE_GRU, 1, Arithmetic::bfloat16, 2, 4, 130, true, true, kAmpere, 1, 2, 1},
};

template <class T>
double rounded(double value) {
  T element;
  cuda::put(&element, static_cast<float>(value));
  return static_cast<double>(cuda::to_float(element));
}

template <class T>
std::vector<T> elements(const Doubles& values) {
  std::vector<T> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) cuda::put(&result[i], static_cast<float>(values[i]));
  return result;
}

template <class T>
Doubles doubles(const std::vector<T>& values) {
  Doubles result(values.size());
  for (size_t i = 0; i < values.size(); ++i) result[i] = static_cast<double>(cuda::to_float(values[i]));
  return result;
}

template <class T>
Doubles random_values(size_t count, double size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, size);
  Doubles values(count);
  for (double& value : values) value = rounded<T>(normal(random));
  return values;
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

// Everything of one run; gates and grads with 4 (or 1) slots of a token as the kernels number them.
struct Run {
  Doubles pre, w, b_hn, h0, c0, y, hn, cn, gates, state;
  Doubles grad_y, grad_hn, grad_cn, grads, grad_h0, grad_c0;
};

struct Recurrence {
  const Case& c;
  int64_t gates, hidden, slots;
  std::vector<int64_t> lengths;

  explicit Recurrence(const Case& given)
      : c(given),
        gates(given.cell == INTERFUSE_LSTM ? 4 : given.cell == INTERFUSE_GRU ? 3 : 1),
        hidden(given.hidden),
        slots(gates == 1 ? 1 : 4) {
    for (int64_t b = 0; b < c.batch; ++b) lengths.push_back(c.ragged ? (b * 7 + 2) % (c.steps + 1) : c.steps);
  }

  size_t count(int64_t n) const { return static_cast<size_t>(n); }
  size_t tokens() const { return count(c.steps * c.batch * c.directions); }
  // Time comes first.
  size_t token(int d, int64_t b, int64_t s) const {
    const int64_t t = d == 0 ? s : lengths[count(b)] - 1 - s;
    return count((t * c.batch + b) * c.directions + d);
  }
  size_t state(int d, int64_t b, int64_t u) const { return count((d * c.batch + b) * hidden + u); }
  double weight(const Run& r, int d, int64_t gate, int64_t to, int64_t from) const {
    return r.w[count(((d * gates + gate) * hidden + to) * hidden + from)];
  }

  template <class T>
  Run inputs() const {
    const size_t states = count(c.directions * c.batch * hidden), h = count(hidden);
    Run r;
    r.pre = random_values<float>(tokens() * count(gates) * h, 1, 1);
    r.w = random_values<T>(count(c.directions * gates * hidden * hidden), 1 / std::sqrt(hidden), 2);
    r.b_hn = random_values<T>(gates == 3 ? count(c.directions) * h : 0, 1, 3);
    r.h0 = c.states ? random_values<T>(states, 1, 4) : Doubles(states);
    r.c0 = c.states ? random_values<T>(states, 1, 5) : Doubles(states);
    r.grad_y = random_values<T>(tokens() * h, 1, 6);
    r.grad_hn = random_values<T>(states, 1, 7);
    r.grad_cn = random_values<T>(states, 1, 8);
    r.y.assign(tokens() * h, 0);
    r.gates.assign(tokens() * 4 * h, 0);
    r.state.assign(tokens() * h, 0);
    r.grads.assign(tokens() * count(slots) * h, 0);
    r.hn = r.cn = r.grad_h0 = r.grad_c0 = Doubles(states);
    return r;
  }

  // What is multiplied is rounded to T, as the kernels must; the rest is exact.
  template <class T>
  void forward(Run& r) const {
    for (int d = 0; d < c.directions; ++d)
      for (int64_t b = 0; b < c.batch; ++b) {
        Doubles h(count(hidden)), cell(count(hidden));
        for (int64_t u = 0; u < hidden; ++u) h[count(u)] = r.h0[state(d, b, u)], cell[count(u)] = r.c0[state(d, b, u)];
        for (int64_t s = 0; s < lengths[count(b)]; ++s) {
          const size_t here = token(d, b, s);
          Doubles next = h;
          for (int64_t u = 0; u < hidden; ++u) {
            double g[4] = {}, in[4] = {};
            for (int64_t q = 0; q < gates; ++q) {
              in[q] = r.pre[(here * count(gates) + count(q)) * count(hidden) + count(u)];
              for (int64_t k = 0; k < hidden; ++k) g[q] += weight(r, d, q, u, k) * rounded<T>(h[count(k)]);
            }
            double kept[4] = {};
            double& state_now = cell[count(u)];
            if (gates == 4) {
              kept[0] = logistic(in[0] + g[0]), kept[1] = logistic(in[1] + g[1]);
              kept[2] = std::tanh(in[2] + g[2]), kept[3] = logistic(in[3] + g[3]);
              state_now = kept[1] * state_now + kept[0] * kept[2];
              next[count(u)] = kept[3] * std::tanh(state_now);
            } else if (gates == 3) {
              kept[0] = logistic(in[0] + g[0]), kept[1] = logistic(in[1] + g[1]);
              kept[3] = g[2] + r.b_hn[count(d * hidden + u)];
              kept[2] = std::tanh(in[2] + kept[0] * kept[3]);
              next[count(u)] = kept[2] + kept[1] * (h[count(u)] - kept[2]);
            } else {
              const double total = in[0] + g[0];
              next[count(u)] = c.cell == INTERFUSE_RNN_TANH ? std::tanh(total) : std::max(total, 0.0);
            }
            for (size_t q = 0; q < 4; ++q) r.gates[(here * 4 + q) * count(hidden) + count(u)] = kept[q];
            r.state[here * count(hidden) + count(u)] = state_now;
            r.y[here * count(hidden) + count(u)] = next[count(u)];
          }
          h = next;
        }
        for (int64_t u = 0; u < hidden; ++u) r.hn[state(d, b, u)] = h[count(u)], r.cn[state(d, b, u)] = cell[count(u)];
      }
  }

  // From the saved values as they are given to the kernel.
  template <class T>
  void backward(Run& r) const {
    for (int d = 0; d < c.directions; ++d)
      for (int64_t b = 0; b < c.batch; ++b) {
        const int64_t length = lengths[count(b)];
        Doubles dh(count(hidden)), dc(count(hidden));
        for (int64_t u = 0; u < hidden; ++u)
          dh[count(u)] = r.grad_hn[state(d, b, u)], dc[count(u)] = r.grad_cn[state(d, b, u)];
        for (int64_t s = length - 1; s >= 0; --s) {
          const size_t here = token(d, b, s), h = count(hidden);
          Doubles through(h), grads(count(gates) * h);
          for (size_t u = 0; u < h; ++u) {
            const double total = dh[u] + r.grad_y[here * h + u];
            const double *v = &r.gates[here * 4 * h + u], y = r.y[here * h + u];
            const size_t first = state(d, b, static_cast<int64_t>(u));
            double* to = &r.grads[here * count(slots) * h + u];
            if (gates == 4) {
              const double i = v[0], f = v[h], g = v[2 * h], o = v[3 * h], t = std::tanh(r.state[here * h + u]);
              const double before = s > 0 ? r.state[token(d, b, s - 1) * h + u] : r.c0[first];
              const double down = dc[u] + total * o * (1 - t * t);
              const double all[4] = {down * g * i * (1 - i), down * before * f * (1 - f), down * i * (1 - g * g),
                                     total * t * o * (1 - o)};
              for (size_t q = 0; q < 4; ++q) to[q * h] = grads[q * h + u] = all[q];
              dc[u] = down * f;
            } else if (gates == 3) {
              const double reset = v[0], z = v[h], n = v[2 * h], recurrent = v[3 * h];
              const double before = s > 0 ? r.y[token(d, b, s - 1) * h + u] : r.h0[first];
              const double dn = total * (1 - z) * (1 - n * n);
              to[0] = dn;
              const double all[3] = {dn * recurrent * reset * (1 - reset), total * (before - n) * z * (1 - z), dn * reset};
              for (size_t q = 0; q < 3; ++q) to[(q + 1) * h] = grads[q * h + u] = all[q];
              through[u] = total * z;
            } else {
              to[0] = grads[u] = c.cell == INTERFUSE_RNN_TANH ? total * (1 - y * y) : y > 0 ? total : 0;
            }
          }
          for (int64_t q = 0; q < gates; ++q)
            for (int64_t k = 0; k < hidden; ++k)
              for (int64_t u = 0; u < hidden; ++u)
                through[count(u)] += weight(r, d, q, k, u) * rounded<T>(grads[count(q * hidden + k)]);
          dh = through;
        }
        for (int64_t u = 0; u < hidden; ++u)
          r.grad_h0[state(d, b, u)] = dh[count(u)], r.grad_c0[state(d, b, u)] = dc[count(u)];
      }
  }
};

double distance(const Doubles& a, const Doubles& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double apart = std::fabs(a[i] - b[i]);
    if (!(apart <= worst)) worst = apart;
  }
  return worst;
}

template <class T>
struct Kernel {
  const Case& c;
  Recurrence problem;
  int gates;
  cuda::RnnWalk walk;
  std::vector<int64_t> ends;  // of the parts that the steps come in
  std::vector<float> carry;

  explicit Kernel(const Case& given) : c(given), problem(given), gates(static_cast<int>(problem.gates)) {
    walk = {c.cell, gates, c.directions, c.arithmetic, c.batch, c.steps, c.hidden, c.batch, 1, 0, c.steps};
    ends = {c.steps};
    carry.assign(static_cast<size_t>(2 * c.batch * c.hidden), NAN);
  }

  template <class Arrays>
  void launch(bool backward, const Run& r, emulate::Order order, const Arrays& arrays) {
    const cuda::RnnTeam team = cuda::rnn_team(walk, backward, c.machine);
    CHECK(team.shared_bytes() <= c.machine.shared_bytes);
    CHECK_EQUAL(team.cluster, c.cluster);
    CHECK_EQUAL(team.clusters, c.clusters);
    CHECK_EQUAL(team.column_tiles, c.column_tiles);
    Doubles workspace(static_cast<size_t>(team.workspace_bytes(c.directions)) / 8 + 1, NAN);
    const auto w = elements<T>(r.w);
    interfuse_test::emulated_order = order;
    for (size_t i = 0; i < ends.size(); ++i) {
      const size_t part = backward ? ends.size() - 1 - i : i;
      cuda::RnnLaunch given = {walk, team, reinterpret_cast<char*>(workspace.data()), nullptr};
      given.walk.begin = part == 0 ? 0 : ends[part - 1];
      given.walk.end = ends[part];
      launch_part(given, w.data(), arrays);
    }
  }

  template <class Arrays>
  void launch_part(const cuda::RnnLaunch& given, const T* w, const Arrays& arrays) {
    switch (c.arithmetic) {
      case Arithmetic::bfloat16: return cuda::launch_bfloat16(given, w, arrays);
      case Arithmetic::float16: return cuda::launch_float16(given, w, arrays);
      case Arithmetic::tf32: return cuda::launch_tf32(given, w, arrays);
      case Arithmetic::float32: return cuda::launch_float32(given, w, arrays);
    }
  }

  // Results of a run in float64, in one list of lists.
  std::vector<Doubles> forward(const Run& r, emulate::Order order) {
    const std::vector<float> pre(r.pre.begin(), r.pre.end());
    const auto b_hn = elements<T>(r.b_hn), h0 = elements<T>(r.h0), c0 = elements<T>(r.c0);
    auto y = elements<T>(Doubles(r.y.size())), hn = elements<T>(r.h0), cn = elements<T>(r.c0);
    auto kept = elements<T>(Doubles(r.gates.size()));
    std::vector<float> state(r.state.size());
    const cuda::RnnForwardArrays a = {pre.data(), b_hn.data(), c.states ? h0.data() : nullptr,
                                      c.states ? c0.data() : nullptr, problem.lengths.data(), y.data(), hn.data(), cn.data(),
                                      gates > 1 ? kept.data() : nullptr, state.data(), carry.data()};
    launch(false, r, order, a);
    std::vector<Doubles> found = {doubles(y), doubles(hn)};
    if (gates == 4) found.push_back(doubles(cn)), found.push_back(Doubles(state.begin(), state.end()));
    if (gates > 1) found.push_back(doubles(kept));
    return found;
  }

  std::vector<Doubles> backward(const Run& r, emulate::Order order) {
    const auto h0 = elements<T>(r.h0), c0 = elements<T>(r.c0), y = elements<T>(r.y);
    const auto kept = elements<T>(r.gates), grad_y = elements<T>(r.grad_y), grad_hn = elements<T>(r.grad_hn);
    const auto grad_cn = elements<T>(r.grad_cn);
    const std::vector<float> state(r.state.begin(), r.state.end());
    auto grads = elements<T>(Doubles(r.grads.size())), grad_h0 = elements<T>(Doubles(r.h0.size(), 99)), grad_c0 = grad_h0;
    const cuda::RnnBackwardArrays a = {grad_y.data(), grad_hn.data(), grad_cn.data(),
                                       c.states ? h0.data() : nullptr, c.states ? c0.data() : nullptr,
                                       problem.lengths.data(), y.data(), kept.data(), state.data(), grads.data(),
                                       c.states ? grad_h0.data() : nullptr, grad_c0.data(), carry.data()};
    launch(true, r, order, a);
    std::vector<Doubles> found = {doubles(grads)};
    if (c.states) found.push_back(doubles(grad_h0));
    if (gates == 4) found.push_back(doubles(grad_c0));
    return found;
  }

  void check() {
    Run r = problem.inputs<T>();
    problem.forward<T>(r);
    // Values of size one to four, rounded to T a few times on their way; sums of up to 800 products.
    const double epsilon = c.arithmetic == Arithmetic::bfloat16  ? 1.0 / 256
                           : c.arithmetic == Arithmetic::float32 ? 1.0 / (1 << 22)
                                                                 : 1.0 / 2048;
    std::vector<Doubles> truth = {r.y, r.hn};
    if (gates == 4) truth.push_back(r.cn), truth.push_back(r.state);
    if (gates > 1) truth.push_back(r.gates);
    compare("forward", truth, 4 * epsilon, [&](emulate::Order order) { return forward(r, order); });
    for (Doubles* saved : {&r.y, &r.gates})
      for (double& value : *saved) value = rounded<T>(value);
    for (double& value : r.state) value = rounded<float>(value);
    problem.backward<T>(r);
    truth = {r.grads};
    if (c.states) truth.push_back(r.grad_h0);
    if (gates == 4) truth.push_back(r.grad_c0);
    compare("backward", truth, 16 * epsilon, [&](emulate::Order order) { return backward(r, order); });
  }

  template <class Find>
  void compare(const char* what, const std::vector<Doubles>& truth, double tolerance, const Find& find) {
    const interfuse_test::Context context(what);
    const std::vector<Doubles> first = find(emulate::Order::forward);
    for (size_t i = 0; i < truth.size(); ++i) CHECK(distance(first[i], truth[i]) <= tolerance);
    // Another order of threads or of copies that changes the result means that somebody did not wait.
    for (emulate::Order order : {emulate::Order::backward, emulate::Order::shuffled}) CHECK(find(order) == first);
    if (c.directions == 2) return;
    ends = {1, c.steps - 1, c.steps};
    CHECK(find(emulate::Order::shuffled) == first);
    ends = {c.steps};
  }
};

}  // namespace

TEST(cuda_rnn_emulated) {
  for (const Case& c : kCases) {
    const interfuse_test::Context context(c.name);
    if (c.arithmetic == Arithmetic::bfloat16)
      Kernel<cuda::BFloat16>(c).check();
    else if (c.arithmetic == Arithmetic::float16)
      Kernel<cuda::Float16>(c).check();
    else
      Kernel<float>(c).check();
  }
}
