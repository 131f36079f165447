// Attention's forward on the matrix units (split_product.h), where float32 heads are wide and queries many enough.
//
// As in attention.cpp, keys and values of a block are laid out once, here in pieces, and every tile of query rows
// passes over them with an online softmax. A tile is 32 rows. What limits the vector units' share, exponentials and
// cutting the probabilities into pieces, runs between the instructions of the matrix units: while tile i is softened,
// those form the scores of tile i + 1 and the weighted sum of tile i - 1.
#include "cpu/attention_split.h"

#include "common/matrix_units.h"
#include "common/scratch.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_split_tile.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

using split::kSide;
using split::kStep;
using split::kSums;
using split::kWide;

constexpr int64_t kMostKeys = 256;  // of a block: 32 KiB of scores
// Bytes of the keys and values of a block in pieces, which stay in the second-level cache.
constexpr int64_t kBlockBytes = 768 << 10;
constexpr int64_t kMostTiles = 32;
constexpr int64_t kTileFloats = int64_t(1) << 17;  // of the query tiles of a pass, about

// Scores become exponentials and their pieces, the first factor of the weighted sum, some at a time.
struct Softening {
  const float* scores;
  const float* offset;
  float* sums;  // sixteen lanes for each row
  uint16_t* to;
  int64_t rows, pairs;  // pairs: of key panels
  int64_t row = 0, pair = 0;

  INTERFUSE_INLINE void some(int64_t count) {
    for (; count > 0 && pair < pairs; --count) {
      const float* const from = scores + pair * kSums + at_row(row, 0);
      const Vec first = exp2_of_negative(load(from) - offset[row]);
      const Vec second = exp2_of_negative(load(from + kSide * kSide) - offset[row]);
      float* const sum = sums + row * kLanes;
      store(sum, load(sum) + (first + second));
      split::cut_along(first, second, to + (row / kSide * pairs + pair) * kStep + row % kSide * split::kDepth);
      if (++row == rows) row = 0, ++pair;
    }
  }
};

class SplitWorker {
 public:
  SplitWorker(const Attention& p, const AttentionForward& a)
      : p_(p), a_(a), steps_(split::steps_of(p.head_dim)), value_pairs_(split::panels_of(p.value_dim) / 2) {
    const int64_t key_bytes = (steps_ * split::kDepth + value_pairs_ * kWide) * 6;
    block_ = least(greatest(kBlockBytes / key_bytes / kWide * kWide, kWide), kMostKeys);
    query_size_ = 2 * steps_ * kStep, o_size_ = value_pairs_ * kSums;
    capacity_ = least(greatest(kTileFloats / (query_size_ / 2 + o_size_), 2), kMostTiles);
    keys_ = static_cast<uint16_t*>(scratch(Slot::weight, static_cast<size_t>(block_ * key_bytes)));
    values_ = keys_ + block_ / kSide * steps_ * kStep;
    float* at = scratch_floats(Slot::gradient, capacity_ * (query_size_ / 2 + o_size_ + 3 * kWide));
    const auto take = [&](int64_t floats) { return (at += floats) - floats; };
    queries_ = reinterpret_cast<uint16_t*>(take(capacity_ * query_size_ / 2));
    o_ = take(capacity_ * o_size_);
    best_ = take(capacity_ * kWide), total_ = take(capacity_ * kWide), factor_ = take(capacity_ * kWide);
    const int64_t score_size = block_ * kWide, probability_size = block_ * kWide * 3 / 2;
    at = scratch_floats(Slot::products, 2 * (score_size + probability_size) + kSums + kWide + kWide * kLanes);
    for (int i = 0; i < 2; ++i) {
      scores_[i] = take(score_size);
      probabilities_[i] = reinterpret_cast<uint16_t*>(take(probability_size));
    }
    fresh_ = take(kSums), offset_ = take(kWide), sums_ = take(kWide * kLanes);
  }

  void run(const AttentionPiece& piece, AttentionRows again) {
    const int64_t b = piece.batch;
    queries_here_ = a_.q_lengths ? a_.q_lengths[b] : p_.queries;
    keys_here_ = a_.kv_lengths ? a_.kv_lengths[b] : p_.keys;
    if (piece.begin == 0) zero_padding(p_, a_, b, piece.kv_head, queries_here_);
    for (int64_t first = piece.begin; first < piece.end; first += capacity_)
      pass(b, piece.kv_head, first, least(first + capacity_, piece.end), again);
  }

 private:
  struct Tile : QueryRows {
    int64_t index;           // within the pass
    int64_t columns, pairs;  // of the block's keys that one of its rows reads
  };

  Tile tile_at(int64_t b, int64_t kv_head, int64_t begin, int64_t index, int64_t key, int64_t keys) const {
    const QueryRows rows = query_rows(b, kv_head * p_.group(), {0, queries_here_}, kWide, begin + index);
    const int64_t columns = keys_read(p_, rows.query + rows.count - 1, key, keys);
    return {rows, index, columns, divide_up(columns, kWide)};
  }

  void pass(int64_t b, int64_t kv_head, int64_t begin, int64_t end, AttentionRows again) {
    const int64_t count = end - begin;
    for (int64_t t = 0; t < count; ++t) cut_queries(tile_at(b, kv_head, begin, t, 0, 0));
    for (int64_t i = 0; i < count * kWide; ++i) best_[i] = -infinity(), total_[i] = 0;
    memset(o_, 0, static_cast<size_t>(count * o_size_) * 4);
    {
      const split::Tiles tiles;
      for (int64_t key = 0; key < keys_here_; key += block_) {
        const int64_t keys = least(keys_here_ - key, block_);
        cut_keys(b, kv_head, key, keys);
        cut_values(b, kv_head, key, keys);
        attend(b, kv_head, begin, count, key, keys);
      }
    }
    bool finite[kMostTiles];
    for (int64_t t = 0; t < count; ++t) finite[t] = finish(tile_at(b, kv_head, begin, t, 0, 0));
    if (a_.weights) write_weights(b, kv_head, begin, count);
    // An infinity in some factor leaves NaN in its pieces' products. Where results are not finite they are computed
    // again by the vector units, which may find them so as well.
    for (int64_t t = 0; t < count; ++t)
      if (!finite[t]) {
        const Tile tile = tile_at(b, kv_head, begin, t, 0, 0);
        again(p_, a_, b, tile.head, tile.query, tile.query + tile.count);
      }
  }

  // Rows that are not there are left as they lie: nobody reads what comes of them.
  void cut_queries(const Tile& tile) {
    const float* const q = static_cast<const float*>(a_.q) + p_.q.at(tile.batch, tile.head) + tile.query * p_.q.row;
    uint16_t* const to = queries_ + tile.index * query_size_;
    split::cut_rows(q, p_.q.row, tile.count, tile.count, p_.head_dim, to, p_.scale * kLog2E);
  }

  // Keys that are not there are left as they lie too.
  void cut_keys(int64_t b, int64_t kv_head, int64_t key, int64_t keys) {
    const float* const k = static_cast<const float*>(a_.k) + p_.k.at(b, kv_head) + key * p_.k.row;
    for (int64_t first = 0; first < keys; first += kSide)
      for (int64_t step = 0; step < steps_; ++step) {
        const int64_t e = step * split::kDepth, left = p_.head_dim - e;
        uint16_t* const to = keys_ + (first / kSide * steps_ + step) * kStep;
        for (int64_t r = 0; r < least(keys - first, kSide); ++r) {
          const float* const from = k + (first + r) * p_.k.row + e;
          __builtin_prefetch(from + kWide * p_.k.row);  // heads are narrow pieces of long rows
          split::cut_some(from, left, to + r * split::kDepth);
        }
        split::turn(to);
      }
  }

  // Values that are not there are zeros: they meet probabilities of zero.
  void cut_values(int64_t b, int64_t kv_head, int64_t key, int64_t keys) {
    const float* const v = static_cast<const float*>(a_.v) + p_.v.at(b, kv_head) + key * p_.v.row;
    const int64_t depth = divide_up(keys, kWide);
    for (int64_t row = 0; row < depth * kWide; row += 2)
      for (int64_t panel = 0; panel < 2 * value_pairs_; ++panel) {
        const int64_t left = p_.value_dim - panel * kSide;
        const float* const from = v + row * p_.v.row + panel * kSide;
        __builtin_prefetch(from + kWide * p_.v.row);
        __builtin_prefetch(from + (kWide + 1) * p_.v.row);
        split::cut_across(row < keys ? load_some(from, left) : zero(),
                          row + 1 < keys ? load_some(from + p_.v.row, left) : zero(),
                          values_ + (panel * depth + row / kWide) * kStep + row % kWide / 2 * kWide);
      }
  }

  // All tiles of the pass over one block of keys.
  void attend(int64_t b, int64_t kv_head, int64_t begin, int64_t count, int64_t key, int64_t keys) {
    const int64_t depth = divide_up(keys, kWide);
    Tile tiles[kMostTiles + 1];
    int64_t n = 0;
    for (int64_t t = 0; t < count; ++t) {
      tiles[n] = tile_at(b, kv_head, begin, t, key, keys);
      n += tiles[n].pairs > 0;
    }
    if (n == 0) return;
    const auto none = []() __attribute__((always_inline)) {};
    score(tiles[0], scores_[0], none);
    for (int64_t i = 0; i <= n; ++i) {
      Softening softening{scores_[i % 2], offset_, sums_, probabilities_[i % 2], 0, 0};
      int64_t slots = 0;
      if (i < n) {
        mask_scores(p_, a_.mask, tiles[i], key, keys, tiles[i].pairs, scores_[i % 2]);
        prepare(tiles[i], scores_[i % 2]);
        softening.rows = tiles[i].count, softening.pairs = tiles[i].pairs;
      }
      if (i + 1 < n) slots += 6 * tiles[i + 1].pairs * steps_;
      if (i > 0) slots += 6 * tiles[i - 1].pairs * value_pairs_;
      const int64_t each = slots ? divide_up(softening.rows * softening.pairs, slots) : 0;
      const auto work = [&]() __attribute__((always_inline)) { softening.some(each); };
      if (i + 1 < n) score(tiles[i + 1], scores_[(i + 1) % 2], work);
      if (i > 0) weighted_sum(tiles[i - 1], probabilities_[(i - 1) % 2], depth, work);
      if (i < n) {
        softening.some(softening.rows * softening.pairs);
        add_sums(tiles[i]);
      }
    }
  }

  template <class Work>
  INTERFUSE_INLINE void score(const Tile& tile, float* to, Work&& work) {
    for (int64_t pair = 0; pair < tile.pairs; ++pair)
      split::multiply(queries_ + tile.index * query_size_, steps_ * kStep, keys_ + 2 * pair * steps_ * kStep, steps_ * kStep,
                      steps_, to + pair * kSums, work);
  }

  // o = o * factor + probabilities * values
  template <class Work>
  INTERFUSE_INLINE void weighted_sum(const Tile& tile, const uint16_t* probabilities, int64_t depth, Work&& work) {
    const float* const factor = factor_ + tile.index * kWide;
    for (int64_t pair = 0; pair < value_pairs_; ++pair) {
      float* const to = o_ + tile.index * o_size_ + pair * kSums;
      for (int64_t step = 0; step < tile.pairs; step += split::kSteps) {
        split::multiply(probabilities + step * kStep, tile.pairs * kStep, values_ + (2 * pair * depth + step) * kStep,
                        depth * kStep, least(tile.pairs - step, split::kSteps), fresh_, work);
        for (int64_t r = 0; r < tile.count; ++r)
          for (int64_t j = 0; j < 2; ++j) {
            float* const at = to + at_row(r, j);
            const Vec before = load(at), sum = load(fresh_ + at_row(r, j));
            store(at, step ? before + sum : multiply_add(before, splat(factor[r]), sum));
          }
      }
    }
  }

  // The running maxima, and what they make of the sums so far.
  void prepare(const Tile& tile, const float* scores) {
    for (int64_t first = 0; first < tile.count; first += kSide) {
      Vec each[kLanes];
      for (int64_t r = 0; r < kSide; ++r) each[r] = first + r < tile.count ? maxima(scores + at_row(first + r, 0), tile.pairs) : zero();
      transpose(each);
      const int64_t at = tile.index * kWide + first;
      const Vec before = load(best_ + at);
      Vec now = before;
      for (int lane = 0; lane < kLanes; ++lane) now = larger(now, each[lane]);
      // While every key so far is masked there is no maximum; any finite number gives exponentials of zero.
      const Vec offset = select(now == splat(-infinity()), zero(), now), scale = select(before == offset, splat(1.f), exp2_of_negative(before - offset));
      store(best_ + at, now);
      store(offset_ + first, offset);
      store(factor_ + at, scale);
      store(total_ + at, load(total_ + at) * scale);
    }
    memset(sums_, 0, static_cast<size_t>(kWide * kLanes) * 4);
  }

  static INTERFUSE_INLINE Vec maxima(const float* row, int64_t pairs) {
    Vec first = load(row), second = load(row + kSide * kSide);
    for (int64_t pair = 1; pair < pairs; ++pair) {
      first = larger(first, load(row + pair * kSums));
      second = larger(second, load(row + pair * kSums + kSide * kSide));
    }
    return larger(first, second);
  }

  void add_sums(const Tile& tile) {
    for (int64_t first = 0; first < tile.count; first += kSide) {
      Vec each[kLanes];
      for (int64_t r = 0; r < kSide; ++r) each[r] = load(sums_ + (first + r) * kLanes);
      transpose(each);
      Vec sum = each[0];
      for (int lane = 1; lane < kLanes; ++lane) sum += each[lane];
      float* const total = total_ + tile.index * kWide + first;
      store(total, load(total) + sum);
    }
  }

  // Whether all is finite.
  bool finish(const Tile& tile) {
    IVec other{};
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t i = tile.index * kWide + r, query = tile.query + r;
      float* const y = static_cast<float*>(a_.y) + p_.y.at(tile.batch, tile.head) + query * p_.y.row;
      const bool nothing = total_[i] == 0;
      const float scale = nothing ? 0.f : 1.f / total_[i];
      split::look(splat(total_[i]), other);
      for (int64_t column = 0; column < p_.value_dim; column += kSide) {
        const Vec sum = load(o_ + tile.index * o_size_ + column / kWide * kSums + at_row(r, column / kSide % 2));
        split::look(sum, other);
        store_first(y + column, nothing ? zero() : sum * scale, static_cast<int>(least(p_.value_dim - column, kSide)));
      }
      if (a_.lse)
        a_.lse[(tile.batch * p_.heads + tile.head) * p_.queries + query] =
            nothing ? -infinity() : kLn2 * (best_[i] + __builtin_log2f(total_[i]));
    }
    return !split::any(other);
  }

  // A second pass over the scores, now that the sums are known.
  void write_weights(int64_t b, int64_t kv_head, int64_t begin, int64_t count) {
    float* const weights = static_cast<float*>(a_.weights);
    for (int64_t t = 0; t < count; ++t) {
      const Tile tile = tile_at(b, kv_head, begin, t, 0, 0);
      const int64_t row = (b * p_.heads + tile.head) * p_.queries + tile.query;
      memset(weights + row * p_.keys, 0, static_cast<size_t>(tile.count * p_.keys) * 4);
    }
    const split::Tiles tiles;
    for (int64_t key = 0; key < keys_here_; key += block_) {
      const int64_t keys = least(keys_here_ - key, block_);
      cut_keys(b, kv_head, key, keys);
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile = tile_at(b, kv_head, begin, t, key, keys);
        score(tile, scores_[0], []() __attribute__((always_inline)) {});
        mask_scores(p_, a_.mask, tile, key, keys, tile.pairs, scores_[0]);
        for (int64_t r = 0; r < tile.count; ++r) {
          const int64_t i = t * kWide + r, row = (b * p_.heads + tile.head) * p_.queries + tile.query + r;
          if (total_[i] == 0) continue;
          const float scale = 1.f / total_[i];
          for (int64_t at = 0; at < tile.columns; at += kSide)
            store_first(weights + row * p_.keys + key + at,
                        exp2_of_negative(load(scores_[0] + at / kWide * kSums + at_row(r, at / kSide % 2)) - best_[i]) * scale,
                        static_cast<int>(least(tile.columns - at, kSide)));
        }
      }
    }
  }

  const Attention& p_;
  const AttentionForward& a_;
  const int64_t steps_, value_pairs_;
  int64_t block_, query_size_, o_size_, capacity_, queries_here_ = 0, keys_here_ = 0;
  uint16_t *keys_, *values_, *queries_, *probabilities_[2];
  float *o_, *best_, *total_, *factor_, *scores_[2], *fresh_, *offset_, *sums_;
};

}  // namespace

// Fewer queries than fill a tile, or narrower heads than a step, leave most of a product unused.
bool on_matrix_units(const Attention& p) {
  return !p.half && p.queries >= kWide && p.keys >= kWide && p.head_dim > kSide && matrix_units();
}

void attention_forward_split(const Attention& p, const AttentionForward& a, AttentionWork& work, AttentionRows again) {
  parallel(work.threads, [&](int, int) {
    SplitWorker worker(p, a);
    take_pieces(work, [&](const AttentionPiece& piece) { worker.run(piece, again); });
  });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
