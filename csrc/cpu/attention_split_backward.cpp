// Attention's backward on the matrix units, where its forward runs there too (attention_split.cpp).
//
// Pieces of work are attention_backward.cpp's. A pass takes tiles of 32 query rows, and for each block of 64 keys
// forms their scores and the gradients of their probabilities; of both the vector units make the probabilities and the
// gradients of the scores, cut into pieces. The gradients of keys and values are formed transposed, (element, key): so
// what was cut has its pairs along the queries, which are neighbouring rows, and only the factors of the tile are
// transposed, once. (Cutting between the instructions of the matrix units, as the forward does, saved nothing here: what it
// writes drives their factors out of the first-level cache.)
#include "common/scratch.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_split.h"
#include "cpu/attention_split_tile.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

using split::kDepth;
using split::kSide;
using split::kStep;
using split::kSums;
using split::kWide;

constexpr int64_t kBlockPairs = 2;         // of key panels: what is formed of more would not stay in the first-level cache
constexpr int64_t kGroup = split::kSteps;  // tiles that the gradients of keys and values sum over at once
constexpr int64_t kKeyBytes = 512 << 10, kMostKeys = 512;   // of keys and values in pieces
constexpr int64_t kTileBytes = 512 << 10, kMostTiles = 32;  // of a pass

// Up to kBlockPairs pairs of key panels: where they lie in pieces, and in the piece.
struct Block {
  int64_t pair, pairs, to;
};

constexpr auto kNoWork = []() __attribute__((always_inline)) {};

class SplitWorker {
 public:
  SplitWorker(const Attention& p, const AttentionBackward& a)
      : p_(p), a_(a), e_(split::steps_of(p.head_dim)), v_(split::steps_of(p.value_dim)) {
    const int64_t key_size = (2 * e_ + v_) * kStep / kSide, tile_size = 4 * (e_ + v_) * kStep;
    keys_at_once_ = least(greatest(kKeyBytes / 2 / key_size / kWide * kWide, kWide), kMostKeys);
    capacity_ = least(greatest(kTileBytes / 2 / tile_size, 1), kMostTiles);
    depth_ = keys_at_once_ / kWide;
    uint16_t* at = static_cast<uint16_t*>(
        scratch(Slot::weight, static_cast<size_t>(keys_at_once_ * key_size + capacity_ * tile_size + 2 * kBlockPairs * kStep +
                                                  4 * kBlockPairs * kGroup * kStep) * 2));
    const auto take = [&](int64_t count) { return (at += count) - count; };
    keys_ = take(keys_at_once_ / kSide * e_ * kStep), values_ = take(keys_at_once_ / kSide * v_ * kStep);
    keys_across_ = take(2 * e_ * depth_ * kStep);
    q_ = take(capacity_ * 2 * e_ * kStep), grad_y_ = take(capacity_ * 2 * v_ * kStep);
    q_turned_ = take(capacity_ * 2 * e_ * kStep), grad_y_turned_ = take(capacity_ * 2 * v_ * kStep);
    along_ = take(2 * kBlockPairs * kStep);
    probabilities_ = take(2 * kBlockPairs * kGroup * kStep), gradients_ = take(2 * kBlockPairs * kGroup * kStep);
    float* room = scratch_floats(Slot::products, capacity_ * (e_ * kSums + 2 * kWide) + 2 * kBlockPairs * kSums + kSums);
    const auto floats = [&](int64_t count) { return (room += count) - count; };
    grad_q_ = floats(capacity_ * e_ * kSums), offset_ = floats(capacity_ * kWide), delta_ = floats(capacity_ * kWide);
    scores_ = floats(kBlockPairs * kSums), slopes_ = floats(kBlockPairs * kSums);
    fresh_ = floats(kSums);
  }

  // Whether all is finite.
  bool run(const AttentionPiece& piece) {
    const int64_t b = piece.batch;
    queries_here_ = a_.in.q_lengths ? a_.in.q_lengths[b] : p_.queries;
    const int64_t length = a_.in.kv_lengths ? a_.in.kv_lengths[b] : p_.keys;
    end_ = greatest(least(piece.end, length), piece.begin);
    other_ = IVec{};
    const int64_t pairs = divide_up(end_ - piece.begin, kWide);
    grad_k_ = scratch_floats(Slot::gradient, pairs * (e_ + v_) * kSums);
    grad_v_ = grad_k_ + pairs * e_ * kSums;
    memset(grad_k_, 0, static_cast<size_t>(pairs * (e_ + v_) * kSums) * 4);
    const int64_t all = divide_up(queries_here_, kWide) * p_.group();
    for (int64_t first = 0; first < all; first += capacity_) pass(piece, first, least(all - first, capacity_));
    store_keys(piece);
    return !split::any(other_);
  }

 private:
  QueryRows rows_at(const AttentionPiece& piece, int64_t index) const {
    return query_rows(piece.batch, piece.kv_head * p_.group(), {0, queries_here_}, kWide, index);
  }

  void pass(const AttentionPiece& piece, int64_t first, int64_t count) {
    memset(grad_q_, 0, static_cast<size_t>(count * e_ * kSums) * 4);
    for (int64_t t = 0; t < count; ++t) cut_tile(rows_at(piece, first + t), t);
    {
      const split::Tiles tiles;
      for (int64_t key = piece.begin; key < end_; key += keys_at_once_) {
        const int64_t keys = least(end_ - key, keys_at_once_);
        cut_keys(piece, key, keys);
        attend(piece, first, count, key, keys);
      }
    }
    for (int64_t t = 0; t < count; ++t) store_queries(piece, rows_at(piece, first + t), t);
  }

  void cut_tile(const QueryRows& tile, int64_t t) {
    const float* const q = static_cast<const float*>(a_.in.q) + p_.q.at(tile.batch, tile.head) + tile.query * p_.q.row;
    const float* const grad = static_cast<const float*>(a_.grad_y) + p_.y.at(tile.batch, tile.head) + tile.query * p_.y.row;
    split::cut_rows(q, p_.q.row, tile.count, kWide, p_.head_dim, q_ + t * 2 * e_ * kStep, p_.scale * kLog2E);
    split::cut_rows(grad, p_.y.row, tile.count, kWide, p_.value_dim, grad_y_ + t * 2 * v_ * kStep);
    cut_turned({q, p_.q.row, tile.count, p_.head_dim}, q_turned_ + t * kStep);
    cut_turned({grad, p_.y.row, tile.count, p_.value_dim}, grad_y_turned_ + t * kStep);
    row_states(p_, a_, tile.batch, tile.head, tile.query, tile.count, kWide, offset_ + t * kWide, delta_ + t * kWide);
  }

  // load_transposed, of columns that may be missing too; straight loads where all is there.
  static INTERFUSE_INLINE void load_turned(const Rows& rows, int64_t first, int64_t column, Vec (&out)[kLanes]) {
    if (first + kLanes > rows.count || column + kLanes > rows.width) return load_edge(rows, first, column, out);
    const float* const from = static_cast<const float*>(rows.data) + first * rows.stride + column;
    for (int i = 0; i < kLanes; ++i) {
      __builtin_prefetch(from + (i + 2 * kLanes) * rows.stride);  // heads are narrow pieces of long rows
      out[i] = load(from + i * rows.stride);
    }
    transpose(out);
  }

  __attribute__((noinline)) static void load_edge(const Rows& rows, int64_t first, int64_t column, Vec (&out)[kLanes]) {
    if (column < rows.width) return load_transposed<float>(rows, first, column, out);
    for (Vec& line : out) line = zero();
  }

  // The first factor, its rows the elements, of products over a tile's query rows.
  void cut_turned(const Rows& rows, uint16_t* to) const {
    for (int64_t panel = 0; panel < split::panels_of(rows.width); ++panel) {
      Vec first[kLanes], second[kLanes];
      load_turned(rows, 0, panel * kSide, first);
      load_turned(rows, kSide, panel * kSide, second);
      for (int i = 0; i < kLanes; ++i) split::cut_along(first[i], second[i], to + panel * capacity_ * kStep + i * kDepth);
    }
  }

  // The second factor of products over the elements, of the rows' panel number `panel`.
  static void cut_panel(const Rows& rows, int64_t panel, uint16_t* to) {
    const int64_t steps = split::steps_of(rows.width);
    for (int64_t half = 0; half < 2 * steps; ++half) {
      Vec lines[kLanes];
      load_turned(rows, panel * kSide, half * kSide, lines);
      uint16_t* const at = to + (panel * steps + half / 2) * kStep + half % 2 * (kSide / 2) * kWide;
      for (int i = 0; i < kLanes; i += 2) split::cut_across(lines[i], lines[i + 1], at + i / 2 * kWide);
    }
  }

  // Keys that are not there are zeros.
  void cut_keys(const AttentionPiece& piece, int64_t key, int64_t keys) {
    const Rows k{static_cast<const float*>(a_.in.k) + p_.k.at(piece.batch, piece.kv_head) + key * p_.k.row, p_.k.row, keys, p_.head_dim};
    const Rows v{static_cast<const float*>(a_.in.v) + p_.v.at(piece.batch, piece.kv_head) + key * p_.v.row, p_.v.row, keys, p_.value_dim};
    const int64_t panels = split::panels_of(keys);
    for (int64_t panel = 0; panel < panels; ++panel) {
      cut_panel(k, panel, keys_);
      cut_panel(v, panel, values_);
    }
    const float* const data = static_cast<const float*>(k.data);
    for (int64_t row = 0; row < panels * kSide; row += 2)
      for (int64_t panel = 0; panel < 2 * e_; ++panel) {
        const int64_t left = p_.head_dim - panel * kSide;
        const float* const from = data + row * k.stride + panel * kSide;
        split::cut_across(load_some(from, row < keys ? left : 0), load_some(from + k.stride, row + 1 < keys ? left : 0),
                          keys_across_ + (panel * depth_ + row / kWide) * kStep + row % kWide / 2 * kWide);
      }
  }

  // Every tile of the pass with every block of these keys.
  void attend(const AttentionPiece& piece, int64_t first, int64_t count, int64_t key, int64_t keys) {
    const int64_t pairs = split::panels_of(keys) / 2;
    const int blocks = static_cast<int>(divide_up(pairs, kBlockPairs));
    for (int number = 0; number < blocks; ++number) {
      const Range mine = share(pairs, number, blocks);
      const Block block{mine.begin, mine.end - mine.begin, (key - piece.begin) / kWide + mine.begin};
      const int64_t begin = key + mine.begin * kWide, here = keys - mine.begin * kWide;
      int64_t step = 0;  // of the group
      for (int64_t t = 0; t < count; ++t) {
        const QueryRows tile = rows_at(piece, first + t);
        const bool reads = keys_read(p_, tile.query + tile.count - 1, begin, here) > 0;
        if (reads) {
          form(block, t);
          mask_scores(p_, a_.in.mask, tile, begin, here, block.pairs, scores_);
          differentiate(block, t, step++);
          add_to_queries(block, t);
        }
        if (step && (!reads || step == kGroup || t + 1 == count)) {
          add_to_keys(block, t + reads - step, step);
          step = 0;
        }
      }
    }
  }

  // Scores and the gradients of the probabilities.
  void form(const Block& block, int64_t t) {
    for (int64_t pair = 0; pair < block.pairs; ++pair) {
      const int64_t panel = 2 * (block.pair + pair);
      split::multiply(q_ + t * 2 * e_ * kStep, e_ * kStep, keys_ + panel * e_ * kStep, e_ * kStep, e_, scores_ + pair * kSums, kNoWork);
      split::multiply(grad_y_ + t * 2 * v_ * kStep, v_ * kStep, values_ + panel * v_ * kStep, v_ * kStep, v_, slopes_ + pair * kSums, kNoWork);
    }
  }

  // Of these the probabilities and the gradients of the scores, in pieces.
  void differentiate(const Block& block, int64_t t, int64_t step) {
    const float *const offset = offset_ + t * kWide, *const delta = delta_ + t * kWide;
    for (int64_t pair = 0; pair < block.pairs; ++pair)
      for (int64_t row = 0; row < kWide; row += 2) {
        const int64_t from = pair * kSums;
        split::Pieces p[2][2], g[2][2];
        unrolled<2>([&](int r) __attribute__((always_inline)) {
          unrolled<2>([&](int j) __attribute__((always_inline)) {
            const int64_t at = from + at_row(row + r, j);
            const Vec probability = exp2_of_negative(load(scores_ + at) - offset[row + r]);
            p[r][j] = split::pieces(probability);
            g[r][j] = split::pieces(probability * (load(slopes_ + at) - delta[row + r]));
          });
        });
        uint16_t* const along = along_ + (row / kSide * kBlockPairs + pair) * kStep + row % kSide * kDepth;
        unrolled<2>([&](int r) __attribute__((always_inline)) { split::store_along(g[r][0], g[r][1], along + r * kDepth); });
        const int64_t across = (2 * pair * kGroup + step) * kStep + row / 2 * kWide;
        unrolled<2>([&](int j) __attribute__((always_inline)) {
          split::store_across(p[0][j], p[1][j], probabilities_ + across + j * kGroup * kStep);
          split::store_across(g[0][j], g[1][j], gradients_ + across + j * kGroup * kStep);
        });
      }
  }

  void add_to_queries(const Block& block, int64_t t) {
    for (int64_t pair = 0; pair < e_; ++pair) {
      split::multiply(along_, kBlockPairs * kStep, keys_across_ + (2 * pair * depth_ + block.pair) * kStep, depth_ * kStep, block.pairs,
                      fresh_, kNoWork);
      split::join_sums(grad_q_ + (t * e_ + pair) * kSums, fresh_, false);
    }
  }

  // For `count` tiles from t on.
  void add_to_keys(const Block& block, int64_t t, int64_t count) {
    const int64_t panel_size = kGroup * kStep;
    for (int64_t pair = 0; pair < block.pairs; ++pair) {
      const auto add = [&](const uint16_t* turned, int64_t pairs, const uint16_t* second, float* sums) __attribute__((always_inline)) {
        for (int64_t i = 0; i < pairs; ++i) {
          split::multiply(turned + (2 * i * capacity_ + t) * kStep, capacity_ * kStep, second + 2 * pair * panel_size, panel_size, count,
                          fresh_, kNoWork);
          split::join_sums(sums + ((block.to + pair) * pairs + i) * kSums, fresh_, false);
        }
      };
      add(grad_y_turned_, v_, probabilities_, grad_v_);
      add(q_turned_, e_, gradients_, grad_k_);
    }
  }

  void store_queries(const AttentionPiece& piece, const QueryRows& tile, int64_t t) {
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t query = tile.query + r, partial = ((piece.part * p_.batch + piece.batch) * p_.heads + tile.head) * p_.queries + query;
      float* const to = a_.parts > 1 ? a_.partial + partial * p_.head_dim
                                     : static_cast<float*>(a_.grad_q) + p_.grad_q.at(piece.batch, tile.head) + query * p_.grad_q.row;
      const float factor = a_.parts > 1 ? 1.f : p_.scale;
      for (int64_t column = 0; column < p_.head_dim; column += kSide) {
        const Vec sum = load(grad_q_ + (t * e_ + column / kWide) * kSums + at_row(r, column / kSide % 2));
        split::look(sum, other_);
        store_first(to + column, sum * factor, static_cast<int>(least(p_.head_dim - column, kSide)));
      }
    }
  }

  void store_keys(const AttentionPiece& piece) {
    float* const k = static_cast<float*>(a_.grad_k) + p_.grad_k.at(piece.batch, piece.kv_head);
    float* const v = static_cast<float*>(a_.grad_v) + p_.grad_v.at(piece.batch, piece.kv_head);
    for (int64_t key = piece.begin; key < end_; key += kSide) {
      const int64_t at = key - piece.begin, rows = least(end_ - key, kSide);
      store_turned(grad_k_ + at / kWide * e_ * kSums, at / kSide % 2, p_.head_dim, p_.scale, k + key * p_.grad_k.row, p_.grad_k.row, rows);
      store_turned(grad_v_ + at / kWide * v_ * kSums, at / kSide % 2, p_.value_dim, 1.f, v + key * p_.grad_v.row, p_.grad_v.row, rows);
    }
    for (int64_t key = end_; key < piece.end; ++key) {
      memset(k + key * p_.grad_k.row, 0, static_cast<size_t>(p_.head_dim) * 4);
      memset(v + key * p_.grad_v.row, 0, static_cast<size_t>(p_.value_dim) * 4);
    }
  }

  // Panel `panel` of two, whose columns are keys, to the rows of the keys.
  void store_turned(const float* sums, int64_t panel, int64_t width, float factor, float* to, int64_t row, int64_t rows) {
    for (int64_t column = 0; column < width; column += kSide) {
      const float* const from = sums + column / kWide * kSums + (column / kSide % 2 * 2 + panel) * kSide * kSide;
      Vec lines[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        lines[i] = load(from + i * kSide) * factor;
        split::look(lines[i], other_);
      }
      transpose(lines);
      const int count = static_cast<int>(least(width - column, kSide));
      for (int i = 0; i < kLanes; ++i)
        if (i < rows) store_first(to + i * row + column, lines[i], count);
    }
  }

  const Attention& p_;
  const AttentionBackward& a_;
  const int64_t e_, v_;  // panels of elements, two each; also steps of products over the elements
  int64_t keys_at_once_, depth_, capacity_, queries_here_ = 0, end_ = 0;
  IVec other_{};
  uint16_t *keys_, *values_, *keys_across_, *q_, *grad_y_, *q_turned_, *grad_y_turned_;
  uint16_t *along_, *probabilities_, *gradients_;  // gradients of scores along the keys; both in pairs along the queries
  float *grad_q_, *offset_, *delta_, *scores_, *slopes_, *fresh_;
  float *grad_k_ = nullptr, *grad_v_ = nullptr;
};

}  // namespace

void attention_backward_split(const Attention& p, const AttentionBackward& a, AttentionWork& work, AttentionGradients again) {
  parallel(work.threads, [&](int, int) {
    SplitWorker worker(p, a);
    take_pieces(work, [&](const AttentionPiece& piece) {
      // An infinity in some factor leaves NaN in its pieces' products: see the forward.
      if (!worker.run(piece)) again(p, a, piece);
      zero_gradient_padding(p, a, piece);
    });
  });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
