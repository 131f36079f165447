// attention's C API: checks the problem and cuts the work into pieces.
#include "common/attention.h"

#include <algorithm>
#include <vector>

#include "common/error.h"
#include "common/inner.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace interfuse {
namespace {

constexpr int64_t kLeastKeys = 128;  // of a piece in backward: the block that its products work on

AttentionStrides strides(const int64_t (&from)[3]) { return {from[0], from[1], from[2]}; }

void check_inputs(const Attention& p, const interfuse_attention_inputs* in) {
  if (!in) invalid("attention: inputs is a null pointer; pass q, k and v.");
  if ((p.queries && !in->q) || (p.keys && (!in->k || !in->v))) invalid("attention: q, k or v is a null pointer; all three are needed.");
  if (p.mask != INTERFUSE_MASK_NONE && p.queries && p.keys && !in->mask)
    invalid("attention: the spec has a mask, but its pointer is null; pass the mask or set mask to INTERFUSE_MASK_NONE.");
  check_lengths("attention", "q_lengths", in->q_lengths, p.batch, p.queries);
  check_lengths("attention", "kv_lengths", in->kv_lengths, p.batch, p.keys);
}

struct WeightedPiece {
  AttentionPiece piece;
  int64_t work;
};

std::vector<AttentionPiece> heaviest_first(std::vector<WeightedPiece>& all) {
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.work > b.work; });
  std::vector<AttentionPiece> pieces;
  pieces.reserve(all.size());
  for (const WeightedPiece& one : all) pieces.push_back(one.piece);
  return pieces;
}

// Four pieces a thread keep the ends together; more would pack the keys and values more often.
std::vector<AttentionPiece> cut_queries(const Attention& p, const AttentionForward& in, int64_t tile_rows, int threads) {
  const int64_t groups = p.batch * p.kv_heads, cuts = threads == 1 ? 1 : (4 * threads + groups - 1) / groups;
  std::vector<WeightedPiece> all;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t queries = in.q_lengths ? in.q_lengths[b] : p.queries, keys = in.kv_lengths ? in.kv_lengths[b] : p.keys;
    const int64_t tiles = (queries + tile_rows - 1) / tile_rows * p.group();
    const int64_t step = std::max<int64_t>((tiles + cuts - 1) / cuts, 1);
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t begin = 0; begin == 0 || begin < tiles; begin += step) {  // without tiles too: padding is written
        const int64_t end = std::min(begin + step, tiles);
        all.push_back({{b, head, begin, end, 0}, (end - begin) * keys});
      }
  }
  return heaviest_first(all);
}

int64_t parts_of(const Attention& p, int threads) {
  const int64_t groups = p.batch * p.kv_heads, wanted = threads == 1 ? 1 : (2 * threads + groups - 1) / groups;
  return std::max<int64_t>(std::min(wanted, p.keys / kLeastKeys), 1);
}

std::vector<AttentionPiece> cut_keys(const Attention& p, const interfuse_attention_inputs& in, int64_t parts) {
  std::vector<WeightedPiece> all;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t queries = in.q_lengths ? in.q_lengths[b] : p.queries, keys = in.kv_lengths ? in.kv_lengths[b] : p.keys;
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t part = 0; part < parts; ++part) {
        const Range range = share(p.keys, static_cast<int>(part), static_cast<int>(parts));
        const int64_t here = std::max<int64_t>(std::min(range.end, keys) - range.begin, 0);
        all.push_back({{b, head, range.begin, range.end, part}, queries * here});
      }
  }
  return heaviest_first(all);
}

AttentionWork work_of(const std::vector<AttentionPiece>& pieces, int threads) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  return {pieces.data(), count, 0, static_cast<int>(std::min<int64_t>(threads, count))};
}

AttentionPool checked_pool(const interfuse_attention_pool_spec* s, const void* x, const void* hidden, const void* context,
                           const int64_t* lengths) {
  if (!s) invalid("attention_pool: the spec is a null pointer; pass one.");
  check_range("attention_pool", "dtype", s->dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("attention_pool", "batch", s->batch, 0, kMostElements);
  check_range("attention_pool", "steps", s->steps, 0, kMostElements);
  check_range("attention_pool", "width", s->width, 1, kMostElements);
  check_range("attention_pool", "hidden", s->hidden, 1, kMostElements);
  if (s->batch && ((s->steps && (!x || !hidden)) || !context))
    invalid("attention_pool: x, hidden or context is a null pointer; all three are needed.");
  check_lengths("attention_pool", "lengths", lengths, s->batch, s->steps);
  return {s->dtype == INTERFUSE_BFLOAT16, s->batch, s->steps, s->width, s->hidden,
          s->x_strides[0], s->x_strides[1], s->hidden_strides[0], s->hidden_strides[1]};
}

int pool_threads(const AttentionPool& p, int asked) {
  return static_cast<int>(std::min<int64_t>(usable_threads(asked), p.batch));
}

}  // namespace

void check_lengths(const char* op, const char* name, const int64_t* lengths, int64_t batch, int64_t most) {
  for (int64_t b = 0; lengths && b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > most)
      invalid("%s: %s of batch entry %lld is %lld; allowed is 0 to %lld, the tensor's own length.", op, name, (long long)b,
              (long long)lengths[b], (long long)most);
}

Attention checked_attention(const interfuse_attention_spec& s) {
  check_range("attention", "dtype", s.dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("attention", "mask", s.mask, INTERFUSE_MASK_NONE, INTERFUSE_MASK_ADDITIVE);
  check_range("attention", "batch", s.batch, 0, kMostElements);
  check_range("attention", "kv_heads", s.kv_heads, 1, kMostElements);
  check_range("attention", "heads", s.heads, 1, kMostElements);
  check_range("attention", "queries", s.queries, 0, kMostElements);
  check_range("attention", "keys", s.keys, 0, kMostElements);
  check_range("attention", "head_dim", s.head_dim, 1, 1 << 20);
  check_range("attention", "value_dim", s.value_dim, 1, 1 << 20);
  if (s.heads % s.kv_heads)
    invalid("attention: heads is %lld, which is no multiple of kv_heads, %lld; every key head serves as many query heads.",
            (long long)s.heads, (long long)s.kv_heads);
  return {s.dtype == INTERFUSE_BFLOAT16, s.causal != 0, s.mask, s.scale, s.batch, s.heads, s.kv_heads, s.queries, s.keys,
          s.head_dim, s.value_dim, strides(s.q_strides), strides(s.k_strides), strides(s.v_strides), strides(s.y_strides),
          strides(s.mask_strides), strides(s.grad_q_strides), strides(s.grad_k_strides), strides(s.grad_v_strides)};
}

void run_attention(const Attention& p, const AttentionForward& call, int threads) {
  const AttentionKernels* kernels = INTERFUSE_PICK(attention_kernels);
  const std::vector<AttentionPiece> pieces = cut_queries(p, call, kernels->tile_rows(p), threads);
  AttentionWork work = work_of(pieces, threads);
  kernels->forward(p, call, work);
}

}  // namespace interfuse

extern "C" {

void interfuse_attention_defaults(interfuse_attention_spec* spec) {
  *spec = interfuse_attention_spec{};
  spec->scale = 1.f;
  spec->heads = spec->kv_heads = 1;
}

interfuse_status interfuse_attention_check(const interfuse_attention_spec* spec) {
  return interfuse::guarded([&] {
    if (!spec) interfuse::invalid("attention: the spec is a null pointer; pass one.");
    interfuse::checked_attention(*spec);
  });
}

interfuse_status interfuse_attention_forward(const interfuse_attention_spec* spec, const interfuse_attention_inputs* inputs,
                                             void* y, float* lse, void* weights, int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    if (!spec) invalid("attention: the spec is a null pointer; pass one.");
    const Attention p = checked_attention(*spec);
    if (p.batch == 0 || p.queries == 0) return;
    check_inputs(p, inputs);
    if (!y) invalid("attention: y is a null pointer; pass memory for (batch, heads, queries, value_dim).");
    run_attention(p, {inputs->q, inputs->k, inputs->v, inputs->mask, inputs->q_lengths, inputs->kv_lengths, y, lse, weights},
                  usable_threads(threads));
  });
}

interfuse_status interfuse_attention_backward(const interfuse_attention_spec* spec, const interfuse_attention_inputs* inputs,
                                              const void* y, const float* lse, const void* grad_y, void* grad_q, void* grad_k,
                                              void* grad_v, int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    if (!spec) invalid("attention: the spec is a null pointer; pass one.");
    const Attention p = checked_attention(*spec);
    if (p.batch == 0 || (p.queries == 0 && p.keys == 0)) return;
    check_inputs(p, inputs);
    if (p.queries && (!y || !lse || !grad_y || !grad_q))
      invalid("attention: y, lse, grad_y or grad_q is a null pointer; backward needs what forward left and a place for each gradient.");
    if (p.keys && (!grad_k || !grad_v)) invalid("attention: grad_k or grad_v is a null pointer; backward writes both.");
    const int most = usable_threads(threads);
    const int64_t parts = parts_of(p, most);
    const std::vector<AttentionPiece> pieces = cut_keys(p, *inputs, parts);
    AttentionWork work = work_of(pieces, most);
    float* partial = parts == 1 ? nullptr : scratch_floats(Slot::other, parts * p.batch * p.heads * p.queries * p.head_dim);
    INTERFUSE_PICK(attention_kernels)->backward(
        p, {{inputs->q, inputs->k, inputs->v, inputs->mask, inputs->q_lengths, inputs->kv_lengths, const_cast<void*>(y),
             const_cast<float*>(lse), nullptr},
            grad_y, grad_q, grad_k, grad_v, parts, partial},
        work);
  });
}

interfuse_status interfuse_attention_pool_forward(const interfuse_attention_pool_spec* spec, const void* x, const void* hidden,
                                                  const void* context, const int64_t* lengths, void* y, void* weights,
                                                  int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    const AttentionPool p = checked_pool(spec, x, hidden, context, lengths);
    if (p.batch == 0) return;
    if (!y || (p.steps && !weights)) invalid("attention_pool: y or weights is a null pointer; forward writes both.");
    INTERFUSE_PICK(attention_kernels)->pool_forward(p, {x, hidden, context, lengths, y, weights, pool_threads(p, threads)});
  });
}

interfuse_status interfuse_attention_pool_backward(const interfuse_attention_pool_spec* spec, const void* x, const void* hidden,
                                                   const void* context, const int64_t* lengths, const void* grad_y,
                                                   const void* grad_weights, void* grad_x, void* grad_hidden,
                                                   float* grad_context, int32_t threads) {
  using namespace interfuse;
  return guarded([&] {
    const AttentionPool p = checked_pool(spec, x, hidden, context, lengths);
    if (p.batch == 0) return;
    INTERFUSE_PICK(attention_kernels)->pool_backward(
        p, {{x, hidden, context, lengths, nullptr, nullptr, pool_threads(p, threads)}, grad_y, grad_weights, grad_x, grad_hidden, grad_context});
  });
}

}  // extern "C"
