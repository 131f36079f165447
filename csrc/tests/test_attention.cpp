// attention through the C API against plain double loops: every buffer between guard pages, both dtypes, every mask,
// lengths, grouped heads, one to three threads.
#include <cmath>

#include "interfuse.h"
#include "tests/values.h"

using namespace interfuse_test;

namespace {

struct Problem {
  const char* name;
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  int mask, causal, ragged;
};

const Problem kProblems[] = {
    {"plain", 2, 3, 3, 13, 21, 8, 8, INTERFUSE_MASK_NONE, 0, 0},
    {"one of each", 1, 1, 1, 1, 1, 1, 1, INTERFUSE_MASK_NONE, 0, 0},
    {"tails", 1, 2, 2, 37, 65, 17, 33, INTERFUSE_MASK_NONE, 0, 0},
    {"several blocks of keys", 1, 1, 1, 26, 1100, 32, 32, INTERFUSE_MASK_NONE, 0, 0},
    {"several passes of queries", 1, 1, 1, 800, 20, 48, 48, INTERFUSE_MASK_NONE, 0, 0},
    {"more tiles than a pass of the matrix units takes", 1, 1, 1, 1100, 40, 40, 20, INTERFUSE_MASK_NONE, 0, 0},
    {"several blocks on the matrix units", 2, 2, 1, 35, 600, 70, 33, INTERFUSE_MASK_ADDITIVE, 1, 1},
    {"grouped, ragged", 3, 4, 2, 15, 33, 16, 16, INTERFUSE_MASK_NONE, 0, 1},
    {"causal", 2, 1, 1, 140, 150, 8, 8, INTERFUSE_MASK_NONE, 1, 0},
    {"boolean mask", 2, 2, 2, 11, 35, 8, 16, INTERFUSE_MASK_BOOLEAN, 0, 0},
    {"additive mask, causal, ragged", 3, 2, 1, 30, 140, 24, 40, INTERFUSE_MASK_ADDITIVE, 1, 1},
    {"no keys", 1, 1, 1, 3, 0, 4, 4, INTERFUSE_MASK_NONE, 0, 0},
    {"empty batch", 0, 1, 1, 3, 4, 4, 4, INTERFUSE_MASK_NONE, 0, 0},
};

// (batch, head, row) of a dense (batch, row, head, size), which is what a projection leaves.
void lay_out(int64_t (&strides)[3], int64_t heads, int64_t rows, int64_t size) {
  strides[0] = rows * heads * size, strides[1] = size, strides[2] = heads * size;
}

interfuse_attention_spec spec_of(const Problem& p, int dtype) {
  interfuse_attention_spec s;
  interfuse_attention_defaults(&s);
  s.dtype = dtype, s.mask = p.mask, s.causal = p.causal;
  s.scale = 1.f / std::sqrt(static_cast<float>(p.head_dim));
  s.batch = p.batch, s.heads = p.heads, s.kv_heads = p.kv_heads, s.queries = p.queries, s.keys = p.keys;
  s.head_dim = p.head_dim, s.value_dim = p.value_dim;
  lay_out(s.q_strides, p.heads, p.queries, p.head_dim), lay_out(s.grad_q_strides, p.heads, p.queries, p.head_dim);
  lay_out(s.k_strides, p.kv_heads, p.keys, p.head_dim), lay_out(s.grad_k_strides, p.kv_heads, p.keys, p.head_dim);
  lay_out(s.v_strides, p.kv_heads, p.keys, p.value_dim), lay_out(s.grad_v_strides, p.kv_heads, p.keys, p.value_dim);
  lay_out(s.y_strides, p.heads, p.queries, p.value_dim);
  s.mask_strides[2] = p.keys;  // one for all batch entries and heads
  return s;
}

struct Truth {
  Doubles y, weights, grad_q, grad_k, grad_v;
};

Truth naive(const Problem& p, const interfuse_attention_spec& s, const Doubles& q, const Doubles& k, const Doubles& v,
            const Doubles& mask, const int64_t* q_lengths, const int64_t* kv_lengths, const Doubles& grad_y) {
  Truth t{Doubles(grad_y.size()), Doubles(p.batch * p.heads * p.queries * p.keys), Doubles(q.size()), Doubles(k.size()),
          Doubles(v.size())};
  const auto at = [](const int64_t (&strides)[3], int64_t b, int64_t h, int64_t r) { return b * strides[0] + h * strides[1] + r * strides[2]; };
  Doubles weight(p.keys), slope(p.keys);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t i = 0; i < (p.ragged ? q_lengths[b] : p.queries); ++i) {
        const int64_t g = h / (p.heads / p.kv_heads), keys = p.ragged ? kv_lengths[b] : p.keys;
        const int64_t qi = at(s.q_strides, b, h, i), yi = at(s.y_strides, b, h, i);
        double most = -INFINITY, total = 0, mean = 0;
        for (int64_t j = 0; j < keys; ++j) {
          double score = 0;
          for (int64_t d = 0; d < p.head_dim; ++d) score += q[qi + d] * k[at(s.k_strides, b, g, j) + d];
          weight[j] = score * s.scale;
          if (p.mask == INTERFUSE_MASK_ADDITIVE) weight[j] += mask[i * p.keys + j];
          if ((p.mask == INTERFUSE_MASK_BOOLEAN && mask[i * p.keys + j] == 0) || (p.causal && j > i)) weight[j] = -INFINITY;
          most = std::max(most, weight[j]);
        }
        if (most == -INFINITY) continue;
        for (int64_t j = 0; j < keys; ++j) total += weight[j] = std::exp(weight[j] - most);
        for (int64_t j = 0; j < keys; ++j) {
          weight[j] /= total, slope[j] = 0;
          t.weights[((b * p.heads + h) * p.queries + i) * p.keys + j] = weight[j];
          const int64_t vj = at(s.v_strides, b, g, j);
          for (int64_t d = 0; d < p.value_dim; ++d) {
            t.y[yi + d] += weight[j] * v[vj + d];
            t.grad_v[vj + d] += weight[j] * grad_y[yi + d];
            slope[j] += grad_y[yi + d] * v[vj + d];
          }
          mean += weight[j] * slope[j];
        }
        for (int64_t j = 0; j < keys; ++j) {
          const double score = weight[j] * (slope[j] - mean) * s.scale;
          const int64_t kj = at(s.k_strides, b, g, j);
          for (int64_t d = 0; d < p.head_dim; ++d) t.grad_q[qi + d] += score * k[kj + d], t.grad_k[kj + d] += score * q[qi + d];
        }
      }
  return t;
}

template <class T>
void check(const Problem& p, int dtype, int threads, Flush flush) {
  const Context context(std::string(p.name) + (dtype == INTERFUSE_FLOAT32 ? ", float32, " : ", bfloat16, ") + std::to_string(threads) + " threads");
  const interfuse_attention_spec s = spec_of(p, dtype);
  const int64_t q_size = p.batch * p.heads * p.queries * p.head_dim, y_size = p.batch * p.heads * p.queries * p.value_dim;
  const int64_t k_size = p.batch * p.kv_heads * p.keys * p.head_dim, v_size = p.batch * p.kv_heads * p.keys * p.value_dim;
  const int64_t rows = p.batch * p.heads * p.queries;
  Guarded<T> q(q_size, flush), k(k_size, flush), v(v_size, flush), y(y_size, flush), grad_y(y_size, flush), weights(rows * p.keys, flush);
  Guarded<T> grad_q(q_size, flush), grad_k(k_size, flush), grad_v(v_size, flush), added(p.queries * p.keys, flush);
  Guarded<uint8_t> allowed(p.queries * p.keys, flush);
  Guarded<float> lse(rows, flush);
  Guarded<int64_t> q_lengths(p.batch, flush), kv_lengths(p.batch, flush);
  const Doubles q_values = fill(q, Values::reals, 1), k_values = fill(k, Values::reals, 2), v_values = fill(v, Values::reals, 3);
  const Doubles grad_values = fill(grad_y, Values::reals, 4);
  Doubles mask = fill(added, Values::reals, 5);
  for (int64_t i = 0; i < allowed.size(); ++i) {
    allowed[i] = i % 7 != 3 && i / std::max<int64_t>(p.keys, 1) != 2;  // row 2 attends to nothing
    if (p.mask == INTERFUSE_MASK_BOOLEAN) mask[i] = allowed[i];
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    q_lengths[b] = b == 1 ? 0 : p.queries - 2 * b;
    kv_lengths[b] = b == 2 ? 0 : p.keys - 3 * b;
  }
  const void* mask_data = p.mask == INTERFUSE_MASK_BOOLEAN ? static_cast<const void*>(allowed.data()) : added.data();
  const interfuse_attention_inputs in{q.data(), k.data(), v.data(), p.mask ? mask_data : nullptr,
                                      p.ragged ? q_lengths.data() : nullptr, p.ragged ? kv_lengths.data() : nullptr};
  const Truth truth = naive(p, s, q_values, k_values, v_values, mask, q_lengths.data(), kv_lengths.data(), grad_values);
  CHECK_EQUAL(interfuse_attention_forward(&s, &in, y.data(), lse.data(), weights.data(), threads), INTERFUSE_OK);
  // Two products and an exponential in float32; in bfloat16 one rounding, for gradients that of y too.
  const bool half = dtype == INTERFUSE_BFLOAT16;
  compare("y", read(y), truth.y, half ? kRoundedToBfloat16 : 2e-6);
  compare("weights", read(weights), truth.weights, half ? kRoundedToBfloat16 : 2e-6);
  CHECK_EQUAL(interfuse_attention_backward(&s, &in, y.data(), lse.data(), grad_y.data(), grad_q.data(), grad_k.data(),
                                           grad_v.data(), threads), INTERFUSE_OK);
  compare("grad_q", read(grad_q), truth.grad_q, half ? 1.2e-2 : 1e-5, 0.1);
  compare("grad_k", read(grad_k), truth.grad_k, half ? 1.2e-2 : 1e-5, 0.1);
  compare("grad_v", read(grad_v), truth.grad_v, half ? 1.2e-2 : 1e-5);
  CHECK(y.intact() && lse.intact() && weights.intact() && grad_q.intact() && grad_k.intact() && grad_v.intact());
}

}  // namespace

TEST(attention_against_double_loops) {
  for (const Problem& p : kProblems)
    for (int threads : {1, 2, 3})
      for (Flush flush : {Flush::front, Flush::back}) {
        check<float>(p, INTERFUSE_FLOAT32, threads, flush);
        check<uint16_t>(p, INTERFUSE_BFLOAT16, threads, flush);
      }
}

// On matrix units such a head is computed again by the vector units.
TEST(attention_an_infinity_stays_in_its_row) {
  const Problem p{"an infinity", 1, 2, 2, 40, 70, 40, 33, INTERFUSE_MASK_NONE, 0, 0};
  const interfuse_attention_spec s = spec_of(p, INTERFUSE_FLOAT32);
  const int64_t spoilt = 5, head = 1;
  for (Flush flush : {Flush::front, Flush::back}) {
    Guarded<float> q(p.heads * p.queries * p.head_dim, flush), k(p.heads * p.keys * p.head_dim, flush);
    Guarded<float> v(p.heads * p.keys * p.value_dim, flush), clean(p.heads * p.queries * p.value_dim), y(clean.size(), flush);
    fill(q, Values::reals, 1), fill(k, Values::reals, 2), fill(v, Values::reals, 3);
    const interfuse_attention_inputs in{q.data(), k.data(), v.data(), nullptr, nullptr, nullptr};
    CHECK_EQUAL(interfuse_attention_forward(&s, &in, clean.data(), nullptr, nullptr, 2), INTERFUSE_OK);
    q[spoilt * s.q_strides[2] + head * s.q_strides[1] + 3] = INFINITY;
    CHECK_EQUAL(interfuse_attention_forward(&s, &in, y.data(), nullptr, nullptr, 2), INTERFUSE_OK);
    for (int64_t r = 0; r < p.queries; ++r)
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t d = 0; d < p.value_dim; ++d) {
          const int64_t at = r * s.y_strides[2] + h * s.y_strides[1] + d;
          CHECK(r == spoilt && h == head ? std::isnan(y[at]) : close(y[at], clean[at], h == head ? 1e-5 : 0));
        }
    CHECK(y.intact());
  }
}

TEST(attention_says_what_is_wrong) {
  interfuse_attention_spec s = spec_of(kProblems[0], INTERFUSE_FLOAT32);
  s.kv_heads = 2;
  CHECK_EQUAL(interfuse_attention_check(&s), INTERFUSE_INVALID);
  CHECK_EQUAL(std::string(interfuse_last_error()),
              "attention: heads is 3, which is no multiple of kv_heads, 2; every key head serves as many query heads.");
  s = spec_of(kProblems[0], 7);
  CHECK_EQUAL(interfuse_attention_check(&s), INTERFUSE_INVALID);
  s = spec_of(kProblems[0], INTERFUSE_FLOAT32);
  float memory[4] = {};
  int64_t lengths[2] = {3, 22};
  interfuse_attention_inputs in{memory, memory, memory, nullptr, nullptr, lengths};
  CHECK_EQUAL(interfuse_attention_forward(&s, &in, memory, nullptr, nullptr, 1), INTERFUSE_INVALID);
  CHECK_EQUAL(std::string(interfuse_last_error()),
              "attention: kv_lengths of batch entry 1 is 22; allowed is 0 to 21, the tensor's own length.");
  in = {nullptr, memory, memory, nullptr, nullptr, nullptr};
  CHECK_EQUAL(interfuse_attention_forward(&s, &in, memory, nullptr, nullptr, 1), INTERFUSE_INVALID);
  CHECK_EQUAL(interfuse_attention_forward(&s, nullptr, memory, nullptr, nullptr, 1), INTERFUSE_INVALID);
}

TEST(attention_pool_against_double_loops) {
  for (int threads : {1, 2})
    for (Flush flush : {Flush::front, Flush::back}) {
      const int64_t batch = 3, steps = 21, width = 37, hidden = 18;
      const interfuse_attention_pool_spec s{INTERFUSE_FLOAT32, batch, steps, width, hidden, {steps * width, width}, {steps * hidden, hidden}};
      Guarded<float> x(batch * steps * width, flush), h(batch * steps * hidden, flush), u(hidden, flush), y(batch * width, flush);
      Guarded<float> weights(batch * steps, flush), grad_y(batch * width, flush), grad_weights(batch * steps, flush);
      Guarded<float> grad_x(x.size(), flush), grad_h(h.size(), flush), grad_u(batch * hidden, flush);
      const Doubles xs = fill(x, Values::reals, 1), hs = fill(h, Values::reals, 2), us = fill(u, Values::reals, 3);
      const Doubles gy = fill(grad_y, Values::reals, 4), gw = fill(grad_weights, Values::reals, 5);
      const int64_t lengths[] = {steps, 0, 9};
      Doubles ys(y.size()), ws(weights.size()), gx(x.size()), gh(h.size()), gu(grad_u.size());
      for (int64_t b = 0; b < batch; ++b) {
        double total = 0, mean = 0;
        for (int64_t t = 0; t < lengths[b]; ++t) {
          double score = 0;
          for (int64_t a = 0; a < hidden; ++a) score += us[a] * std::tanh(hs[(b * steps + t) * hidden + a]);
          total += ws[b * steps + t] = std::exp(score);
        }
        Doubles slope(steps);
        for (int64_t t = 0; t < lengths[b]; ++t) {
          const double w = ws[b * steps + t] /= total;
          slope[t] = gw[b * steps + t];
          for (int64_t d = 0; d < width; ++d) {
            const int64_t at = (b * steps + t) * width + d;
            ys[b * width + d] += w * xs[at], gx[at] = w * gy[b * width + d], slope[t] += gy[b * width + d] * xs[at];
          }
          mean += w * slope[t];
        }
        for (int64_t t = 0; t < lengths[b]; ++t)
          for (int64_t a = 0; a < hidden; ++a) {
            const int64_t at = (b * steps + t) * hidden + a;
            const double value = std::tanh(hs[at]), ds = ws[b * steps + t] * (slope[t] - mean);
            gh[at] = ds * us[a] * (1 - value * value), gu[b * hidden + a] += ds * value;
          }
      }
      CHECK_EQUAL(interfuse_attention_pool_forward(&s, x.data(), h.data(), u.data(), lengths, y.data(), weights.data(), threads), INTERFUSE_OK);
      compare("y", read(y), ys, 2e-6);
      compare("weights", read(weights), ws, 2e-6);
      CHECK_EQUAL(interfuse_attention_pool_backward(&s, x.data(), h.data(), u.data(), lengths, grad_y.data(), grad_weights.data(),
                                                    grad_x.data(), grad_h.data(), grad_u.data(), threads), INTERFUSE_OK);
      compare("grad_x", read(grad_x), gx, 2e-6);
      compare("grad_hidden", read(grad_h), gh, 1e-5);
      compare("grad_context", read(grad_u), gu, 1e-5);
      CHECK(y.intact() && weights.intact() && grad_x.intact() && grad_h.intact() && grad_u.intact());
    }
}
