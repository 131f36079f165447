// Attention, forward: scores never leave the first-level cache.
//
// A piece is some query tiles of one (batch, kv head). Keys and values are packed in blocks that stay in the
// second-level cache while every tile of the piece passes over them; a tile keeps its sums and the running maximum in
// between. The probabilities' row is long (a whole block of keys), so that the second product, which sums over keys,
// has depth and its start and finish cost little.
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_split.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kMostKeys = 512;  // of a block: with 12 rows 24 KiB of scores, half of the first-level cache
// A row of scores; the odd number of cache lines keeps rows out of each other's cache sets.
constexpr int kScoreRow = kMostKeys + 16;
// What a tile keeps of each row fills whole vectors.
constexpr int kStates = (kRows + kLanes - 1) / kLanes * kLanes;
constexpr int64_t kBlockFloats = int64_t(1) << 16;  // of packed keys and values: 256 KiB
constexpr int64_t kTilesFloats = int64_t(1) << 16;  // of packed queries and their sums

// o[r] = o[r] * factor[r] + sum over keys of s[r][key] * v[key].
struct ValueProduct {
  int64_t keys, columns, o_row, v_panel;
  const float *s, *v, *factor;
  float* o;

  template <int R>
  INTERFUSE_INLINE void run() {
    const float* panel = v;
    int64_t column = 0;
    for (; column + kLanes < columns; column += kPanel, panel += v_panel) tile<R, 2>(panel, o + column);
    if (column < columns) tile<R, 1>(panel, o + column);
  }

  template <int R, int V>
  INTERFUSE_INLINE void tile(const float* panel, float* to) {
    // The block's own sum starts at zero: rounding grows with the length of a chain of sums.
    gemm_tile<R, V, true>(
        keys, s, kScoreRow, 1, panel, kPanel, [](int, int) __attribute__((always_inline)) { return zero(); },
        [&](int r, int c, Vec sum) __attribute__((always_inline)) {
          float* at = to + r * o_row + c * kLanes;
          store(at, multiply_add(load(at), splat(factor[r]), sum));
        });
  }
};

class Worker {
 public:
  Worker(const Attention& p, const AttentionForward& a, int tile_capacity)
      : p_(p), a_(a), capacity_(tile_capacity), o_row_(round_up(p.value_dim, kLanes)) {
    block_ = least(greatest(kBlockFloats / (p.head_dim + p.value_dim) / kPanel * kPanel, kPanel), kMostKeys);
    const int64_t rows = capacity_ * kRows;
    keys_ = scratch_floats(Slot::pack, packed_columns(block_, p.head_dim) + packed_rows(block_, p.value_dim));
    values_ = keys_ + packed_columns(block_, p.head_dim);
    queries_ = scratch_floats(Slot::rows, packed_tiles(rows, p.head_dim) + rows * o_row_ + 2 * capacity_ * kStates);
    o_ = queries_ + packed_tiles(rows, p.head_dim);
    best_ = o_ + rows * o_row_;
    total_ = best_ + capacity_ * kStates;
    scores_ = scratch_floats(Slot::tiles, kRows * kScoreRow);
  }

  void run(const AttentionPiece& piece) {
    const int64_t b = piece.batch;
    queries_here_ = {0, a_.q_lengths ? a_.q_lengths[b] : p_.queries};
    keys_here_ = a_.kv_lengths ? a_.kv_lengths[b] : p_.keys;
    first_head_ = piece.kv_head * p_.group();
    if (piece.begin == 0) zero_padding(p_, a_, b, piece.kv_head, queries_here_.end);
    for (int64_t first = piece.begin; first < piece.end; first += capacity_)
      pass(b, piece.kv_head, first, least(first + capacity_, piece.end));
  }

  // Query rows begin..end of one head.
  void run_rows(int64_t b, int64_t head, int64_t begin, int64_t end) {
    queries_here_ = {begin, end};
    keys_here_ = a_.kv_lengths ? a_.kv_lengths[b] : p_.keys;
    first_head_ = head;
    const int64_t tiles = divide_up(end - begin, kRows);
    for (int64_t first = 0; first < tiles; first += capacity_) pass(b, head / p_.group(), first, least(first + capacity_, tiles));
  }

 private:
  QueryRows rows_at(int64_t b, int64_t index) const { return query_rows(b, first_head_, queries_here_, kRows, index); }

  void pass(int64_t b, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    for (int64_t t = 0; t < count; ++t) {
      const QueryRows tile = rows_at(b, begin + t);
      const void* rows = element(p_.half, a_.q, p_.q.at(b, tile.head) + tile.query * p_.q.row);
      pack_tiles(p_.half, {rows, p_.q.row, tile.count, p_.head_dim}, p_.scale * kLog2E, queries_ + t * kRows * p_.head_dim);
    }
    for (int64_t i = 0; i < count * kStates; ++i) best_[i] = -infinity(), total_[i] = 0;
    memset(o_, 0, static_cast<size_t>(count * kRows * o_row_) * 4);
    int64_t packed = -1;
    for (int64_t key = 0; key < keys_here_; key += block_) {
      const int64_t keys = least(keys_here_ - key, block_);
      if (p_.causal && !reaches(b, begin, end, key)) break;
      pack_columns(p_.half, {element(p_.half, a_.k, p_.k.at(b, kv_head) + key * p_.k.row), p_.k.row, keys, p_.head_dim}, keys_);
      pack_rows(p_.half, {element(p_.half, a_.v, p_.v.at(b, kv_head) + key * p_.v.row), p_.v.row, keys, p_.value_dim}, block_, values_);
      packed = key;
      for (int64_t t = 0; t < count; ++t) attend(rows_at(b, begin + t), t, key, keys);
    }
    for (int64_t t = 0; t < count; ++t) finish(rows_at(b, begin + t), t);
    if (a_.weights) write_weights(b, kv_head, begin, end, packed);
  }

  // With causal order: whether one of the tiles reads this key.
  bool reaches(int64_t b, int64_t begin, int64_t end, int64_t key) const {
    for (int64_t t = begin; t < end; ++t) {
      const QueryRows tile = rows_at(b, t);
      if (tile.query + tile.count > key) return true;
    }
    return false;
  }

  // The scores of tile t with keys key..key + keys; returns how many of them any row reads.
  int64_t score(const QueryRows& tile, int64_t t, int64_t key, int64_t keys) {
    const int64_t columns = keys_read(p_, tile.query + tile.count - 1, key, keys);
    TileProduct product{p_.head_dim, queries_ + t * kRows * p_.head_dim, keys_, p_.head_dim * kPanel, scores_, columns};
    for_tile_rows(tile.count, TileProductOf<kScoreRow>{product});
    return columns;
  }

  void mask(const QueryRows& tile, int r, int64_t key, int64_t keys, int64_t padded) {
    const int64_t query = tile.query + r, most = keys_read(p_, query, key, keys);
    if (p_.mask != INTERFUSE_MASK_NONE || most < padded)
      apply_mask(mask_row(p_, a_.mask, tile.batch, tile.head, query, key), scores_ + r * kScoreRow, most, padded);
  }

  void attend(const QueryRows& tile, int64_t t, int64_t key, int64_t keys) {
    const int64_t columns = score(tile, t, key, keys), padded = round_up(columns, kLanes);
    if (columns == 0) return;
    for (int r = 0; r < tile.count; ++r) mask(tile, r, key, keys, padded);
    alignas(64) float factor[kStates];
    for (int r = 0; r < kRows; r += kLanes) {
      const int rows = static_cast<int>(least(tile.count - r, kLanes));
      soften(scores_ + r * kScoreRow, rows, padded, best_ + t * kStates + r, total_ + t * kStates + r, factor + r);
    }
    ValueProduct product{columns, p_.value_dim, o_row_, block_ * kPanel, scores_, values_, factor, o_ + t * kRows * o_row_};
    for_tile_rows(tile.count, product);
  }

  // Up to kLanes rows of scores become exponentials over the running maximum; factor is what that makes of earlier sums.
  // The rows' maxima and sums are gathered by one transposition: adding up a vector's lanes costs as much as ten of
  // its exponentials.
  static void soften(float* s, int rows, int64_t padded, float* best, float* total, float* factor) {
    Vec each[kLanes];
    for (int r = 0; r < kLanes; ++r) each[r] = r < rows ? row_maximum(s + r * kScoreRow, padded) : zero();
    transpose(each);
    const Vec before = load(best);
    Vec now = before;
    for (int lane = 0; lane < kLanes; ++lane) now = larger(now, each[lane]);
    // While every key so far is masked there is no maximum; any finite number gives exponentials of zero.
    const Vec offset = select(now == splat(-infinity()), zero(), now);
    for (int r = 0; r < kLanes; ++r) each[r] = r < rows ? row_exponentials(s + r * kScoreRow, padded, offset[r]) : zero();
    transpose(each);
    Vec sum = each[0];
    for (int lane = 1; lane < kLanes; ++lane) sum += each[lane];
    const Vec scale = exp2_of_negative(before - offset);
    store(best, now);
    store(total, multiply_add(load(total), scale, sum));
    store(factor, scale);
  }

  static INTERFUSE_INLINE Vec row_maximum(const float* s, int64_t padded) {
    Vec most[4];
    for (Vec& one : most) one = load(s);
    int64_t i = 0;
    for (; i + 4 * kLanes <= padded; i += 4 * kLanes)
      unrolled<4>([&](int j) __attribute__((always_inline)) { most[j] = larger(most[j], load(s + i + j * kLanes)); });
    for (; i < padded; i += kLanes) most[0] = larger(most[0], load(s + i));
    return larger(larger(most[0], most[1]), larger(most[2], most[3]));
  }

  static INTERFUSE_INLINE Vec row_exponentials(float* s, int64_t padded, float offset) {
    Vec sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= padded; i += 2 * kLanes)
      unrolled<2>([&](int j) __attribute__((always_inline)) {
        const Vec e = exp2_of_negative(load(s + i + j * kLanes) - offset);
        store(s + i + j * kLanes, e);
        sums[j] += e;
      });
    for (; i < padded; i += kLanes) {
      const Vec e = exp2_of_negative(load(s + i) - offset);
      store(s + i, e);
      sums[0] += e;
    }
    return sums[0] + sums[1];
  }

  void finish(const QueryRows& tile, int64_t t) {
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t i = t * kStates + r, query = tile.query + r, at = p_.y.at(tile.batch, tile.head) + query * p_.y.row;
      if (total_[i] == 0)
        zero_row(p_.half, a_.y, at, p_.value_dim);
      else
        store_row(p_.half, a_.y, at, o_ + (t * kRows + r) * o_row_, p_.value_dim, 1.f / total_[i]);
      if (a_.lse)
        a_.lse[(tile.batch * p_.heads + tile.head) * p_.queries + query] =
            total_[i] == 0 ? -infinity() : kLn2 * (best_[i] + __builtin_log2f(total_[i]));
    }
  }

  // A second pass over the scores, now that the sums are known. Asked for rarely, and as large as they are.
  void write_weights(int64_t b, int64_t kv_head, int64_t begin, int64_t end, int64_t packed) {
    for (int64_t t = begin; t < end; ++t) {
      const QueryRows tile = rows_at(b, t);
      const int64_t row = (b * p_.heads + tile.head) * p_.queries + tile.query;
      zero_row(p_.half, a_.weights, row * p_.keys, tile.count * p_.keys);
    }
    for (int64_t key = 0; key <= packed; key += block_) {
      const int64_t keys = least(keys_here_ - key, block_);
      if (packed != key || packed > 0)
        pack_columns(p_.half, {element(p_.half, a_.k, p_.k.at(b, kv_head) + key * p_.k.row), p_.k.row, keys, p_.head_dim}, keys_);
      for (int64_t t = begin; t < end; ++t) {
        const QueryRows tile = rows_at(b, t);
        const int64_t columns = score(tile, t - begin, key, keys), padded = round_up(columns, kLanes);
        for (int r = 0; r < tile.count && columns > 0; ++r) {
          const int64_t i = (t - begin) * kStates + r, row = (b * p_.heads + tile.head) * p_.queries + tile.query + r;
          if (total_[i] == 0) continue;
          mask(tile, r, key, keys, padded);
          exponentials(scores_ + r * kScoreRow, padded, best_[i]);
          store_row(p_.half, a_.weights, row * p_.keys + key, scores_ + r * kScoreRow, columns, 1.f / total_[i]);
        }
      }
    }
  }

  const Attention& p_;
  const AttentionForward& a_;
  const int64_t capacity_, o_row_;
  Range queries_here_{};  // of each head, from first_head_ on
  int64_t block_, first_head_ = 0, keys_here_ = 0;
  float *keys_, *values_, *queries_, *o_, *best_, *total_, *scores_;
};

// Tiles of a pass.
int capacity_of(const Attention& p) {
  const int64_t tile = kRows * (p.head_dim + p.value_dim);
  return static_cast<int>(least(greatest(kTilesFloats / tile, 4), 64));
}

#if defined(INTERFUSE_SPLIT_PRODUCT)
void rows_again(const Attention& p, const AttentionForward& a, int64_t b, int64_t head, int64_t begin, int64_t end) {
  Worker(p, a, capacity_of(p)).run_rows(b, head, begin, end);
}
#endif

int tile_rows([[maybe_unused]] const Attention& p) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (on_matrix_units(p)) return kSplitTileRows;
#endif
  return kRows;
}

void forward(const Attention& p, const AttentionForward& a, AttentionWork& work) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (on_matrix_units(p)) return attention_forward_split(p, a, work, rows_again);
#endif
  parallel(work.threads, [&](int, int) {
    Worker worker(p, a, capacity_of(p));
    take_pieces(work, [&](const AttentionPiece& piece) { worker.run(piece); });
  });
}

}  // namespace

void zero_padding(const Attention& p, const AttentionForward& a, int64_t b, int64_t kv_head, int64_t queries) {
  for (int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head)
    for (int64_t query = queries; query < p.queries; ++query) {
      zero_row(p.half, a.y, p.y.at(b, head) + query * p.y.row, p.value_dim);
      const int64_t row = (b * p.heads + head) * p.queries + query;
      if (a.lse) a.lse[row] = -infinity();
      if (a.weights) zero_row(p.half, a.weights, row * p.keys, p.keys);
    }
}

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {tile_rows, forward, attention_backward, attention_pool_forward, attention_pool_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
