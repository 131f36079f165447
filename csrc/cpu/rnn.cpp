// Recurrent layers forward on the CPU. For a stretch of steps the input's share of the gates is one matrix product; then
// the steps run. The batch is dealt out to the threads, or, where it is small, each thread works on its own unit blocks,
// whose recurrent weights stay in its caches. Compiled once per ISA.
#include "common/content_hash.h"
#include "common/pack_cache.h"
#include "common/scratch.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_products.h"
#include "cpu/rnn_shapes.h"
#include "cpu/rnn_team.h"

namespace interfuse {
namespace INTERFUSE_ISA {

void rnn_backward(const Rnn&, const RnnParts&, const RnnBackward&);

namespace {

// Rows of x that are gathered at a time: with one weight panel they fit into L1 and L2.
constexpr int64_t kGather = 48;
// Floats of gates that a stretch of steps may fill: the steps should find them in L2.
constexpr int64_t kStretch = 96 << 10;
// Overlapped layers: the most rows a step, the most floats of a layer's recurrent weight, and the steps that a layer stays
// behind the one below. The first multiplies its input for a few steps at a time too, so that the second starts early.
constexpr int64_t kOverlappedRows = 3, kOverlappedFloats = 80 << 10, kOverlappedSteps = 4, kOverlappedFirst = 8;

// What `rows` inputs, a_row apart, give to the gates of the unit blocks `mine`, with what else the gates start with.
template <class Cell>
void input_sums(const ForwardWeights<Cell>& weights, const typename ForwardWeights<Cell>::Of& w, int64_t depth, const float* a,
                int64_t a_row, int64_t rows, Range mine, float* gates) {
  const int64_t gate_row = weights.vectors() / Cell::kGates * Cell::kSlots * kLanes;
  Product q{};
  q.depth = depth, q.a = a, q.a_row = a_row, q.w = w.w_ih;
  q.start = w.bias, q.start_panel = Cell::kSlots * kLanes;
  q.c = gates, q.c_row = gate_row, q.c_panel = Cell::kSlots * kLanes;
  q.last = kLanes;
  split_product(w.ih_pieces, weights.vectors(), weights.input(), depth, 0, q, rows, mine.begin * Cell::kGates,
                (mine.end - mine.begin) * Cell::kGates);
  if (!Cell::kTwoSums) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      const int64_t slot = (block * Cell::kSlots + Cell::kGates - 1) * kLanes;
      store(gates + i * gate_row + slot, load(w.bias + slot));
    }
}

// All layers over one part of the batch.
template <class Cell>
class Stack {
 public:
  Stack(const Rnn& p, const RnnOrder& order, const RnnForward& a, const float* packed, int threads)
      : p_(p), order_(order), a_(a), weights_(p), packed_(packed), keep_(p, order.tokens), units_(keep_.units),
        outputs_(keep_.outputs), blocks_(units_ / kLanes), gate_row_(keep_.gate_row), overlapped_(overlaps(threads)),
        flags_(threads) {
    stretch_ = kStretch / gate_row_;
    if (stretch_ < order_.rows) stretch_ = order_.rows;
    if (stretch_ > order_.tokens) stretch_ = order_.tokens;
    if (p_.save) a_.reserve += order_.before * p_.layers * p_.directions * RnnLayout<Cell>(p, 1).total;
    allocate();
  }

  void run(int thread, int threads) {
    if (overlapped_ && threads == 2) {
      for (int64_t layer = thread; layer < p_.layers; layer += 2) {
        RnnTeam alone(p_, flags_, 0, 1);
        run_direction(alone, layer, 0, direction_[thread], true);
      }
      return;
    }
    RnnTeam team(p_, flags_, thread, threads);
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      for (int d = 0; d < p_.directions; ++d)
        if (team.takes(d)) run_direction(team, layer, d, direction_[d], false);
      team.meet_all();  // the next layer reads both directions
    }
  }

 private:
  // Buffers of one direction; while saving, the first four lie in the reserve.
  struct Direction {
    float *gates, *cell, *hidden, *output;  // histories, or for gates a stretch, for cell and hidden one state
    bool ring;                              // output holds two steps only
    float *h_start, *c_start;
    typename ForwardWeights<Cell>::Of w;
  };

  // Whether two threads take the layers in turn, each a few steps behind the one below, in place of sharing out each
  // step's units: that spares them a meeting at every step, but each reads all of a layer's recurrent weights.
  bool overlaps(int threads) const {
    return threads == 2 && p_.layers > 1 && p_.directions == 1 && order_.tokens <= kOverlappedRows * order_.steps &&
           weights_.recurrent().floats(weights_.vectors(), p_.output()) <= kOverlappedFloats;
  }

  // Overlapped layers: how many steps they have done, all layers of a thread counted on.
  void tell(int64_t layer, int64_t steps) {
    __atomic_store_n(&done_[layer & 1].steps, layer / 2 * order_.steps + steps, __ATOMIC_RELEASE);
  }
  void await(int64_t layer, int64_t steps) const {
    const int64_t wanted = layer / 2 * order_.steps + steps;
    const int64_t* done = &done_[layer & 1].steps;
    wait_until([&]() __attribute__((always_inline)) { return __atomic_load_n(done, __ATOMIC_ACQUIRE) >= wanted; });
  }

  void allocate() {
    const int sets = overlapped_ ? 2 : p_.directions;
    const int64_t history = p_.layers > 1 ? order_.tokens * outputs_ : 0;
    int64_t each = order_.rows * (outputs_ + units_) + 2 * 16;
    if (!p_.save) each += stretch_ * gate_row_ + 2 * order_.rows * (outputs_ + units_) + 2 * history + 6 * 16;
    RnnMemory memory{scratch_floats(Slot::other, each * sets)};
    for (int d = 0; d < sets; ++d) {
      Direction& x = direction_[d];
      x.h_start = memory.take(order_.rows * outputs_);
      x.c_start = memory.take(order_.rows * units_);
      if (p_.save) continue;
      x.gates = memory.take(stretch_ * gate_row_);
      x.cell = memory.take(order_.rows * units_);
      x.hidden = memory.take(order_.rows * units_);
      ring_[d] = memory.take(2 * order_.rows * outputs_);
      history_[0][d] = memory.take(history);
      history_[1][d] = memory.take(history);
    }
  }

  float* reserved(int64_t layer, int d) const { return a_.reserve + (layer * p_.directions + d) * keep_.total; }
  bool last(int64_t layer) const { return layer + 1 == p_.layers; }
  float* output_of(int64_t layer, int d) const {
    return p_.save ? reserved(layer, d) + keep_.output : last(layer) ? ring_[d] : history_[layer & 1][d];
  }
  INTERFUSE_INLINE float* output_row(const Direction& x, int64_t s, int64_t j) const {
    return x.output + (x.ring ? (s & 1) * order_.rows + j : order_.first[s] + j) * outputs_;
  }

  void run_direction(RnnTeam& team, int64_t layer, int d, Direction x, bool overlapped) {
    x.w = weights_.at(packed_, layer, d);
    x.output = output_of(layer, d);
    x.ring = !p_.save && last(layer);
    if (p_.save) {
      x.gates = reserved(layer, d) + keep_.gates;
      x.cell = reserved(layer, d) + keep_.cell;
      x.hidden = reserved(layer, d) + keep_.hidden;
    }
    start_states(team, layer, d, x);
    team.arrive(d);
    const RnnInput input{p_, order_, a_.in, {layer ? output_of(layer - 1, 0) : nullptr, layer && p_.directions == 2 ? output_of(layer - 1, 1) : nullptr}, outputs_};
    // Whole panels of gates, so that a thread's blocks are a part of the packed weight.
    const int64_t blocks = weights_.input().panel > 1 ? 1 : 4;
    const Range panels = team.share(d, divide_up(blocks_, blocks));
    const Range mine{panels.begin * blocks, panels.end * blocks < blocks_ ? panels.end * blocks : blocks_};
    for (int64_t s = 0; s < order_.steps;) {
      int64_t end = s + 1;
      const int64_t most = !overlapped ? order_.steps : layer > 0 ? kOverlappedSteps : kOverlappedFirst;
      while (end < order_.steps && end - s < most && order_.first[end + 1] - order_.first[s] <= stretch_) ++end;
      if (overlapped && layer > 0) await(layer - 1, end);
      const int64_t base = p_.save ? 0 : order_.first[s];
      if (mine.begin < mine.end) input_product(layer, d, x, input, mine, s, end, base);
      for (; s < end; ++s) {
        step(team, layer, d, x, mine, s, base);
        if (p_.projection) {
          team.meet(d);
          project(team, layer, d, x, s);
          team.arrive(d);
        }
        if (overlapped) tell(layer, s + 1);
      }
    }
    team.wait(d);
    finish(team, layer, d, x);
  }

  void start_states(const RnnTeam& team, int64_t layer, int d, const Direction& x) const {
    const int64_t at = layer * p_.directions + d;
    const Range mine = team.share(d, order_.rows);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      start_state(a_.in->h0, at, p_.output(), j, x.h_start + j * outputs_, outputs_);
      if (Cell::kCell) start_state(a_.in->c0, at, p_.hidden, j, x.c_start + j * units_, units_);
    }
  }
  void start_state(const float* from, int64_t at, int64_t size, int64_t j, float* to, int64_t room) const {
    memset(to, 0, static_cast<size_t>(room) * 4);
    if (from) memcpy(to, from + (at * p_.batch + order_.row[j]) * size, static_cast<size_t>(size) * 4);
  }

  static Range vectors(Range blocks) { return {blocks.begin * Cell::kGates, blocks.end * Cell::kGates}; }

  // The input's share of the gates of steps s..end, and what else they start with.
  void input_product(int64_t layer, int d, const Direction& x, const RnnInput& input, Range mine, int64_t s, int64_t end,
                     int64_t base) const {
    const int64_t depth = p_.layer_input(layer), begin = order_.first[s], stop = order_.first[end];
    if (layer == 0 && a_.gate_table) return look_up(d, x, mine, s, end, base);
    int64_t row = 0;
    const float* direct = input.rows(d, s, row);
    const int64_t most = x.w.ih_pieces ? 2 * kGather : kGather;  // of whole tiles
    float* gathered = direct ? nullptr : scratch_floats(Slot::rows, most * depth);
    for (int64_t first = begin; first < stop;) {
      const int64_t count = direct || stop - first < most ? stop - first : most;
      for (int64_t i = 0; i < count && !direct; ++i) {
        while (order_.first[s + 1] <= first + i) ++s;
        input.copy(d, s, first + i - order_.first[s], gathered + i * depth);
      }
      input_sums<Cell>(weights_, x.w, depth, direct ? direct : gathered, direct ? row : depth, count, mine,
                       x.gates + (first - base) * gate_row_);
      first += count;
    }
  }

  // The same from the table of the token ids' shares.
  void look_up(int d, const Direction& x, Range mine, int64_t s, int64_t end, int64_t base) const {
    const float* table = a_.gate_table + d * p_.vocabulary * gate_row_;
    const int64_t from = mine.begin * Cell::kSlots * kLanes, to = mine.end * Cell::kSlots * kLanes;
    for (; s < end; ++s)
      for (int64_t j = 0; j < order_.active[s]; ++j) {
        const float* row = table + a_.in->ids[order_.time_of(d, s, j) * p_.x_step + order_.row[j] * p_.x_row] * gate_row_;
        float* gates = x.gates + (order_.first[s] + j - base) * gate_row_;
        for (int64_t i = from; i < to; i += kLanes) store(gates + i, load(row + i));
      }
  }

  // Adds the product of h before, its units [from, to), to the gates of the rows of step s.
  INTERFUSE_INLINE void recurrent_product(const Direction& x, int64_t s, int64_t base, Range mine, int64_t from, int64_t to) const {
    if (from >= to) return;
    const Range columns = vectors(mine);
    Product q{};
    q.depth = to - from, q.a = (s ? output_row(x, s - 1, 0) : x.h_start) + from, q.a_row = outputs_;
    q.w = x.w.w_hh;
    q.c = x.gates + (order_.first[s] - base) * gate_row_, q.c_row = gate_row_, q.c_panel = Cell::kSlots * kLanes;
    q.start = q.c, q.start_row = q.c_row, q.start_panel = q.c_panel;
    split_product(x.w.hh_pieces, weights_.vectors(), weights_.recurrent(), p_.output(), from, q, order_.active[s], columns.begin,
                  columns.end - columns.begin);
  }

  // Asks for all of what the others just wrote at once: one line after the other would come at a core's distance each.
  INTERFUSE_INLINE void fetch_outputs(const Direction& x, int64_t s, int64_t from, int64_t to) const {
    constexpr int64_t kRows = 4;
    for (int64_t j = 0; j < order_.active[s + 1] && j < kRows; ++j)
      for (int64_t unit = from; unit < to; unit += 16) __builtin_prefetch(output_row(x, s, j) + unit);
  }

  // Whether the recurrent weights of these blocks fit into L2 beside what else passes through it.
  bool stays_in_cache(Range mine) const {
    constexpr int64_t kFloats = 192 << 10;
    return weights_.recurrent().floats((mine.end - mine.begin) * Cell::kGates, p_.output()) <= kFloats;
  }

  // Weights beyond the cache are swept forwards and backwards in turn: what one step read last, the next finds there.
  void back_and_forth(const Direction& x, int64_t s, int64_t base, Range mine) const {
    constexpr int64_t kBlocks = 4;
    const int64_t groups = divide_up(mine.end - mine.begin, kBlocks);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = mine.begin + (s % 2 ? groups - 1 - i : i) * kBlocks;
      recurrent_product(x, s, base, {begin, begin + kBlocks < mine.end ? begin + kBlocks : mine.end}, 0, p_.output());
    }
  }

  INTERFUSE_INLINE void step(RnnTeam& team, int64_t layer, int d, const Direction& x, Range mine, int64_t s, int64_t base) const {
    const int64_t begin = mine.begin * kLanes, end = mine.end * kLanes < p_.hidden ? mine.end * kLanes : p_.hidden;
    if (!stays_in_cache(mine)) {
      team.wait(d);
      back_and_forth(x, s, base, mine);
    } else if (team.members(d) > 1 && s > 0 && !p_.projection) {
      // This thread's own units first: the others' arrive meanwhile.
      recurrent_product(x, s, base, mine, begin, end);
      team.wait(d);
      if (mine.begin < mine.end) {
        fetch_outputs(x, s - 1, 0, begin);
        fetch_outputs(x, s - 1, end, p_.hidden);
        recurrent_product(x, s, base, mine, 0, begin);
        recurrent_product(x, s, base, mine, end, p_.hidden);
      }
    } else {
      team.wait(d);
      if (mine.begin < mine.end) recurrent_product(x, s, base, mine, 0, p_.output());
    }
    pointwise(layer, d, x, mine, s, base);
    if (!p_.projection) team.arrive(d);
  }

  void pointwise(int64_t layer, int d, const Direction& x, Range mine, int64_t s, int64_t base) const {
    for (int64_t j = 0; j < order_.active[s]; ++j) {
      const int64_t token = order_.first[s] + j, before = s ? order_.first[s - 1] + j : 0;
      float* gates = x.gates + (token - base) * gate_row_;
      const float* h_before = s ? output_row(x, s - 1, j) : x.h_start + j * outputs_;
      const float* c_before = s == 0 ? x.c_start + j * units_ : x.cell + (p_.save ? before : j) * units_;
      float* c_after = x.cell + (p_.save ? token : j) * units_;
      float* h_after = p_.projection ? x.hidden + (p_.save ? token : j) * units_ : output_row(x, s, j);
      float* y = last(layer) && !p_.projection ? y_row(d, s, j) : nullptr;
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const int64_t at = block * kLanes, left = p_.hidden - at;
        Vec c = Cell::kCell ? load(c_before + at) : zero();
        const Vec h_old = Cell::kCell ? zero() : load(h_before + at);
        const Vec h = Cell::forward(gates + block * Cell::kSlots * kLanes, p_.save, h_old, c);
        if (Cell::kCell) store(c_after + at, c);
        store(h_after + at, h);
        if (!y) continue;
        if (left >= kLanes)
          store(y + at, h);
        else
          store_first(y + at, h, static_cast<int>(left));
      }
    }
  }

  float* y_row(int d, int64_t s, int64_t j) const {
    const int64_t t = order_.time_of(d, s, j), row = order_.row[j];
    return a_.y + ((p_.batch_first ? row * p_.steps + t : t * p_.batch + row) * p_.directions + d) * p_.output();
  }

  // output = w_hr * hidden, for the rows of step s.
  void project(const RnnTeam& team, int64_t layer, int d, const Direction& x, int64_t s) const {
    const int64_t vectors = outputs_ / kLanes, active = order_.active[s];
    const Range panels = team.share(d, (vectors + 3) / 4);
    const Range mine{panels.begin * 4, panels.end * 4 < vectors ? panels.end * 4 : vectors};
    if (mine.begin >= mine.end) return;
    Product q{};
    q.depth = p_.hidden, q.a = x.hidden + (p_.save ? order_.first[s] * units_ : 0), q.a_row = units_, q.w = x.w.w_hr;
    q.c = output_row(x, s, 0), q.c_row = outputs_;
    packed_product(ForwardWeights<Cell>::kPlain, p_.hidden, 0, q, active, mine.begin, mine.end - mine.begin);
    if (!last(layer)) return;
    const int64_t begin = mine.begin * kLanes, end = mine.end * kLanes < p_.projection ? mine.end * kLanes : p_.projection;
    for (int64_t j = 0; j < active; ++j)
      memcpy(y_row(d, s, j) + begin, output_row(x, s, j) + begin, static_cast<size_t>(end - begin) * 4);
  }
  // hn and cn in the caller's order, and y's zeros beyond the lengths.
  void finish(const RnnTeam& team, int64_t layer, int d, const Direction& x) const {
    const int64_t at = layer * p_.directions + d, size = p_.output();
    const Range mine = team.share(d, order_.rows);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      const int64_t end = order_.length[j] - 1, row = order_.row[j];
      memcpy(a_.hn + (at * p_.batch + row) * size, end >= 0 ? output_row(x, end, j) : x.h_start + j * outputs_,
             static_cast<size_t>(size) * 4);
      if (Cell::kCell) {
        const float* c = end < 0 ? x.c_start + j * units_ : x.cell + (p_.save ? order_.first[end] + j : j) * units_;
        memcpy(a_.cn + (at * p_.batch + row) * p_.hidden, c, static_cast<size_t>(p_.hidden) * 4);
      }
      if (!last(layer)) continue;
      for (int64_t t = end + 1; t < p_.steps; ++t)
        memset(a_.y + ((p_.batch_first ? row * p_.steps + t : t * p_.batch + row) * p_.directions + d) * size, 0,
               static_cast<size_t>(size) * 4);
    }
  }

  const Rnn& p_;
  const RnnOrder& order_;
  RnnForward a_;
  const ForwardWeights<Cell> weights_;
  const float* packed_;
  const RnnLayout<Cell> keep_;
  const int64_t units_, outputs_, blocks_, gate_row_;
  const bool overlapped_;
  int64_t stretch_;
  struct alignas(128) {
    int64_t steps;
  } done_[2] = {};
  Direction direction_[2] = {};
  float* ring_[2] = {};
  float* history_[2][2] = {};
  RnnFlags flags_;
};

struct ReserveOf {
  const Rnn& p;
  int64_t tokens, floats = 0;
  template <class Cell>
  void run() {
    floats = RnnLayout<Cell>(p, tokens).total * p.layers * p.directions;
  }
};

int64_t reserve(const Rnn& p, int64_t tokens) {
  ReserveOf body{p, tokens};
  for_cell(p.cell, body);
  return body.floats;
}

// A hash of everything that the packed weights are made of.
uint64_t hash_of(const Rnn& p, const RnnForward& a) {
  constexpr int64_t kPiece = 64 << 10;
  struct Source {
    const float* data;
    int64_t floats;
  };
  const int64_t gates = p.gates() * p.hidden, runs = p.layers * p.directions;
  const auto source = [&](int64_t i) __attribute__((always_inline)) {
    const interfuse_rnn_weights& w = a.weights[i / 5];
    switch (i % 5) {
      case 0: return Source{w.w_hh, gates * p.output()};
      case 1: return Source{w.w_ih, gates * p.layer_input(i / 5 / p.directions)};
      case 2: return Source{w.b_ih, p.bias ? gates : 0};
      case 3: return Source{w.b_hh, p.bias ? gates : 0};
      default: return Source{w.w_hr, p.projection * p.hidden};
    }
  };
  int64_t pieces = 0, bytes = 0;
  for (int64_t i = 0; i < 5 * runs; ++i) {
    pieces += divide_up(source(i).floats * 4, kPiece);
    bytes += source(i).floats * 4;
  }
  uint64_t* parts = static_cast<uint64_t*>(scratch(Slot::flags, static_cast<size_t>(pieces) * 8));
  // Waking a team costs a microsecond or two, in which one thread reads about this much.
  parallel(bytes < (192 << 10) ? 1 : a.threads, [&](int thread, int threads) {
    const Range mine = share(pieces, thread, threads);
    int64_t at = 0;
    for (int64_t i = 0; i < 5 * runs && at < mine.end; ++i) {
      const Source from = source(i);
      for (int64_t done = 0; done < from.floats * 4; done += kPiece, ++at)
        if (at >= mine.begin && at < mine.end) {
          const int64_t left = from.floats * 4 - done;
          parts[at] = hash_piece(reinterpret_cast<const unsigned char*>(from.data) + done, left < kPiece ? left : kPiece);
        }
    }
  });
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (int64_t i = 0; i < pieces; ++i) hash = hash_mix(hash ^ parts[i]) + static_cast<uint64_t>(i);
  return hash;
}

uint64_t kind_of(const Rnn& p) {
  uint64_t hash = hash_mix(0x726e6e00u + kLanes);
  for (int64_t part : {int64_t(p.cell), int64_t(p.directions), int64_t(p.bias), int64_t(p.half_weights + 2 * p.rounded_weights + 4 * p.pieces), p.input, p.hidden,
                       p.projection, p.layers})
    hash = hash_mix(hash ^ static_cast<uint64_t>(part)) + 1;
  return hash;
}

template <class Cell>
struct PackJob {
  const Rnn& p;
  const RnnForward& a;
  static void fill(void* context, void* data) {
    const PackJob& job = *static_cast<PackJob*>(context);
    const ForwardWeights<Cell> weights(job.p);
    parallel(job.a.threads, [&](int thread, int threads) { weights.fill(job.a.weights, static_cast<float*>(data), thread, threads); });
  }
};

// Whether the first layer's gates are looked up by token: the table has to stay in L2, and the hash of the embedding
// that it was made from costs a read of that at every call.
bool table_pays(const Rnn& p, int64_t tokens, int64_t floats) {
  constexpr int64_t kFloats = 256 << 10, kTimes = 4;
  return p.vocabulary > 0 && floats <= kFloats && p.vocabulary <= kTimes * tokens;
}

template <class Cell>
struct TableJob {
  const Rnn& p;
  const RnnForward& a;
  const float* packed;
  static void fill(void* context, void* data) {
    const TableJob& job = *static_cast<TableJob*>(context);
    const ForwardWeights<Cell> weights(job.p);
    const int64_t row = RnnLayout<Cell>(job.p, 1).gate_row, input = job.p.input;
    parallel(job.a.threads, [&](int thread, int threads) {
      const Range mine = share(job.p.vocabulary, thread, threads);
      for (int d = 0; d < job.p.directions && mine.begin < mine.end; ++d)
        input_sums<Cell>(weights, weights.at(job.packed, 0, d), input, job.a.in->x + mine.begin * input, input,
                         mine.end - mine.begin, {0, padded(job.p.hidden) / kLanes},
                         static_cast<float*>(data) + (d * job.p.vocabulary + mine.begin) * row);
    });
  }
};

template <class Cell>
void run_parts(const Rnn& p, const RnnParts& parts, const RnnForward& a, const float* packed) {
  if (parts.count == 1) {
    const int threads = rnn_threads<Cell>(p, parts.part[0], a.threads);
    Stack<Cell> stack(p, parts.part[0], a, packed, threads);
    parallel(threads, [&](int thread, int team) { stack.run(thread, team); });
    return;
  }
  parallel(a.threads, [&](int thread, int threads) {
    for (int64_t i = thread; i < parts.count; i += threads) Stack<Cell>(p, parts.part[i], a, packed, 1).run(0, 1);
  });
}

struct ForwardOf {
  const Rnn& p;
  const RnnParts& parts;
  const RnnForward& a;
  template <class Cell>
  void run() {
    const int64_t floats = ForwardWeights<Cell>(p).floats();
    PackJob<Cell> job{p, a};
    if (p.save) {  // training changes the weights at every step: a cache would only cost its hash
      float* packed = scratch_floats(Slot::pack, floats);
      job.fill(&job, packed);
      return run_parts<Cell>(p, parts, a, packed);
    }
    const uint64_t hash = hash_of(p, a);
    const Pack pack({a.weights[0].w_hh, kind_of(p), hash}, static_cast<size_t>(floats) * 4, job.fill, &job);
    const float* packed = static_cast<const float*>(pack.data());
    if (!table_pays(p, parts.tokens, table_floats<Cell>())) return run_parts<Cell>(p, parts, a, packed);
    const uint64_t content = hash_mix(hash ^ content_hash(a.in->x, p.vocabulary * p.input * 4, a.threads));
    TableJob<Cell> rows{p, a, packed};
    const Pack table({a.in->x, kind_of(p) + 1, content}, static_cast<size_t>(table_floats<Cell>()) * 4, rows.fill, &rows);
    RnnForward with_table = a;
    with_table.gate_table = static_cast<const float*>(table.data());
    run_parts<Cell>(p, parts, with_table, packed);
  }
  template <class Cell>
  int64_t table_floats() const {
    return p.directions * p.vocabulary * RnnLayout<Cell>(p, 1).gate_row;
  }
};

// Words of bfloat16 halve the bytes of a weight and cost an instruction for each of its vectors: with more rows than
// these, words of float32 are faster.
bool halves_pay(const Rnn& p, const RnnParts& parts) {
  constexpr int64_t kCache = 256 << 10;  // floats of a recurrent weight that stay in L2
  int64_t steps = 1;
  for (int64_t i = 0; i < parts.count; ++i) steps = parts.part[i].steps > steps ? parts.part[i].steps : steps;
  return parts.tokens <= steps * (p.gates() * p.hidden * p.output() > kCache ? 4 : 2);
}

void forward(const Rnn& given, const RnnParts& parts, const RnnForward& a) {
  Rnn p = given;
  p.rounded_weights = p.half_weights && !halves_pay(p, parts);
  p.half_weights = p.half_weights && !p.rounded_weights;
  int64_t depth = p.input > p.output() ? p.input : p.output();
  if (p.layers > 1 && p.layer_input(1) > depth) depth = p.layer_input(1);
  p.pieces = !given.half_weights && split_pays(parts.part[0].active[0], p.gates() * p.hidden * depth);
  ForwardOf body{p, parts, a};
  for_cell(p.cell, body);
}

}  // namespace

extern const RnnKernels rnn_kernels;
const RnnKernels rnn_kernels = {reserve, forward, rnn_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
