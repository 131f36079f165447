// The recurrent kernels' products. Compiled once per ISA.
#include "cpu/rnn_products.h"

#include "common/gemm.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// A bfloat16 weight's word: the values of two steps of k.
typedef uint32_t Pair;

INTERFUSE_INLINE Vec low_half(IVec words) { return (Vec)(words << 16); }
INTERFUSE_INLINE Vec high_half(IVec words) { return (Vec)(words & (int32_t)0xffff0000); }

// Two multiply-adds start per cycle and each takes four or five, so a tile of few accumulators deals k out to several
// sets of them.
constexpr int split_of(int accumulators) {
  const int most = kGemmAccumulators >= 24 ? 16 : 8;
  return accumulators * 2 > most ? 1 : accumulators * 4 > most ? 2 : accumulators * 8 > most ? 4 : 8;
}

template <class W, int Rows, int Panels, int Vectors>
__attribute__((noinline)) void tile(const Product& p, int64_t row, int64_t panel) {
  constexpr bool kHalf = W(0.5f) == W(0);
  constexpr int kColumns = Panels * Vectors, kSplit = kHalf ? 2 : split_of(Rows * kColumns), kPerWord = kHalf ? 2 : 1;
  const int64_t a_row = p.a_row, w_panel = p.w_panel, last = Vectors == 3 ? p.last : 0;
  const float* a = p.a + row * a_row;
  const float* w = p.w + panel * w_panel;
  Vec sum[kSplit][Rows][kColumns];
  unrolled<Rows>([&](int r) __attribute__((always_inline)) {
    unrolled<kColumns>([&](int i) __attribute__((always_inline)) {
      const int v = i % Vectors;
      const float* from = p.start + (row + r) * p.start_row + (panel + i / Vectors) * p.start_panel + v * kLanes;
      sum[0][r][i] = p.start ? load(from + (v == Vectors - 1 ? last : 0)) : zero();
      unrolled<kSplit - 1>([&](int s) __attribute__((always_inline)) { sum[s + 1][r][i] = zero(); });
    });
  });
  // One word of k, at an offset known when this is compiled.
  const auto step = [&](int k) __attribute__((always_inline)) {
    unrolled<Panels>([&](int q) __attribute__((always_inline)) {
      const float* row_of_w = w + q * w_panel + k * Vectors * kLanes;
      if constexpr (kHalf) {
        Vec even[Vectors], odd[Vectors];
        unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
          const IVec words = (IVec)load(row_of_w + v * kLanes);
          even[v] = low_half(words), odd[v] = high_half(words);
        });
        unrolled<Rows>([&](int r) __attribute__((always_inline)) {
          const Vec first = splat(a[r * a_row + 2 * k]), second = splat(a[r * a_row + 2 * k + 1]);
          unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
            Vec& to = sum[0][r][q * Vectors + v];
            Vec& other = sum[1][r][q * Vectors + v];
            to = multiply_add(first, even[v], to);
            other = multiply_add(second, odd[v], other);
          });
        });
      } else {
        Vec columns[Vectors];
        unrolled<Vectors>([&](int v) __attribute__((always_inline)) { columns[v] = load(row_of_w + v * kLanes); });
        unrolled<Rows>([&](int r) __attribute__((always_inline)) {
          const Vec value = splat(a[r * a_row + k]);
          unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
            Vec& to = sum[k % kSplit][r][q * Vectors + v];
            to = multiply_add(value, columns[v], to);
          });
        });
      }
    });
  };
  constexpr int kUnroll = kHalf ? 2 : kSplit > 4 ? kSplit : 4;
  const int64_t words = kHalf ? (p.depth + 1) / 2 : p.depth;
  int64_t k = 0;
  for (; k + kUnroll <= words; k += kUnroll) {
    unrolled<kUnroll>([&](int i) __attribute__((always_inline)) { step(i); });
    a += kUnroll * kPerWord, w += kUnroll * Vectors * kLanes;
    asm("" : "+r"(a), "+r"(w));  // as in gemm_tile: no loads of the next steps started early
  }
  for (; k < words; ++k, a += kPerWord, w += Vectors * kLanes) step(0);
  unrolled<Rows>([&](int r) __attribute__((always_inline)) {
    unrolled<kColumns>([&](int i) __attribute__((always_inline)) {
      const int v = i % Vectors;
      Vec total = sum[0][r][i];
      unrolled<kSplit - 1>([&](int s) __attribute__((always_inline)) { total = total + sum[s + 1][r][i]; });
      float* to = p.c + (row + r) * p.c_row + (panel + i / Vectors) * p.c_panel + v * kLanes;
      store(to + (v == Vectors - 1 ? last : 0), total);
    });
  });
}

// Rows of the tallest tile, and how many panels one or two rows take at a time.
template <class W, int Vectors>
struct Tiles {
  static constexpr bool kHalf = W(0.5f) == W(0);
  static constexpr int kFit = kGemmAccumulators / (Vectors * (kHalf ? 2 : 1));
  static constexpr int kTall = kFit >= 6 && !kHalf ? 6 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  static constexpr int kDeep = Vectors == 1 ? 1 : kGemmAccumulators >= 24 ? (kHalf ? 2 : 4) : (kHalf ? 1 : 2);
  static constexpr int kPairDeep = Vectors == 1 || kHalf || kGemmAccumulators < 24 ? 1 : 2;
};

// `rows` rows from `row` on, panels [0, panels) in groups of Deep.
template <class W, int Rows, int Deep, int Vectors>
INTERFUSE_INLINE void along_panels(const Product& p, int64_t row, int64_t panels) {
  int64_t panel = 0;
  for (; panel + Deep <= panels; panel += Deep) tile<W, Rows, Deep, Vectors>(p, row, panel);
  if constexpr (Deep > 1)
    for (; panel < panels; ++panel) tile<W, Rows, 1, Vectors>(p, row, panel);
}

template <class W, int Vectors>
void product(const Product& p, int64_t rows, int64_t panels) {
  using Sizes = Tiles<W, Vectors>;
  if (rows == 1) return along_panels<W, 1, Sizes::kDeep, Vectors>(p, 0, panels);
  if constexpr (Sizes::kTall >= 2) {
    if (rows == 2) return along_panels<W, 2, Sizes::kPairDeep, Vectors>(p, 0, panels);
    // Panel by panel, whose weights then stay in L1 for all rows.
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row;
        if constexpr (Sizes::kTall >= 6) {
          if (left >= 6 && left != 8) {  // 4 + 4 are better than 6 + 2
            tile<W, 6, 1, Vectors>(p, row, panel), row += 6;
            continue;
          }
        }
        if constexpr (Sizes::kTall >= 4) {
          if (left >= 4) {
            tile<W, 4, 1, Vectors>(p, row, panel), row += 4;
            continue;
          }
        }
        if (left >= 2)
          tile<W, 2, 1, Vectors>(p, row, panel), row += 2;
        else
          tile<W, 1, 1, Vectors>(p, row, panel), ++row;
      }
  } else {
    for (int64_t row = 0; row < rows; ++row) along_panels<W, 1, Sizes::kDeep, Vectors>(p, row, panels);
  }
}

}  // namespace

extern const ProductKernel product4, product3, product1, half_product4, half_product3, half_product1;
const ProductKernel product4 = product<float, 4>, product3 = product<float, 3>, product1 = product<float, 1>;
const ProductKernel half_product4 = product<Pair, 4>, half_product3 = product<Pair, 3>, half_product1 = product<Pair, 1>;

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
