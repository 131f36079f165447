// Backward through time on the CPU. The steps run in turn, as forward's did: the product with the transposed recurrent
// weight gives the gradient of h, the cell's pointwise part makes the gates' gradient of it. A chunk of tokens at a time,
// whose gates' gradients are then still in L2, the gradients of the weights and of the layer's input are products over
// the tokens. Compiled once per ISA.
#include "common/scratch.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_outer.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_products.h"
#include "cpu/rnn_shapes.h"
#include "cpu/rnn_team.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr Packing kPlain{1, false};
// With fewer rows a step, cutting the weights into pieces takes longer than the input's gradient on the matrix units saves.
constexpr int64_t kRowsWorthPieces = 4;

template <class Cell>
class Backward {
 public:
  Backward(const Rnn& p, const RnnParts& parts, const RnnBackward& a)
      : p_(p), parts_(parts), a_(a), units_(padded(p.hidden)), outputs_(padded(p.output())), blocks_(units_ / kLanes),
        gate_row_(units_ * Cell::kGates), input_row_(p.layers > 1 && layer_room(1) > layer_room(0) ? layer_room(1) : layer_room(0)),
        pieces_(parts.part[0].active[0] >= kRowsWorthPieces &&
                split_pays(kOuterTokens, gate_row_ * (input_row_ > outputs_ ? input_row_ : outputs_))),
        threads_(parts.count > 1 ? a.threads : rnn_threads<Cell>(p, parts.part[0], a.threads)), flags_(threads_) {}

  void run() {
    allocate();
    parallel(threads_, [&](int thread, int threads) {
      RnnTeam team(p_, flags_, thread, threads);
      pack_weights(thread, threads);
      team.meet_all();
      for (int64_t layer = p_.layers - 1; layer >= 0; --layer) {
        if (parts_.count == 1) {
          run_layer(team, parts_.part[0], part_at(0), layer, a_.grad_weights + layer * p_.directions, true);
          team.meet_all();
          continue;
        }
        // The first thread adds up where the result belongs, the others beside it.
        const Weights own = weights_of(layer, thread);
        for (int64_t i = thread; i < parts_.count; i += threads) {
          RnnTeam one(p_, flags_, 0, 1);  // who meets nobody
          run_layer(one, parts_.part[i], part_at(i), layer, own.direction, i == thread);
        }
        team.meet_all();
        add_up(layer, thread, threads);
        team.meet_all();
      }
    });
  }

 private:
  // What is kept of the steps of one chunk, by token: the gates' gradients, equal but for the GRU, and with a projection
  // those of its result.
  struct Grads {
    float *dx, *dsum, *doutput;
  };
  // Buffers of one part in one direction.
  struct Direction {
    float *incoming, *carry, *h_start, *c_start;  // [row]
    float *dh, *dhidden;                          // one step's [row]; the second below a projection
    Grads grads[2];                               // of the chunk at work and of the one before
    float* input;                                 // of a few tokens, where it lies nowhere as a row
    float* grad_input;                            // [token]
  };
  struct Part {
    Direction direction[2];
    float* grad_below;  // with two directions: [token][direction][output]
    const float* kept;  // of the reserve
  };
  struct Packed {
    float *w_hh, *w_ih, *w_hr;
    float *hh_pieces, *ih_pieces;  // null without
  };
  struct Weights {
    interfuse_rnn_weights direction[2];
  };
  // Steps [begin, end), whose gradients begin with the tokens of step `begin`.
  struct Chunk {
    int64_t begin, end;
    Grads grads;
  };

  int64_t layer_room(int64_t layer) const { return padded(p_.layer_input(layer)); }
  bool needs_input_gradient(int64_t layer) const { return layer > 0 || a_.grad_x; }
  // A chunk has as many tokens as the weights' gradients take in at a time, or those of one step.
  static int64_t chunk_room(const RnnOrder& order) {
    const int64_t most = order.rows > kOuterTokens ? order.rows : kOuterTokens;
    return most < order.tokens ? most : order.tokens;
  }
  bool copies_input() const { return p_.directions == 2 && p_.layers > 1; }

  int64_t part_floats(const RnnOrder& order) const {
    const int64_t projected = p_.projection ? 1 : 0;
    const int64_t each = order.rows * (3 * outputs_ + (2 + projected) * units_) + order.tokens * input_row_ +
                         2 * chunk_room(order) * (gate_row_ * (Cell::kTwoSums ? 2 : 1) + projected * outputs_) +
                         (copies_input() ? kOuterTokens * input_row_ : 0) + 14 * 16;
    return (p_.directions * (each + (p_.directions == 2 ? order.tokens * p_.output() : 0)) + 2 * 16 - 1) / 16 * 16;
  }

  Part part_at(int64_t i) const {
    const RnnOrder& order = parts_.part[i];
    float* base = memory_;
    for (int64_t before = 0; before < i; ++before) base += part_floats(parts_.part[before]);
    RnnMemory memory{base};
    Part part{};
    for (int d = 0; d < p_.directions; ++d) {
      Direction& x = part.direction[d];
      x.incoming = memory.take(order.rows * outputs_);
      x.h_start = memory.take(order.rows * outputs_);
      x.dh = memory.take(order.rows * outputs_);
      x.carry = memory.take(order.rows * units_);
      x.c_start = memory.take(order.rows * units_);
      x.dhidden = p_.projection ? memory.take(order.rows * units_) : nullptr;
      for (Grads& grads : x.grads) {
        grads.dx = memory.take(chunk_room(order) * gate_row_);
        grads.dsum = Cell::kTwoSums ? memory.take(chunk_room(order) * gate_row_) : grads.dx;
        grads.doutput = p_.projection ? memory.take(chunk_room(order) * outputs_) : nullptr;
      }
      x.input = copies_input() ? memory.take(kOuterTokens * input_row_) : nullptr;
      x.grad_input = memory.take(order.tokens * input_row_);
    }
    if (p_.directions == 2) part.grad_below = memory.take(2 * order.tokens * p_.output());
    part.kept = a_.reserve + order.before * p_.layers * p_.directions * RnnLayout<Cell>(p_, 1).total;
    return part;
  }

  int64_t pieces_floats(int64_t columns) const { return pieces_ ? split_floats(columns / kLanes, gate_row_) : 0; }
  int64_t packed_floats(int64_t layer) const {
    return gate_row_ * (outputs_ + layer_room(layer)) + (p_.projection ? outputs_ * units_ : 0) + pieces_floats(outputs_) +
           pieces_floats(layer_room(layer));
  }
  Packed packed(int64_t layer, int d) const {
    float* one = packs_ + (layer ? p_.directions * (packed_floats(0) + (layer - 1) * packed_floats(1)) + d * packed_floats(1)
                                 : d * packed_floats(0));
    Packed all{one, one + gate_row_ * outputs_, one + gate_row_ * (outputs_ + layer_room(layer)), nullptr, nullptr};
    if (!pieces_) return all;
    all.hh_pieces = all.w_hr + (p_.projection ? outputs_ * units_ : 0);
    all.ih_pieces = all.hh_pieces + pieces_floats(outputs_);
    return all;
  }

  // One direction's weights as an array: their places in the struct and their sizes.
  static constexpr int kKinds = 5;
  static float*& weight(interfuse_rnn_weights& w, int kind) {
    float** const all[] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr};
    return *all[kind];
  }
  int64_t weight_floats(int64_t layer, int kind) const {
    const int64_t rows = Cell::kGates * p_.hidden;
    return kind == 0 ? rows * p_.layer_input(layer) : kind == 1 ? rows * p_.output() : kind == 4 ? p_.projection * p_.hidden : rows;
  }
  int64_t sums_floats(int64_t layer) const {
    int64_t floats = 0;
    for (int kind = 0; kind < kKinds; ++kind) floats += (weight_floats(layer, kind) + 15) / 16 * 16;
    return floats * p_.directions;
  }
  int adding_threads() const { return parts_.count < threads_ ? static_cast<int>(parts_.count) : threads_; }

  // Where a thread with parts of its own adds up one layer's gradients.
  Weights weights_of(int64_t layer, int thread) const {
    Weights own{};
    RnnMemory memory{thread > 0 ? sums_ + (thread - 1) * sums_room_ : nullptr};
    for (int d = 0; d < p_.directions; ++d) {
      own.direction[d] = a_.grad_weights[layer * p_.directions + d];
      if (thread == 0) continue;
      for (int kind = 0; kind < kKinds; ++kind) {
        float*& place = weight(own.direction[d], kind);
        float* beside = memory.take(weight_floats(layer, kind));
        if (place) place = beside;
      }
    }
    return own;
  }

  void add_up(int64_t layer, int thread, int threads) const {
    Weights to = weights_of(layer, 0);
    const int adding = parts_.count < threads ? static_cast<int>(parts_.count) : threads;
    for (int d = 0; d < p_.directions; ++d)
      for (int kind = 0; kind < kKinds; ++kind) {
        float* sum = weight(to.direction[d], kind);
        const int64_t floats = weight_floats(layer, kind);
        const Range vectors = share(divide_up(floats, kLanes), thread, threads);
        for (int other = 1; sum && other < adding; ++other) {
          Weights from = weights_of(layer, other);
          const float* more = weight(from.direction[d], kind);
          for (int64_t i = vectors.begin * kLanes; i < vectors.end * kLanes; i += kLanes)
            if (floats - i >= kLanes)
              store(sum + i, load(sum + i) + load(more + i));
            else
              for (int64_t j = i; j < floats; ++j) sum[j] += more[j];
        }
      }
  }

  void allocate() {
    int64_t floats = 0;
    for (int64_t i = 0; i < parts_.count; ++i) floats += part_floats(parts_.part[i]);
    sums_room_ = sums_floats(0) > sums_floats(p_.layers - 1) ? sums_floats(0) : sums_floats(p_.layers - 1);
    memory_ = scratch_floats(Slot::other, floats + (parts_.count > 1 ? (adding_threads() - 1) * sums_room_ : 0));
    sums_ = memory_ + floats;
    packs_ = scratch_floats(Slot::pack, p_.directions * (packed_floats(0) + (p_.layers > 1 ? (p_.layers - 1) * packed_floats(1) : 0)));
  }

  void pack_weights(int thread, int threads) const {
    for (int64_t layer = 0; layer < p_.layers; ++layer)
      for (int d = 0; d < p_.directions; ++d) {
        const interfuse_rnn_weights& w = a_.weights[layer * p_.directions + d];
        const Packed to = packed(layer, d);
        const auto pack = [&](const float* from, int64_t gates, int64_t units, int64_t columns, float* place, float* pieces) {
          const int64_t vectors = padded(columns) / kLanes, fours = vectors / 4;
          const Range mine = share(fours + vectors % 4, thread, threads);
          const auto vector_of = [&](int64_t panel) { return panel < fours ? panel * 4 : fours * 3 + panel; };
          pack_gates_transposed(from, gates, units, columns, mine, place);
          if (pieces)
            split_weight(kPlain, vectors, padded(units) * gates, {vector_of(mine.begin), vector_of(mine.end)}, place, pieces);
        };
        pack(w.w_hh, Cell::kGates, p_.hidden, p_.output(), to.w_hh, to.hh_pieces);
        if (needs_input_gradient(layer)) pack(w.w_ih, Cell::kGates, p_.hidden, p_.layer_input(layer), to.w_ih, to.ih_pieces);
        if (p_.projection) pack(w.w_hr, 1, p_.projection, p_.hidden, to.w_hr, nullptr);
      }
  }

  // What forward kept of a part.
  struct Kept {
    const float *gates, *cell, *hidden, *output;
    int64_t gate_row;
  };
  Kept kept(const RnnOrder& order, const Part& part, int64_t layer, int d) const {
    const RnnLayout<Cell> keep(p_, order.tokens);
    const float* base = part.kept + (layer * p_.directions + d) * keep.total;
    return {base + keep.gates, base + keep.cell, base + keep.hidden, base + keep.output, keep.gate_row};
  }

  // One layer's steps, its weights' gradients (first: begins those sums), and what the layer below or the input gets.
  void run_layer(RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, const interfuse_rnn_weights* sums,
                 bool first) const {
    for (int d = 0; d < p_.directions; ++d)
      if (team.takes(d)) run_direction(team, order, part, layer, d, sums[d], first);
    if (!needs_input_gradient(layer) || (layer > 0 && p_.directions == 1)) return;
    team.meet_all();
    merge_input_gradient(team.share_of_all(order.rows), order, part, layer);
  }

  void run_direction(RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, int d,
                     const interfuse_rnn_weights& sums, bool first) const {
    const Direction& x = part.direction[d];
    prepare(team, order, layer, d, x);
    team.arrive(d);
    const float* after = nullptr;  // the gates' gradients of the step after
    int turn = 0;
    for (int64_t end = order.steps; end > 0; turn ^= 1) {
      Chunk chunk{end - 1, end, x.grads[turn]};
      while (chunk.begin > 0 && order.first[end] - order.first[chunk.begin - 1] <= kOuterTokens) --chunk.begin;
      for (int64_t s = end - 1; s >= chunk.begin; --s) {
        step(team, order, part, layer, d, s, chunk, after);
        after = chunk.grads.dsum + (order.first[s] - order.first[chunk.begin]) * gate_row_;
      }
      team.wait(d);
      weight_gradients(team, order, part, layer, d, chunk, sums, first);
      input_gradient(team, order, layer, d, x, chunk);
      first = false;
      end = chunk.begin;
    }
    team.wait(d);
    if (first) weight_gradients(team, order, part, layer, d, {0, 0, x.grads[0]}, sums, first);  // no token: zeros
    start_gradient(team, order, layer, d, x, after);
  }

  void prepare(const RnnTeam& team, const RnnOrder& order, int64_t layer, int d, const Direction& x) const {
    const int64_t at = layer * p_.directions + d, size = p_.output();
    const Range mine = team.share(d, order.rows);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      fetch(a_.grad_hn, at, size, order.row[j], x.incoming + j * outputs_, outputs_);
      fetch(a_.in->h0, at, size, order.row[j], x.h_start + j * outputs_, outputs_);
      fetch(a_.grad_cn, at, p_.hidden, order.row[j], x.carry + j * units_, units_);
      fetch(a_.in->c0, at, p_.hidden, order.row[j], x.c_start + j * units_, units_);
    }
  }

  void fetch(const float* from, int64_t at, int64_t size, int64_t row, float* to, int64_t room) const {
    memset(to, 0, static_cast<size_t>(room) * 4);
    if (from) memcpy(to, from + (at * p_.batch + row) * size, static_cast<size_t>(size) * 4);
  }

  // The gradient that reaches a token's output from above, or null; its floats beyond the output's size are none of ours.
  INTERFUSE_INLINE const float* from_above(const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, int64_t j) const {
    const int64_t size = p_.output(), token = order.first[s] + j;
    if (layer + 1 < p_.layers)
      return p_.directions == 1 ? part.direction[0].grad_input + token * input_row_
                                : part.grad_below + (token * 2 + d) * size;
    if (!a_.grad_y) return nullptr;
    const int64_t t = order.time_of(d, s, j), b = order.row[j];
    return a_.grad_y + ((p_.batch_first ? b * p_.steps + t : t * p_.batch + b) * p_.directions + d) * size;
  }
  // One vector of the gradient of an output of step s: from above, and from the step after or the caller.
  INTERFUSE_INLINE Vec output_gradient(const Direction& x, const float* above, int64_t j, int64_t column, bool continues) const {
    const Vec dh = load((continues ? x.dh : x.incoming) + j * outputs_ + column);
    if (!above) return dh;
    const int64_t left = p_.output() - column;
    return dh + (left >= kLanes ? load(above + column) : load_first(above + column, static_cast<int>(left)));
  }

  // dh of the first `rows` rows, unit blocks `mine`: the gates' gradients of the step after, of those units `from` to
  // `to`, times the recurrent weight.
  INTERFUSE_INLINE void recurrent_product(const float* after, const Direction& x, const Packed& w, int64_t rows, Range mine,
                                          int64_t from, int64_t to, bool add) const {
    if (rows == 0 || from >= to || mine.begin >= mine.end) return;
    Product q{};
    q.depth = (to - from) * Cell::kGates, q.a = after + from * Cell::kGates, q.a_row = gate_row_;
    q.w = w.w_hh, q.c = x.dh, q.c_row = outputs_;
    if (add) q.start = q.c, q.start_row = q.c_row;
    split_product(w.hh_pieces, outputs_ / kLanes, kPlain, gate_row_, from * Cell::kGates, q, rows, mine.begin,
                  mine.end - mine.begin);
  }

  static Range whole_panels(const RnnTeam& team, int d, int64_t blocks) {
    const Range panels = team.share(d, (blocks + 3) / 4);
    return {panels.begin * 4, panels.end * 4 < blocks ? panels.end * 4 : blocks};
  }

  void step(RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, const Chunk& chunk,
            const float* after) const {
    const Direction& x = part.direction[d];
    const Packed w = packed(layer, d);
    const int64_t going = order.active[s + 1], at = order.first[s] - order.first[chunk.begin];
    const Range mine = whole_panels(team, d, blocks_), out = whole_panels(team, d, outputs_ / kLanes);
    if (p_.projection) {
      team.wait(d);
      recurrent_product(after, x, w, going, out, 0, units_, false);
      float* doutput = chunk.grads.doutput + at * outputs_;
      output_step(order, part, layer, d, s, out, doutput);
      team.meet(d);
      unproject(order, x, w.w_hr, s, mine, doutput);
    } else if (team.members(d) > 1) {
      // This thread's own units first: the others' arrive meanwhile.
      recurrent_product(after, x, w, going, mine, mine.begin * kLanes, mine.end * kLanes, false);
      team.wait(d);
      recurrent_product(after, x, w, going, mine, 0, mine.begin * kLanes, true);
      recurrent_product(after, x, w, going, mine, mine.end * kLanes, units_, true);
    } else {
      recurrent_product(after, x, w, going, mine, 0, units_, false);
    }
    pointwise(order, part, layer, d, s, mine, chunk.grads.dx + at * gate_row_, chunk.grads.dsum + at * gate_row_);
    team.arrive(d);
  }

  // With a projection: the gradient of its result, for this step and for the weight's gradient.
  void output_step(const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, Range mine, float* doutput) const {
    const Direction& x = part.direction[d];
    for (int64_t j = 0; j < order.active[s]; ++j) {
      const float* above = from_above(order, part, layer, d, s, j);
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const Vec dh = output_gradient(x, above, j, block * kLanes, j < order.active[s + 1]);
        store(doutput + j * outputs_ + block * kLanes, dh);
      }
    }
  }

  // dhidden = doutput * w_hr.
  void unproject(const RnnOrder& order, const Direction& x, const float* w, int64_t s, Range mine, const float* doutput) const {
    if (mine.begin >= mine.end) return;
    Product q{};
    q.depth = outputs_, q.a = doutput, q.a_row = outputs_, q.w = w;
    q.c = x.dhidden, q.c_row = units_;
    packed_product(kPlain, outputs_, 0, q, order.active[s], mine.begin, mine.end - mine.begin);
  }

  // The gates' gradients of step s, to dx and dsum.
  void pointwise(const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, Range mine, float* dx_rows,
                 float* dsum_rows) const {
    const Direction& x = part.direction[d];
    const Kept saved = kept(order, part, layer, d);
    for (int64_t j = 0; j < order.active[s]; ++j) {
      const bool continues = j < order.active[s + 1];
      const int64_t token = order.first[s] + j, before = s ? order.first[s - 1] + j : 0;
      const float* above = p_.projection ? nullptr : from_above(order, part, layer, d, s, j);
      const float* c_row = saved.cell + token * units_;
      const float* c_before_row = s ? saved.cell + before * units_ : x.c_start + j * units_;
      const float* h_before_row = s ? saved.output + before * outputs_ : x.h_start + j * outputs_;
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const int64_t column = block * kLanes;
        float* carried = x.carry + j * units_ + column;
        Vec dh = p_.projection ? load(x.dhidden + j * units_ + column) : output_gradient(x, above, j, column, continues);
        Vec carry = Cell::kCarry ? load(carried) : zero();
        // A carry beside h belongs to h: it is part of its gradient. (The LSTM's belongs to c.)
        if (Cell::kCarry && !Cell::kCell && continues) dh += carry;
        const Vec c = Cell::kCell ? load(c_row + column) : zero(), c_before = Cell::kCell ? load(c_before_row + column) : zero();
        const Vec h_before = Cell::kTwoSums ? load(h_before_row + column) : zero();
        Vec dx[Cell::kGates], dsum[Cell::kGates];
        Cell::backward(dh, carry, c, c_before, h_before, saved.gates + token * saved.gate_row + column * Cell::kSlots, dx, dsum);
        if (Cell::kCarry) store(carried, carry);
        const int64_t to = j * gate_row_ + column * Cell::kGates;
        for (int g = 0; g < Cell::kGates; ++g) {
          store(dx_rows + to + g * kLanes, dx[g]);
          if (Cell::kTwoSums) store(dsum_rows + to + g * kLanes, dsum[g]);
        }
      }
    }
  }

  // Of h0 and c0: what a step before the first would have received.
  void start_gradient(RnnTeam& team, const RnnOrder& order, int64_t layer, int d, const Direction& x,
                      const float* after) const {
    const int64_t at = layer * p_.directions + d, size = p_.output(), started = order.steps ? order.active[0] : 0;
    const Range mine = team.share(d, order.rows);
    for (int64_t j = mine.begin; j < mine.end && a_.grad_c0 && Cell::kCell; ++j)
      memcpy(a_.grad_c0 + (at * p_.batch + order.row[j]) * p_.hidden, x.carry + j * units_, static_cast<size_t>(p_.hidden) * 4);
    if (!a_.grad_h0) return;
    const Range out = whole_panels(team, d, outputs_ / kLanes);
    recurrent_product(after, x, packed(layer, d), started, out, 0, units_, false);
    for (int64_t j = 0; j < order.rows; ++j)
      for (int64_t column = out.begin * kLanes; column < out.end * kLanes; column += kLanes) {
        Vec dh = load((j < started ? x.dh : x.incoming) + j * outputs_ + column);
        if (Cell::kCarry && !Cell::kCell && j < started) dh += load(x.carry + j * units_ + column);
        const int64_t left = size - column;
        store_first(a_.grad_h0 + (at * p_.batch + order.row[j]) * size + column, dh, left < kLanes ? static_cast<int>(left) : kLanes);
      }
  }

  // What a chunk's tokens give to the layer's input.
  void input_gradient(const RnnTeam& team, const RnnOrder& order, int64_t layer, int d, const Direction& x, const Chunk& chunk) const {
    if (!needs_input_gradient(layer)) return;
    const int64_t begin = order.first[chunk.begin];
    const Range mine = team.share(d, order.first[chunk.end] - begin);
    if (mine.begin >= mine.end) return;
    Product q{};
    const Packed w = packed(layer, d);
    q.depth = gate_row_, q.a = chunk.grads.dx + mine.begin * gate_row_, q.a_row = gate_row_, q.w = w.w_ih;
    q.c = x.grad_input + (begin + mine.begin) * input_row_, q.c_row = input_row_;
    const int64_t vectors = layer_room(layer) / kLanes;
    split_product(w.ih_pieces, vectors, kPlain, gate_row_, 0, q, mine.end - mine.begin, 0, vectors);
  }

  // What the directions give to the layer's input, added up: for the layer below in its directions' step order, for the
  // first layer in the caller's order.
  void merge_input_gradient(Range mine, const RnnOrder& order, const Part& part, int64_t layer) const {
    const int64_t depth = p_.layer_input(layer), size = p_.output();
    for (int64_t j = mine.begin; j < mine.end; ++j)
      for (int64_t t = 0; t < p_.steps; ++t) {
        const int64_t end = order.length[j] - 1, row = order.row[j];
        float* x_row = layer ? nullptr : a_.grad_x + (p_.batch_first ? row * p_.steps + t : t * p_.batch + row) * depth;
        if (t > end) {
          if (x_row) memset(x_row, 0, static_cast<size_t>(depth) * 4);
          continue;
        }
        const float* one = part.direction[0].grad_input + (order.first[t] + j) * input_row_;
        if (p_.directions == 1) {
          memcpy(x_row, one, static_cast<size_t>(depth) * 4);
          continue;
        }
        const float* two = part.direction[1].grad_input + (order.first[end - t] + j) * input_row_;
        for (int d = 0; d < (layer ? 2 : 1); ++d) {
          float* to = x_row ? x_row : part.grad_below + ((order.first[d == 0 ? t : end - t] + j) * 2 + d) * size;
          const int64_t from = d * size, count = x_row ? depth : size;
          for (int64_t i = 0; i < count; ++i) to[i] = one[from + i] + two[from + i];
        }
      }
  }

  // Adds what a chunk's tokens give to the gradients of the weights (first: begins with it), this thread's share of them.
  void weight_gradients(const RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, int d, const Chunk& chunk,
                        const interfuse_rnn_weights& sums, bool first) const {
    const Direction& x = part.direction[d];
    const Kept saved = kept(order, part, layer, d);
    const RnnInput input{p_, order, a_.in, {layer ? kept(order, part, layer - 1, 0).output : nullptr,
                         layer && p_.directions == 2 ? kept(order, part, layer - 1, 1).output : nullptr}, outputs_};
    const bool same = !Cell::kTwoSums;  // one sum serves both biases
    const OuterTarget of_gates[] = {
        {Cell::kGates, p_.hidden, p_.layer_input(layer), sums.w_ih, sums.b_ih, same ? sums.b_hh : nullptr},
        {Cell::kGates, p_.hidden, p_.output(), sums.w_hh, same ? nullptr : sums.b_hh, nullptr}};
    const OuterTarget of_projection{1, p_.projection, p_.hidden, sums.w_hr, nullptr, nullptr};
    const Range mine = team.share(d, blocks_), out = team.share(d, outputs_ / kLanes);
    const float *inputs[kOuterTokens], *before[kOuterTokens], *hidden[kOuterTokens];
    const int64_t start = order.first[chunk.begin], tokens = order.first[chunk.end] - start;
    int64_t s = chunk.begin, done = 0;
    do {
      const int64_t count = tokens - done < kOuterTokens ? tokens - done : kOuterTokens;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t token = start + done + n;
        while (order.first[s + 1] <= token) ++s;
        const int64_t j = token - order.first[s];
        inputs[n] = input.row(d, s, j);
        if (!inputs[n]) {
          float* copy = x.input + n * layer_room(layer);
          input.copy(d, s, j, copy);
          inputs[n] = copy;
        }
        before[n] = s ? saved.output + (order.first[s - 1] + j) * outputs_ : x.h_start + j * outputs_;
        hidden[n] = saved.hidden + token * units_;
      }
      const float *dx = chunk.grads.dx + done * gate_row_, *dsum = chunk.grads.dsum + done * gate_row_;
      const OuterSource from_gates[] = {{dx, gate_row_, inputs}, {dsum, gate_row_, before}};
      outer_products(of_gates, from_gates, 2, count, mine, first);
      const OuterSource from_projection{chunk.grads.doutput + done * outputs_, outputs_, hidden};
      if (p_.projection) outer_products(&of_projection, &from_projection, 1, count, out, first);
      done += count;
      first = false;
    } while (done < tokens);
  }

  const Rnn& p_;
  const RnnParts& parts_;
  const RnnBackward& a_;
  const int64_t units_, outputs_, blocks_, gate_row_;
  const int64_t input_row_;  // of the input's gradient, alike in all layers: a layer's takes the place of the one's above
  const bool pieces_;  // lie beside the weights, for the matrix units
  const int threads_;
  int64_t sums_room_ = 0;
  float *memory_ = nullptr, *packs_ = nullptr, *sums_ = nullptr;
  RnnFlags flags_;
};

struct BackwardOf {
  const Rnn& p;
  const RnnParts& parts;
  const RnnBackward& a;
  template <class Cell>
  void run() {
    Backward<Cell>(p, parts, a).run();
  }
};

}  // namespace

void rnn_backward(const Rnn& p, const RnnParts& parts, const RnnBackward& a) {
  BackwardOf body{p, parts, a};
  for_cell(p.cell, body);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
