// InfoNCE through the C API against plain double loops: every buffer between guard pages, both dtypes, one and two
// threads, with the matrix of similarities kept and computed again, with exponentials summed as they are and below maxima.
#include <cmath>
#include <vector>

#include "interfuse.h"
#include "tests/values.h"

using namespace interfuse_test;

namespace {

struct Problem {
  int64_t rows, features;
  bool symmetric, normalize;
  float temperature;
  int reduction;
};

// clang-format off
const Problem kProblems[] = {
    {1, 3, true, true, 0.5f, INTERFUSE_REDUCE_SUM},
    {5, 17, true, true, 0.07f, INTERFUSE_REDUCE_MEAN},
    {33, 16, false, true, 0.01f, INTERFUSE_REDUCE_NONE},
    {66, 65, true, true, 0.01f, INTERFUSE_REDUCE_NONE},
    {66, 65, true, false, 1, INTERFUSE_REDUCE_MEAN},
    {140, 9, true, false, 0.1f, INTERFUSE_REDUCE_SUM},
    {530, 5, true, true, 0.2f, INTERFUSE_REDUCE_NONE},
    {530, 5, true, false, 0.25f, INTERFUSE_REDUCE_MEAN},
    {715, 66, true, true, 0.07f, INTERFUSE_REDUCE_MEAN},  // enough for matrix units
    {1030, 32, false, true, 0.2f, INTERFUSE_REDUCE_SUM},  // and one pair of their panels
    {0, 4, true, true, 1, INTERFUSE_REDUCE_SUM},
};
// clang-format on

struct Truth {
  Doubles loss, by_a, by_b;
  double by_temperature = 0;
};

Truth truth_of(const Problem& p, const Doubles& a, const Doubles& b, const Doubles& grad_loss) {
  const size_t n = static_cast<size_t>(p.rows), d = static_cast<size_t>(p.features);
  Doubles u = a, v = b, lengths[2];
  for (Doubles* side : {&u, &v}) {
    for (size_t r = 0; r < n; ++r) {
      double square = 0;
      for (size_t k = 0; k < d; ++k) square += (*side)[r * d + k] * (*side)[r * d + k];
      const double length = p.normalize ? std::sqrt(square) : 1;
      lengths[side == &v].push_back(length);
      for (size_t k = 0; k < d; ++k) (*side)[r * d + k] /= length;
    }
  }
  Doubles z(n * n), grad(n * n);
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j)
      for (size_t k = 0; k < d; ++k) z[i * n + j] += u[i * d + k] * v[j * d + k] / p.temperature;
  Truth t;
  t.by_a.resize(n * d), t.by_b.resize(n * d);
  double total = 0;
  for (size_t i = 0; i < n; ++i) {
    double loss = 0;
    const double scale = grad_loss[p.reduction == INTERFUSE_REDUCE_NONE ? i : 0] / (p.symmetric ? 2 : 1) /
                         (p.reduction == INTERFUSE_REDUCE_MEAN ? static_cast<double>(n) : 1);
    for (int side = 0; side < (p.symmetric ? 2 : 1); ++side) {
      const auto at = [&](size_t j) { return side ? j * n + i : i * n + j; };
      double most = -1e300, sum = 0;
      for (size_t j = 0; j < n; ++j) most = std::max(most, z[at(j)]);
      for (size_t j = 0; j < n; ++j) sum += std::exp(z[at(j)] - most);
      for (size_t j = 0; j < n; ++j) grad[at(j)] += scale * (std::exp(z[at(j)] - most) / sum - (i == j));
      loss += (most + std::log(sum) - z[i * n + i]) / (p.symmetric ? 2 : 1);
    }
    t.loss.push_back(loss);
    total += loss;
  }
  if (p.reduction != INTERFUSE_REDUCE_NONE)
    t.loss = {p.reduction == INTERFUSE_REDUCE_MEAN ? total / static_cast<double>(n) : total};
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j) {
      t.by_temperature -= grad[i * n + j] * z[i * n + j] / p.temperature;
      for (size_t k = 0; k < d; ++k) {
        t.by_a[i * d + k] += grad[i * n + j] * v[j * d + k] / p.temperature;
        t.by_b[j * d + k] += grad[i * n + j] * u[i * d + k] / p.temperature;
      }
    }
  const auto unscale = [&](Doubles& g, const Doubles& x, const Doubles& length) {
    for (size_t r = 0; r < n && p.normalize; ++r) {
      double along = 0;
      for (size_t k = 0; k < d; ++k) along += g[r * d + k] * x[r * d + k];
      for (size_t k = 0; k < d; ++k) g[r * d + k] = (g[r * d + k] - along * x[r * d + k]) / length[r];
    }
  };
  unscale(t.by_a, u, lengths[0]), unscale(t.by_b, v, lengths[1]);
  return t;
}

struct Run : Setting {
  bool kept, losses;  // what backward is given
};

constexpr Run kRuns[] = {{kSettings[0], false, true}, {kSettings[1], true, true}, {kSettings[2], false, false}, {kSettings[3], true, false}};

template <class T>
void run(const Problem& p, int dtype, const Run& how) {
  std::ostringstream text;
  text << p.rows << " rows, " << p.features << " features, symmetric " << p.symmetric << ", normalize " << p.normalize
       << ", temperature " << p.temperature << ", dtype " << dtype << ", kept " << how.kept << ", " << how;
  const Context context(text.str());
  const int64_t count = p.rows * p.features, losses = p.reduction == INTERFUSE_REDUCE_NONE ? p.rows : 1;
  Guarded<T> a(count, how.flush, how.offset), b(count, how.flush, how.offset), by_a(count, how.flush, how.offset),
      by_b(count, how.flush, how.offset);
  const float size = p.normalize ? 1 : 1 / std::sqrt(static_cast<float>(p.features));
  const Doubles as = fill(a, Values::reals, 1, size), bs = fill(b, Values::reals, 2, size);
  Guarded<float> loss(losses, how.flush, how.offset), grad_loss(losses), lse(p.rows, how.flush, how.offset),
      other_lse(p.rows, how.flush, how.offset), each(p.rows, how.flush, how.offset), other(p.rows, how.flush, how.offset),
      kept(how.kept ? p.rows * (p.rows + p.rows / 16 + 64) : 0, how.flush, how.offset);
  const Doubles grads = fill_by(grad_loss, grad_of_loss);
  const interfuse_info_nce_spec spec{dtype, p.reduction, p.symmetric, p.normalize, p.rows, p.features, p.temperature};
  interfuse_info_nce_sums sums{lse.data(), other_lse.data(), each.data(), other.data()};
  float* const room = how.kept ? kept.data() : nullptr;
  CHECK_EQUAL(interfuse_info_nce_forward(&spec, a.data(), b.data(), loss.data(), &sums, room, how.threads), INTERFUSE_OK);
  if (!how.losses) sums.loss = sums.other_loss = nullptr;
  double along = 0;
  CHECK_EQUAL(interfuse_info_nce_backward(&spec, a.data(), b.data(), &sums, room, grad_loss.data(), by_a.data(), by_b.data(), &along,
                                          how.threads),
              INTERFUSE_OK);
  const Truth truth = truth_of(p, as, bs, grads);
  const bool half = dtype == INTERFUSE_BFLOAT16;
  // Without the losses, 1 - exp(-loss) has the error of the largest similarity.
  const double tolerance = half ? kRoundedToBfloat16 : how.losses ? 1e-5 : 4e-5, least = p.rows == 1 ? 1 : 0;
  compare("loss", read(loss), truth.loss, 1e-5, least);
  compare("grad_a", read(by_a), truth.by_a, tolerance, least);
  compare("grad_b", read(by_b), truth.by_b, tolerance, least);
  compare("grad of the temperature", {-along / p.temperature}, {truth.by_temperature}, 1e-4, 1e-2);
  for (const Guarded<float>* g : {&loss, &lse, &other_lse, &each, &other, &kept}) CHECK(g->intact());
  CHECK(by_a.intact());
  CHECK(by_b.intact());
}

}  // namespace

TEST(info_nce_float32) {
  for (const Problem& p : kProblems)
    for (const Run& how : kRuns) run<float>(p, INTERFUSE_FLOAT32, how);
}
TEST(info_nce_bfloat16) {
  for (const Problem& p : kProblems)
    for (const Run& how : kRuns) run<uint16_t>(p, INTERFUSE_BFLOAT16, how);
}

TEST(info_nce_refuses_with_a_sentence) {
  const float x[2] = {1, 2};
  float loss = 0, row = 0;
  interfuse_info_nce_sums sums{&row, nullptr, &row, nullptr};
  interfuse_info_nce_spec spec{INTERFUSE_FLOAT32, INTERFUSE_REDUCE_MEAN, 0, 1, 1, 2, 0};
  const auto forward = [&] { return interfuse_info_nce_forward(&spec, x, x, &loss, &sums, nullptr, 1); };
  CHECK_EQUAL(forward(), INTERFUSE_INVALID);
  CHECK(std::string(interfuse_last_error()).find("the temperature is 0; it must be a finite number above 0") != std::string::npos);
  spec.temperature = 1;
  CHECK_EQUAL(forward(), INTERFUSE_OK);
  spec.symmetric = 1;
  CHECK_EQUAL(forward(), INTERFUSE_INVALID);
  spec.symmetric = 0, spec.features = 0;
  CHECK_EQUAL(forward(), INTERFUSE_INVALID);
}
