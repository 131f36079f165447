// A whole cross-attention against its parts, linear and attention, which have tests of their own: every buffer between
// guard pages, threads that divide the batch and threads that divide every stage, weights that are joined and apart.
#include <cmath>

#include "common/attention_block.h"
#include "tests/values.h"

using namespace interfuse_test;

namespace {

struct Problem {
  const char* name;
  int64_t batch, heads, kv_heads, queries, keys, head_dim, query_dim, context_dim, out_dim;
  int mask, causal, ragged, bias;
};

const Problem kProblems[] = {
    {"plain", 4, 3, 3, 13, 21, 8, 24, 24, 24, INTERFUSE_MASK_NONE, 0, 0, 1},
    {"one of each", 1, 1, 1, 1, 1, 1, 1, 1, 1, INTERFUSE_MASK_NONE, 0, 0, 0},
    {"entries in groups, on the matrix units", 6, 2, 2, 40, 70, 32, 64, 64, 64, INTERFUSE_MASK_NONE, 0, 0, 1},
    {"one entry for several threads", 1, 2, 2, 90, 130, 32, 48, 48, 48, INTERFUSE_MASK_NONE, 0, 0, 1},
    {"widths and grouped heads", 3, 4, 2, 15, 33, 16, 20, 37, 11, INTERFUSE_MASK_NONE, 0, 0, 1},
    {"lengths", 4, 2, 2, 30, 300, 32, 64, 64, 64, INTERFUSE_MASK_NONE, 0, 1, 1},
    {"boolean mask", 3, 2, 2, 11, 35, 8, 16, 16, 16, INTERFUSE_MASK_BOOLEAN, 0, 0, 0},
    {"additive mask, causal, lengths", 4, 2, 1, 30, 140, 24, 48, 48, 48, INTERFUSE_MASK_ADDITIVE, 1, 1, 1},
    {"no keys", 2, 1, 1, 3, 0, 4, 4, 4, 4, INTERFUSE_MASK_NONE, 0, 0, 1},
    {"empty batch", 0, 1, 1, 3, 4, 4, 4, 4, 4, INTERFUSE_MASK_NONE, 0, 0, 1},
};

void project(const float* x, int64_t rows, int64_t row, int64_t inputs, const float* weight, const float* bias, int64_t outputs,
             float* y) {
  interfuse_linear_spec spec;
  interfuse_linear_defaults(&spec);
  spec.rows = rows, spec.out_features = outputs, spec.inputs = 1, spec.widths = &inputs, spec.row_strides = &row;
  interfuse_linear* plan = nullptr;
  CHECK_EQUAL(interfuse_linear_create(&spec, &plan), INTERFUSE_OK);
  const void* const from[] = {x};
  const interfuse_linear_weights weights{weight, nullptr, bias};
  CHECK_EQUAL(interfuse_linear_forward(plan, from, &weights, y, nullptr, 1), INTERFUSE_OK);
  interfuse_linear_destroy(plan);
}

struct Tensors {
  Guarded<float> query, context, in_weight, in_bias, out_weight, out_bias, added;
  Guarded<uint8_t> allowed;
  Guarded<int64_t> lengths;

  Tensors(const Problem& p, int64_t row, Flush flush)
      : query(p.batch * p.queries * row, flush), context(p.batch * p.keys * p.context_dim, flush),
        in_weight(p.heads * p.head_dim * p.query_dim + 2 * p.kv_heads * p.head_dim * p.context_dim, flush),
        in_bias((p.heads + 2 * p.kv_heads) * p.head_dim, flush), out_weight(p.out_dim * p.heads * p.head_dim, flush),
        out_bias(p.out_dim, flush), added(p.batch * p.queries * p.keys, flush), allowed(added.size(), flush),
        lengths(p.batch, flush) {
    unsigned seed = 0;
    for (Guarded<float>* t : {&query, &context, &in_weight, &in_bias, &out_weight, &out_bias, &added}) fill(*t, Values::reals, ++seed);
    for (int64_t i = 0; i < allowed.size(); ++i) allowed[i] = i % 7 != 3;
    for (int64_t b = 0; b < p.batch; ++b) lengths[b] = b == 1 ? 0 : p.keys / (b + 1);
  }
};

// Joined: the three weights lie in one tensor, as their biases do, and the query is the context where it may be.
void check(const Problem& p, int threads, Flush flush, bool joined) {
  const Context context(std::string(p.name) + (joined ? ", joined" : ", apart") + ", " + std::to_string(threads) + " threads");
  const int64_t row = p.query_dim + (joined ? 0 : 3), q_width = p.heads * p.head_dim, kv_width = p.kv_heads * p.head_dim;
  Tensors t(p, row, flush);
  const float *weight = t.in_weight.data(), *bias = p.bias ? t.in_bias.data() : nullptr;
  interfuse_attention_block_tensors in{};
  in.query = t.query.data(), in.context = t.context.data();
  in.mask = p.mask == INTERFUSE_MASK_BOOLEAN ? static_cast<const void*>(t.allowed.data()) : p.mask ? t.added.data() : nullptr;
  in.kv_lengths = p.ragged ? t.lengths.data() : nullptr;
  in.q_weight = weight, in.k_weight = weight + q_width * p.query_dim;
  in.v_weight = joined ? in.k_weight + kv_width * p.context_dim : in.k_weight;
  if (bias) in.q_bias = bias, in.k_bias = bias + q_width, in.v_bias = joined ? bias + q_width + kv_width : in.k_bias;
  in.out_weight = t.out_weight.data(), in.out_bias = p.bias ? t.out_bias.data() : nullptr;
  const bool itself = joined && p.queries == p.keys;
  if (itself) in.context = in.query;

  const int64_t rows = p.batch * p.queries, context_rows = p.batch * p.keys;
  std::vector<float> q(rows * q_width), k(context_rows * kv_width), v(k.size()), between(q.size()), expected(rows * p.out_dim);
  interfuse_attention_spec s;
  interfuse_attention_defaults(&s);
  s.mask = p.mask, s.causal = p.causal, s.scale = 1.f / std::sqrt(static_cast<float>(p.head_dim));
  s.batch = p.batch, s.heads = p.heads, s.kv_heads = p.kv_heads, s.queries = p.queries, s.keys = p.keys;
  s.head_dim = s.value_dim = p.head_dim;
  const auto lay_out = [&](int64_t (&strides)[3], int64_t length, int64_t width) {
    strides[0] = length * width, strides[1] = p.head_dim, strides[2] = width;
  };
  lay_out(s.q_strides, p.queries, q_width), lay_out(s.y_strides, p.queries, q_width);
  lay_out(s.k_strides, p.keys, kv_width), lay_out(s.v_strides, p.keys, kv_width);
  s.mask_strides[0] = p.queries * p.keys, s.mask_strides[2] = p.keys;
  project(in.query, rows, row, p.query_dim, in.q_weight, in.q_bias, q_width, q.data());
  project(in.context, context_rows, p.context_dim, p.context_dim, in.k_weight, in.k_bias, kv_width, k.data());
  project(in.context, context_rows, p.context_dim, p.context_dim, in.v_weight, in.v_bias, kv_width, v.data());
  const interfuse_attention_inputs inner{q.data(), k.data(), v.data(), in.mask, nullptr, in.kv_lengths};
  CHECK_EQUAL(interfuse_attention_forward(&s, &inner, between.data(), nullptr, nullptr, 1), INTERFUSE_OK);
  project(between.data(), rows, q_width, q_width, in.out_weight, in.out_bias, p.out_dim, expected.data());

  interfuse_attention_block_spec spec{p.mask, p.causal, s.scale, p.batch, p.heads, p.kv_heads, p.queries, p.keys, p.head_dim,
                                      p.query_dim, p.context_dim, p.out_dim, row, p.context_dim,
                                      {s.mask_strides[0], s.mask_strides[1], s.mask_strides[2]}};
  interfuse_attention_block* plan = nullptr;
  CHECK_EQUAL(interfuse_attention_block_create(&spec, &plan), INTERFUSE_OK);
  Guarded<float> y(rows * p.out_dim, flush);
  CHECK_EQUAL(interfuse_attention_block_forward(plan, &in, y.data(), threads), INTERFUSE_OK);
  interfuse_attention_block_destroy(plan);
  // The same sums; few rows at a time are multiplied by the vector units, many by the matrix units.
  compare("y", read(y), Doubles(expected.begin(), expected.end()), 2e-6);
  CHECK(y.intact());
}

}  // namespace

TEST(attention_block_is_its_parts) {
  for (const Problem& p : kProblems)
    for (int threads : {1, 2, 3})
      for (Flush flush : {Flush::front, Flush::back})
        for (bool joined : {false, true}) check(p, threads, flush, joined);
}

TEST(attention_block_of_a_sequence_with_itself_is_its_parts) {
  for (int threads : {1, 2}) check({"itself", 4, 2, 2, 40, 40, 32, 64, 64, 64, INTERFUSE_MASK_NONE, 1, 0, 1}, threads, Flush::back, true);
}

TEST(attention_block_says_what_is_wrong) {
  interfuse_attention_block_spec spec{INTERFUSE_MASK_NONE, 0, 1.f, 2, 1, 1, 3, 5, 4, 4, 0, 4, 4, 4, {0, 0, 0}};
  interfuse_attention_block* plan = nullptr;
  CHECK_EQUAL(interfuse_attention_block_create(&spec, &plan), INTERFUSE_INVALID);
  CHECK_EQUAL(std::string(interfuse_last_error()), "attention_block: context_dim is 0; allowed is 1 to 2147483647.");
  spec.context_dim = 4;
  CHECK_EQUAL(interfuse_attention_block_create(&spec, &plan), INTERFUSE_OK);
  float memory[64] = {};
  const int64_t lengths[2] = {3, 6};
  interfuse_attention_block_tensors in{memory, memory, nullptr, lengths, memory, memory, memory, memory, nullptr, nullptr, nullptr, nullptr};
  CHECK_EQUAL(interfuse_attention_block_forward(plan, &in, memory, 1), INTERFUSE_INVALID);
  CHECK_EQUAL(std::string(interfuse_last_error()),
              "attention: kv_lengths of batch entry 1 is 6; allowed is 0 to 5, the tensor's own length.");
  in.kv_lengths = nullptr, in.v_weight = nullptr;
  CHECK_EQUAL(interfuse_attention_block_forward(plan, &in, memory, 1), INTERFUSE_INVALID);
  CHECK_EQUAL(interfuse_attention_block_forward(plan, nullptr, memory, 1), INTERFUSE_INVALID);
  CHECK_EQUAL(interfuse_attention_block_forward(nullptr, &in, memory, 1), INTERFUSE_INVALID);
  interfuse_attention_block_destroy(plan);
}
