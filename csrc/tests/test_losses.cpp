// Cross-entropy of a linear layer through the C API against plain double loops: every buffer between guard pages, flush
// with either end or misaligned, both dtypes, one and two threads, gradients with the loss and after it.
#include <cmath>
#include <vector>

#include "interfuse.h"
#include "tests/values.h"

using namespace interfuse_test;

namespace {

struct Problem {
  int64_t rows, classes, features;
  bool bias, weighted;
  float smoothing;
  int reduction;
};

// clang-format off
const Problem kProblems[] = {
    {1, 1, 1, true, false, 0, INTERFUSE_REDUCE_SUM},
    {1, 7, 17, true, true, 0.25f, INTERFUSE_REDUCE_MEAN},
    {5, 131, 16, false, false, 0, INTERFUSE_REDUCE_MEAN},
    {17, 133, 33, true, false, 0.1f, INTERFUSE_REDUCE_NONE},
    {66, 265, 65, true, true, 0, INTERFUSE_REDUCE_SUM},
    {130, 20, 131, true, false, 0, INTERFUSE_REDUCE_MEAN},
    {530, 10, 5, true, true, 0.5f, INTERFUSE_REDUCE_NONE},
    {530, 1003, 65, true, false, 0, INTERFUSE_REDUCE_SUM},  // enough for matrix units
    {1050, 1003, 32, true, true, 0, INTERFUSE_REDUCE_MEAN},  // and one pair of their panels
    {0, 4, 3, true, false, 0, INTERFUSE_REDUCE_SUM},
};
// clang-format on

struct Truth {
  Doubles loss, lse, by_input, by_weight, by_bias;
};

Truth truth_of(const Problem& p, const Doubles& x, const Doubles& w, const Doubles& b, const Doubles& class_weight,
               const std::vector<int64_t>& target, const Doubles& grad_loss) {
  Truth t;
  t.by_input.resize(x.size()), t.by_weight.resize(w.size()), t.by_bias.resize(b.size());
  double all = 0, labels = 0, total = 0;
  for (double v : class_weight) all += v;
  for (int64_t label : target) labels += label < 0 ? 0 : class_weight[label];
  const double divisor = p.reduction == INTERFUSE_REDUCE_MEAN ? labels : 1;
  for (int64_t r = 0; r < p.rows; ++r) {
    Doubles z(static_cast<size_t>(p.classes));
    double most = -1e300, sum = 0, spread = 0;
    for (int64_t j = 0; j < p.classes; ++j) {
      if (p.bias) z[j] = b[j];
      for (int64_t k = 0; k < p.features; ++k) z[j] += x[r * p.features + k] * w[j * p.features + k];
      most = std::max(most, z[j]);
      spread += class_weight[j] * z[j];
    }
    for (double v : z) sum += std::exp(v - most);
    const double lse = most + std::log(sum);
    t.lse.push_back(lse);
    const bool counts = target[r] >= 0;
    const double of_label = counts ? (1.0 - p.smoothing) * class_weight[target[r]] : 0;
    const double of_class = counts ? p.smoothing / static_cast<double>(p.classes) : 0;
    const double loss = counts ? of_label * (lse - z[target[r]]) + of_class * (all * lse - spread) : 0;
    t.loss.push_back(loss);
    total += loss;
    const double scale = grad_loss[p.reduction == INTERFUSE_REDUCE_NONE ? r : 0] / divisor;
    for (int64_t j = 0; j < p.classes && counts; ++j) {
      double grad = std::exp(z[j] - lse) * (of_label + of_class * all) - of_class * class_weight[j];
      if (j == target[r]) grad -= of_label;
      grad *= scale;
      t.by_bias[j] += grad;
      for (int64_t k = 0; k < p.features; ++k) {
        t.by_input[r * p.features + k] += grad * w[j * p.features + k];
        t.by_weight[j * p.features + k] += grad * x[r * p.features + k];
      }
    }
  }
  if (p.reduction != INTERFUSE_REDUCE_NONE) t.loss = {total / divisor};
  return t;
}

template <class T>
void run(const Problem& p, int dtype, const Setting& how) {
  std::ostringstream text;
  text << p.rows << " rows, " << p.classes << " classes, " << p.features << " features, reduction " << p.reduction
       << ", dtype " << dtype << ", " << how;
  const Context context(text.str());
  Guarded<T> x(p.rows * p.features, how.flush, how.offset), w(p.classes * p.features, how.flush, how.offset),
      b(p.classes, how.flush, how.offset);
  Guarded<float> class_weight(p.classes, how.flush, how.offset);
  Guarded<int64_t> target(p.rows, how.flush, how.offset);
  const float size = 1 / std::sqrt(static_cast<float>(p.features));
  const Doubles xs = fill(x, Values::reals, 1), ws = fill(w, Values::reals, 2, 2 * size), bs = fill(b, Values::reals, 3);
  Doubles weights = fill_by(class_weight, [](int64_t j) { return 0.5f + 0.25f * static_cast<float>(j % 3); });
  if (!p.weighted) weights.assign(weights.size(), 1);
  std::vector<int64_t> labels;
  for (int64_t r = 0; r < p.rows; ++r) {
    target[r] = r == 2 ? -7 : (r * 7919) % p.classes;
    labels.push_back(target[r]);
  }

  interfuse_cross_entropy_spec spec{};
  spec.dtype = dtype, spec.reduction = p.reduction, spec.rows = p.rows, spec.classes = p.classes, spec.features = p.features;
  spec.input_row_stride = p.features, spec.ignore_index = -7, spec.label_smoothing = p.smoothing;
  const interfuse_cross_entropy_tensors tensors{x.data(), w.data(), p.bias ? b.data() : nullptr,
                                                p.weighted ? class_weight.data() : nullptr, target.data()};
  const bool number = p.reduction != INTERFUSE_REDUCE_NONE;
  const int64_t losses = number ? 1 : p.rows;
  Guarded<float> loss(losses, how.flush, how.offset), lse(p.rows, how.flush, how.offset), grad_loss(losses, how.flush, how.offset);
  const Doubles ones(static_cast<size_t>(losses), 1.0), factors = fill_by(grad_loss, grad_of_loss);
  const double tolerance = dtype == INTERFUSE_BFLOAT16 ? kRoundedToBfloat16 : 1e-5;
  const auto check = [&](bool with_loss) {
    Guarded<T> by_x(x.size(), how.flush, how.offset), by_w(w.size(), how.flush, how.offset), by_b(b.size(), how.flush, how.offset);
    const interfuse_cross_entropy_gradients grads{by_x.data(), by_w.data(), by_b.data()};
    CHECK_EQUAL(interfuse_cross_entropy_forward(&spec, &tensors, loss.data(), lse.data(), with_loss ? &grads : nullptr, how.threads),
                INTERFUSE_OK);
    if (!with_loss)
      CHECK_EQUAL(interfuse_cross_entropy_backward(&spec, &tensors, lse.data(), grad_loss.data(), &grads, how.threads), INTERFUSE_OK);
    const Truth truth = truth_of(p, xs, ws, bs, weights, labels, with_loss ? ones : factors);
    // One class: the loss and all gradients are zero but for rounding.
    const double least = p.classes == 1 ? 1 : 0;
    compare("loss", read(loss), truth.loss, 1e-5, least);
    compare("lse", read(lse), truth.lse, 1e-5);
    compare("grad_input", read(by_x), truth.by_input, tolerance, least);
    compare("grad_weight", read(by_w), truth.by_weight, tolerance, least);
    compare("grad_bias", read(by_b), truth.by_bias, tolerance, least);
    CHECK(by_x.intact());
    CHECK(by_w.intact());
    CHECK(by_b.intact());
  };
  check(false);
  if (number) check(true);
  CHECK(loss.intact());
  CHECK(lse.intact());
}

}  // namespace

TEST(cross_entropy_float32) {
  for (const Problem& p : kProblems)
    for (const Setting& how : kSettings) run<float>(p, INTERFUSE_FLOAT32, how);
}
TEST(cross_entropy_bfloat16) {
  for (const Problem& p : kProblems)
    for (const Setting& how : kSettings) run<uint16_t>(p, INTERFUSE_BFLOAT16, how);
}

TEST(cross_entropy_refuses_with_a_sentence) {
  const float x[2] = {1, 2}, w[4] = {1, 2, 3, 4};
  int64_t target[1] = {5};
  float loss = 0, lse = 0;
  interfuse_cross_entropy_spec spec{};
  spec.reduction = INTERFUSE_REDUCE_MEAN, spec.rows = 1, spec.classes = 2, spec.features = 2, spec.input_row_stride = 2;
  spec.ignore_index = -100;
  interfuse_cross_entropy_tensors tensors{x, w, nullptr, nullptr, target};
  const auto forward = [&] { return interfuse_cross_entropy_forward(&spec, &tensors, &loss, &lse, nullptr, 1); };
  CHECK_EQUAL(forward(), INTERFUSE_INVALID);
  CHECK(std::string(interfuse_last_error()).find("the target of row 0 is 5; allowed are 0 to 1") != std::string::npos);
  target[0] = 1;
  CHECK_EQUAL(forward(), INTERFUSE_OK);
  spec.label_smoothing = 2;
  CHECK_EQUAL(forward(), INTERFUSE_INVALID);
  spec.label_smoothing = 0, tensors.weight = nullptr;
  CHECK_EQUAL(forward(), INTERFUSE_INVALID);
  tensors.weight = w, spec.reduction = INTERFUSE_REDUCE_NONE;
  interfuse_cross_entropy_gradients grads{};
  CHECK_EQUAL(interfuse_cross_entropy_forward(&spec, &tensors, &loss, &lse, &grads, 1), INTERFUSE_INVALID);
}

namespace {

// Losses of two matrices against their formulas: every weight's strides, both kinds, both dtypes.
template <class T>
void run_elementwise(int kind, int reduction, int dtype, const Setting& how) {
  const int64_t rows = 5, columns = 2051, count = rows * columns;  // more than one block of a row, and a tail
  std::ostringstream text;
  text << "kind " << kind << ", reduction " << reduction << ", dtype " << dtype << ", " << how;
  const Context context(text.str());
  const bool each = reduction == INTERFUSE_REDUCE_NONE;
  const int64_t losses = each ? count : 1;
  Guarded<T> x(count, how.flush, how.offset), t(count, how.flush, how.offset), grad(count, how.flush, how.offset);
  Guarded<float> weight(rows, how.flush, how.offset), positive(columns, how.flush, how.offset), loss(losses, how.flush, how.offset),
      grad_loss(losses, how.flush, how.offset);
  const Doubles xs = fill(x, Values::reals, 1, 3), ts = fill(t, Values::reals, 2, 0.3f);
  const Doubles ws = fill(weight, Values::reals, 3), ps = fill(positive, Values::reals, 4), gs = fill(grad_loss, Values::reals, 5);
  interfuse_elementwise_loss_spec spec{kind, dtype, reduction, rows, columns, {1, 0}, {0, 1}};
  const interfuse_elementwise_loss_tensors tensors{x.data(), t.data(), weight.data(), positive.data()};
  CHECK_EQUAL(interfuse_elementwise_loss(&spec, &tensors, grad_loss.data(), loss.data(), grad.data(), how.threads), INTERFUSE_OK);
  Doubles losses_of, slopes;
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = ws[i / columns], p = ps[i % columns], exp_x = std::exp(-std::fabs(xs[i]));
    const double log_one = std::log1p(exp_x) + std::max(-xs[i], 0.0), of_one = 1 + (p - 1) * ts[i];
    const double zero_share = xs[i] < 0 ? 1 / (1 + exp_x) : exp_x / (1 + exp_x);
    const bool mse = kind == INTERFUSE_LOSS_MSE;
    const double value = mse ? (xs[i] - ts[i]) * (xs[i] - ts[i]) : (1 - ts[i]) * xs[i] + of_one * log_one;
    const double slope = mse ? 2 * (xs[i] - ts[i]) : (1 - ts[i]) - of_one * zero_share;
    total += w * value;
    losses_of.push_back(w * value);
    const double scale = reduction == INTERFUSE_REDUCE_MEAN ? 1.0 / static_cast<double>(count) : 1;
    slopes.push_back(w * slope * scale * gs[each ? i : 0]);
  }
  if (!each) losses_of = {reduction == INTERFUSE_REDUCE_MEAN ? total / static_cast<double>(count) : total};
  compare("loss", read(loss), losses_of, 1e-5);
  compare("grad", read(grad), slopes, dtype == INTERFUSE_BFLOAT16 ? kRoundedToBfloat16 : 1e-5);
  CHECK(loss.intact());
  CHECK(grad.intact());
}

template <class T>
void run_contrastive(int dtype, const Setting& how) {
  const int64_t rows = 9, columns = 2051;
  Guarded<T> a(rows * columns, how.flush, how.offset), b(rows * columns, how.flush, how.offset), grad_a(rows * columns, how.flush, how.offset),
      grad_b(rows * columns, how.flush, how.offset);
  Guarded<float> target(rows), loss(rows), slope(rows), grad_loss(rows);
  const float size = 1 / std::sqrt(2 * static_cast<float>(columns));
  Doubles as = fill(a, Values::reals, 1, size), bs = fill(b, Values::reals, 2, size);
  for (int64_t k = 0; k < columns; ++k) b[3 * columns + k] = a[3 * columns + k], bs[3 * columns + k] = as[3 * columns + k];
  interfuse_contrastive_spec spec{dtype, rows, columns, 1.5f};
  for (int64_t r = 0; r < rows; ++r) target[r] = static_cast<float>(r % 2), grad_loss[r] = 1 + static_cast<float>(r);
  target[3] = 0;
  CHECK_EQUAL(interfuse_contrastive_forward(&spec, a.data(), b.data(), target.data(), loss.data(), slope.data(), how.threads), INTERFUSE_OK);
  CHECK_EQUAL(interfuse_contrastive_backward(&spec, a.data(), b.data(), slope.data(), grad_loss.data(), grad_a.data(), grad_b.data(), how.threads),
              INTERFUSE_OK);
  Doubles losses, by_a, by_b;
  for (int64_t r = 0; r < rows; ++r) {
    double square = 0;
    for (int64_t k = r * columns; k < (r + 1) * columns; ++k) square += (as[k] - bs[k]) * (as[k] - bs[k]);
    const double distance = std::sqrt(square), gap = std::max(0.0, 1.5 - distance);
    losses.push_back((target[r] * square + (1 - target[r]) * gap * gap) / 2);
    const double factor = target[r] - (distance > 0 ? (1 - target[r]) * gap / distance : 0);
    for (int64_t k = r * columns; k < (r + 1) * columns; ++k) {
      by_a.push_back(grad_loss[r] * factor * (as[k] - bs[k]));
      by_b.push_back(-by_a.back());
    }
  }
  const double tolerance = dtype == INTERFUSE_BFLOAT16 ? kRoundedToBfloat16 : 1e-5;
  compare("loss", read(loss), losses, 1e-5);
  compare("grad_a", read(grad_a), by_a, tolerance);
  compare("grad_b", read(grad_b), by_b, tolerance);
  CHECK(grad_a.intact());
  CHECK(grad_b.intact());
}

}  // namespace

TEST(elementwise_losses) {
  for (const Setting& how : kSettings)
    for (int kind : {INTERFUSE_LOSS_BCE_WITH_LOGITS, INTERFUSE_LOSS_MSE})
      for (int reduction : {INTERFUSE_REDUCE_NONE, INTERFUSE_REDUCE_MEAN, INTERFUSE_REDUCE_SUM}) {
        run_elementwise<float>(kind, reduction, INTERFUSE_FLOAT32, how);
        run_elementwise<uint16_t>(kind, reduction, INTERFUSE_BFLOAT16, how);
      }
}
TEST(contrastive_losses) {
  for (const Setting& how : kSettings) {
    run_contrastive<float>(INTERFUSE_FLOAT32, how);
    run_contrastive<uint16_t>(INTERFUSE_BFLOAT16, how);
  }
}
