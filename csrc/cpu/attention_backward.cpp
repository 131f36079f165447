// Attention, backward: the probabilities come again from the scores and the saved logarithms, so nothing of the size
// queries x keys is ever kept.
//
// A piece is some keys of one (batch, kv head); it owns their gradients and passes over all query rows of the group
// once: five products on a block of 48 query rows by 128 keys, whose probabilities and their gradients stay in the
// caches. The queries' gradients gather in memory of the thread, or, where one (batch, kv head) is cut into several
// pieces, in a partial result each, which are summed in the pieces' order.
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_split.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kBlockKeys = 128;
constexpr int kScoreRow = kBlockKeys + 16;  // an odd number of cache lines
constexpr int kBlockTiles = 48 / kRows;
constexpr int kBlockRows = kBlockTiles * kRows;
static_assert(48 % kRows == 0 && kBlockKeys % kPanel == 0, "blocks are whole tiles");
constexpr int64_t kTilesFloats = int64_t(1) << 16;  // of packed query rows, about

// probability * (product - delta): the gradient of the scores, over `columns` keys.
struct ScoreGradient {
  int64_t depth, columns;
  const float *a, *b, *probability, *delta;
  float* to;

  template <int R, int V>
  INTERFUSE_INLINE void tile(const float* panel, int64_t column) {
    gemm_tile<R, V, true>(
        depth, a, 1, kRows, panel, kPanel, [](int, int) __attribute__((always_inline)) { return zero(); },
        [&](int r, int v, Vec sum) __attribute__((always_inline)) {
          const int64_t at = r * kScoreRow + column + v * kLanes;
          store(to + at, load(probability + at) * (sum - delta[r]));
        });
  }
  INTERFUSE_INLINE void run() {
    int64_t column = 0;
    for (; column + kLanes < columns; column += kPanel) tile<kRows, 2>(b + column * depth, column);
    if (column < columns) tile<kRows, 1>(b + column * depth, column);
  }
};

// c[r] += the sum over k of a(r, k) * b[k], for `columns` columns in panels. The block's own sum starts at zero: rounding
// grows with the length of a chain of sums.
template <int ARow, int AStep>
struct Accumulate {
  int64_t depth, columns, b_panel, c_row;
  const float *a, *b;
  float* c;

  template <int R, int V>
  INTERFUSE_INLINE void tile(const float* panel, float* to) {
    gemm_tile<R, V, true>(
        depth, a, ARow, AStep, panel, kPanel, [](int, int) __attribute__((always_inline)) { return zero(); },
        [&](int r, int v, Vec sum) __attribute__((always_inline)) {
          float* const at = to + r * c_row + v * kLanes;
          store(at, load(at) + sum);
        });
  }

  template <int R>
  INTERFUSE_INLINE void run() {
    int64_t column = 0;
    const float* panel = b;
    for (; column + kLanes < columns; column += kPanel, panel += b_panel) tile<R, 2>(panel, c + column);
    if (column < columns) tile<R, 1>(panel, c + column);
  }
};

// The lanes of the sum of products.
template <class T>
INTERFUSE_INLINE Vec dot(const T* a, const T* b, int64_t count) {
  Vec sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = multiply_add(load(a + i), load(b + i), sum);
  const int left = static_cast<int>(count - i);
  return left ? multiply_add(load_first(a + i, left), load_first(b + i, left), sum) : sum;
}

INTERFUSE_INLINE Vec dot(bool half, const void* a, const void* b, int64_t count) {
  return half ? dot(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), count)
              : dot(static_cast<const float*>(a), static_cast<const float*>(b), count);
}

class Worker {
 public:
  Worker(const Attention& p, const AttentionBackward& a)
      : p_(p), a_(a), e_row_(round_up(p.head_dim, kLanes)), v_row_(round_up(p.value_dim, kLanes)) {
    const int64_t e = p.head_dim, v = p.value_dim, tile = kRows * (3 * e + 2 * v);
    tiles_ = greatest(kTilesFloats / tile, kBlockTiles) / kBlockTiles * kBlockTiles;
    rows_ = tiles_ * kRows;
    float* at = scratch_floats(Slot::rows, packed_tiles(rows_, e) + packed_tiles(rows_, v) + packed_rows(rows_, e) +
                                               packed_rows(rows_, v) + rows_ * (e_row_ + 2));
    const auto take = [&](int64_t floats) { return (at += floats) - floats; };
    q_tiles_ = take(packed_tiles(rows_, e)), grad_y_tiles_ = take(packed_tiles(rows_, v));
    q_rows_ = take(packed_rows(rows_, e)), grad_y_rows_ = take(packed_rows(rows_, v));
    grad_q_ = take(rows_ * e_row_), offset_ = take(rows_), delta_ = take(rows_);
    at = scratch_floats(Slot::pack, 2 * packed_columns(kBlockKeys, greatest(e, v)) + packed_rows(kBlockKeys, e));
    k_columns_ = take(packed_columns(kBlockKeys, greatest(e, v))), v_columns_ = take(packed_columns(kBlockKeys, greatest(e, v)));
    k_rows_ = at;
    probability_ = scratch_floats(Slot::tiles, 2 * kBlockRows * kScoreRow);
    gradient_ = probability_ + kBlockRows * kScoreRow;
  }

  void run(const AttentionPiece& piece) {
    const int64_t b = piece.batch;
    queries_here_ = a_.in.q_lengths ? a_.in.q_lengths[b] : p_.queries;
    const int64_t length = a_.in.kv_lengths ? a_.in.kv_lengths[b] : p_.keys;
    end_ = greatest(least(piece.end, length), piece.begin);
    const int64_t keys = end_ - piece.begin + kRows;  // the last tile of keys may be written whole
    grad_k_ = scratch_floats(Slot::gradient, keys * (e_row_ + v_row_));
    grad_v_ = grad_k_ + keys * e_row_;
    memset(grad_k_, 0, static_cast<size_t>(keys * (e_row_ + v_row_)) * 4);
    const int64_t all = divide_up(queries_here_, kRows) * p_.group();
    for (int64_t first = 0; first < all; first += tiles_) pass(piece, first, least(all - first, tiles_));
    store_keys(piece);
  }

 private:
  QueryRows rows_at(const AttentionPiece& piece, int64_t index) const {
    return query_rows(piece.batch, piece.kv_head * p_.group(), {0, queries_here_}, kRows, index);
  }

  void pass(const AttentionPiece& piece, int64_t first, int64_t count) {
    memset(grad_q_, 0, static_cast<size_t>(count * kRows * e_row_) * 4);
    for (int64_t t = 0; t < count; ++t) pack(rows_at(piece, first + t), t);
    const int64_t b = piece.batch;
    for (int64_t key = piece.begin; key < end_; key += kBlockKeys) {
      const int64_t keys = least(end_ - key, kBlockKeys);
      const Rows k{element(p_.half, a_.in.k, p_.k.at(b, piece.kv_head) + key * p_.k.row), p_.k.row, keys, p_.head_dim};
      const Rows v{element(p_.half, a_.in.v, p_.v.at(b, piece.kv_head) + key * p_.v.row), p_.v.row, keys, p_.value_dim};
      pack_columns(p_.half, k, k_columns_);
      pack_rows(p_.half, k, kBlockKeys, k_rows_);
      pack_columns(p_.half, v, v_columns_);
      for (int64_t t = 0; t < count; t += kBlockTiles) block(piece, first, t, least(count - t, kBlockTiles), key, keys);
    }
    for (int64_t t = 0; t < count; ++t) store_queries(piece, rows_at(piece, first + t), t);
  }

  void pack(const QueryRows& tile, int64_t t) {
    const int64_t b = tile.batch, row = t * kRows, y_at = p_.y.at(b, tile.head) + tile.query * p_.y.row;
    const Rows q{element(p_.half, a_.in.q, p_.q.at(b, tile.head) + tile.query * p_.q.row), p_.q.row, tile.count, p_.head_dim};
    const Rows grad{element(p_.half, a_.grad_y, y_at), p_.y.row, tile.count, p_.value_dim};
    pack_tiles(p_.half, q, p_.scale * kLog2E, q_tiles_ + row * p_.head_dim);
    pack_rows(p_.half, q, rows_, q_rows_ + row * kPanel);
    pack_tiles(p_.half, grad, 1.f, grad_y_tiles_ + row * p_.value_dim);
    pack_rows(p_.half, grad, rows_, grad_y_rows_ + row * kPanel);
    // A tile's missing rows are zeros.
    zero_rows(tile.count, p_.head_dim, q_rows_ + row * kPanel);
    zero_rows(tile.count, p_.value_dim, grad_y_rows_ + row * kPanel);
    row_states(p_, a_, b, tile.head, tile.query, tile.count, kRows, offset_ + row, delta_ + row);
  }

  void zero_rows(int64_t rows, int64_t width, float* to) const {
    if (rows < kRows)
      for (int64_t column = 0; column < width; column += kPanel)
        memset(to + column * rows_ + rows * kPanel, 0, static_cast<size_t>((kRows - rows) * kPanel) * 4);
  }

  // The five products of tiles t..t + count with keys key..key + keys.
  void block(const AttentionPiece& piece, int64_t first, int64_t t, int64_t count, int64_t key, int64_t keys) {
    int64_t columns = 0;
    for (int64_t j = 0; j < count; ++j) {
      const QueryRows tile = rows_at(piece, first + t + j);
      columns = greatest(columns, keys_read(p_, tile.query + tile.count - 1, key, keys));
    }
    if (columns == 0) return;
    const int64_t padded = round_up(columns, kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const QueryRows tile = rows_at(piece, first + t + j);
      const int64_t row = (t + j) * kRows;
      float *p = probability_ + j * kRows * kScoreRow, *g = gradient_ + j * kRows * kScoreRow;
      TileProduct product{p_.head_dim, q_tiles_ + row * p_.head_dim, k_columns_, p_.head_dim * kPanel, p, columns};
      TileProductOf<kScoreRow>{product}.template run<kRows>();
      for (int r = 0; r < kRows; ++r) {
        const int64_t query = tile.query + r, most = r < tile.count ? keys_read(p_, query, key, keys) : columns;
        if (r < tile.count && (p_.mask != INTERFUSE_MASK_NONE || most < padded))
          apply_mask(mask_row(p_, a_.in.mask, piece.batch, tile.head, query, key), p + r * kScoreRow, least(most, columns), padded);
        exponentials(p + r * kScoreRow, padded, offset_[row + r]);
      }
      ScoreGradient{p_.value_dim, columns, grad_y_tiles_ + row * p_.value_dim, v_columns_, p, delta_ + row, g}.run();
      Accumulate<kScoreRow, 1>{columns, p_.head_dim, kBlockKeys * kPanel, e_row_, g, k_rows_, grad_q_ + row * e_row_}.template run<kRows>();
    }
    const int64_t begin = key - piece.begin;
    for (int64_t at = 0; at < columns; at += kRows) {
      Accumulate<1, kScoreRow> values{count * kRows, p_.value_dim, rows_ * kPanel, v_row_, probability_ + at,
                                      grad_y_rows_ + t * kRows * kPanel, grad_v_ + (begin + at) * v_row_};
      for_tile_rows(columns - at, values);
      Accumulate<1, kScoreRow> scores{count * kRows, p_.head_dim, rows_ * kPanel, e_row_, gradient_ + at,
                                      q_rows_ + t * kRows * kPanel, grad_k_ + (begin + at) * e_row_};
      for_tile_rows(columns - at, scores);
    }
  }

  void store_queries(const AttentionPiece& piece, const QueryRows& tile, int64_t t) {
    for (int64_t r = 0; r < tile.count; ++r) {
      const float* from = grad_q_ + (t * kRows + r) * e_row_;
      const int64_t query = tile.query + r;
      if (a_.parts > 1) {
        const int64_t row = ((piece.part * p_.batch + piece.batch) * p_.heads + tile.head) * p_.queries + query;
        memcpy(a_.partial + row * p_.head_dim, from, static_cast<size_t>(p_.head_dim) * 4);
      } else {
        store_row(p_.half, a_.grad_q, p_.grad_q.at(piece.batch, tile.head) + query * p_.grad_q.row, from, p_.head_dim, p_.scale);
      }
    }
  }

  void store_keys(const AttentionPiece& piece) {
    const int64_t to_k = p_.grad_k.at(piece.batch, piece.kv_head), to_v = p_.grad_v.at(piece.batch, piece.kv_head);
    for (int64_t key = piece.begin; key < piece.end; ++key) {
      const int64_t at_k = to_k + key * p_.grad_k.row, at_v = to_v + key * p_.grad_v.row, i = key - piece.begin;
      if (key < end_) {
        store_row(p_.half, a_.grad_k, at_k, grad_k_ + i * e_row_, p_.head_dim, p_.scale);
        store_row(p_.half, a_.grad_v, at_v, grad_v_ + i * v_row_, p_.value_dim, 1.f);
      } else {
        zero_row(p_.half, a_.grad_k, at_k, p_.head_dim);
        zero_row(p_.half, a_.grad_v, at_v, p_.value_dim);
      }
    }
  }

  const Attention& p_;
  const AttentionBackward& a_;
  const int64_t e_row_, v_row_;
  int64_t tiles_, rows_, queries_here_ = 0, end_ = 0;
  float *q_tiles_, *grad_y_tiles_, *q_rows_, *grad_y_rows_, *grad_q_, *offset_, *delta_;
  float *k_columns_, *v_columns_, *k_rows_, *probability_, *gradient_;
  float *grad_k_ = nullptr, *grad_v_ = nullptr;
};

// The gradient of q from its parts, for the rows that fall to this thread.
void sum_parts(const Attention& p, const AttentionBackward& a, int thread, int threads) {
  const int64_t rows = p.batch * p.heads * p.queries, size = p.head_dim;
  float* sum = scratch_floats(Slot::rows, size);
  const Range mine = share(rows, thread, threads);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const int64_t b = row / (p.heads * p.queries), head = row / p.queries % p.heads, query = row % p.queries;
    const int64_t at = p.grad_q.at(b, head) + query * p.grad_q.row;
    if (a.in.q_lengths && query >= a.in.q_lengths[b]) {
      zero_row(p.half, a.grad_q, at, size);
      continue;
    }
    memcpy(sum, a.partial + row * size, static_cast<size_t>(size) * 4);
    for (int64_t part = 1; part < a.parts; ++part)
      for (int64_t i = 0; i < size; ++i) sum[i] += a.partial[(part * rows + row) * size + i];
    store_row(p.half, a.grad_q, at, sum, size, p.scale);
  }
}

void on_vector_units(const Attention& p, const AttentionBackward& a, AttentionWork& work) {
  parallel(work.threads, [&](int, int) {
    Worker worker(p, a);
    take_pieces(work, [&](const AttentionPiece& piece) {
      worker.run(piece);
      zero_gradient_padding(p, a, piece);
    });
  });
}

#if defined(INTERFUSE_SPLIT_PRODUCT)
void piece_again(const Attention& p, const AttentionBackward& a, const AttentionPiece& piece) { Worker(p, a).run(piece); }
#endif

}  // namespace

void zero_gradient_padding(const Attention& p, const AttentionBackward& a, const AttentionPiece& piece) {
  if (piece.part || a.parts > 1) return;  // the sum of the parts writes it
  const int64_t queries = a.in.q_lengths ? a.in.q_lengths[piece.batch] : p.queries;
  for (int64_t head = piece.kv_head * p.group(); head < (piece.kv_head + 1) * p.group(); ++head)
    for (int64_t query = queries; query < p.queries; ++query)
      zero_row(p.half, a.grad_q, p.grad_q.at(piece.batch, head) + query * p.grad_q.row, p.head_dim);
}

void row_states(const Attention& p, const AttentionBackward& a, int64_t b, int64_t head, int64_t query, int64_t count,
                int64_t padded, float* offset, float* delta) {
  for (int64_t i = 0; i < padded; ++i) offset[i] = infinity(), delta[i] = 0;
  const float* const lse = a.in.lse + (b * p.heads + head) * p.queries + query;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int rows = static_cast<int>(least(count - first, kLanes));
    Vec products[kLanes] = {};
    for (int i = 0; i < rows; ++i) {
      if (lse[first + i] == -infinity()) continue;  // attends to nothing
      offset[first + i] = lse[first + i] * kLog2E;
      const int64_t at = p.y.at(b, head) + (query + first + i) * p.y.row;
      products[i] = dot(p.half, element(p.half, a.grad_y, at), element(p.half, a.in.y, at), p.value_dim);
    }
    transpose(products);  // adding up a vector's lanes one by one would take longer than the products
    Vec sum = products[0];
    for (int lane = 1; lane < kLanes; ++lane) sum += products[lane];
    store_first(delta + first, sum, rows);
  }
}

void attention_backward(const Attention& p, const AttentionBackward& a, AttentionWork& work) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (on_matrix_units(p)) attention_backward_split(p, a, work, piece_again);
  else on_vector_units(p, a, work);
#else
  on_vector_units(p, a, work);
#endif
  if (a.parts > 1) parallel(work.threads, [&](int thread, int threads) { sum_parts(p, a, thread, threads); });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
