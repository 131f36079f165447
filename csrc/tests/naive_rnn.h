// A stack of recurrent layers in double precision, forward and backward, by definition: one sequence, one step, one
// element at a time.
#pragma once

#include <cmath>

#include "interfuse.h"
#include "tests/values.h"

namespace interfuse_test {

struct RnnParameters {
  Doubles w_ih, w_hh, b_ih, b_hh, w_hr;
};

// Everything that goes into a stack, or the gradient of it. Without bias or projection those are empty.
struct RnnInputs {
  std::vector<Doubles> x;  // of each sequence, (steps, input)
  Doubles h0, c0;          // (layers * directions, batch, size)
  std::vector<RnnParameters> runs;
};

struct RnnOutputs {
  Doubles y, hn, cn;  // y (batch, steps, directions * size)
};

class NaiveRnn {
 public:
  NaiveRnn(const interfuse_rnn_spec& spec, std::vector<int64_t> lengths)
      : s(spec),
        lengths_(std::move(lengths)),
        hidden_(spec.hidden_size),
        output_(spec.proj_size ? spec.proj_size : spec.hidden_size),
        gates_(spec.cell == INTERFUSE_LSTM  ? 4
               : spec.cell == INTERFUSE_GRU ? 3
                                            : 1) {}

  int64_t runs() const { return s.layers * s.directions; }
  int64_t output() const { return output_; }
  int64_t rows() const { return gates_ * hidden_; }
  int64_t layer_input(int64_t run) const { return run < s.directions ? s.input_size : s.directions * output_; }

  RnnInputs zeros() const {
    RnnInputs z;
    z.x.assign(count(s.batch), Doubles(count(s.steps * s.input_size)));
    z.h0.assign(count(runs() * s.batch * output_), 0);
    z.c0.assign(count(runs() * s.batch * hidden_), 0);
    for (int64_t run = 0; run < runs(); ++run) {
      const size_t biases = s.bias ? count(rows()) : 0;
      z.runs.push_back({Doubles(count(rows() * layer_input(run))), Doubles(count(rows() * output_)), Doubles(biases),
                        Doubles(biases), Doubles(s.proj_size ? count(output_ * hidden_) : 0)});
    }
    return z;
  }

  RnnOutputs forward(const RnnInputs& in) const {
    RnnOutputs out{Doubles(count(s.batch * s.steps * s.directions * output_)), in.h0, in.c0};
    for (int64_t b = 0; b < s.batch; ++b) {
      const std::vector<Layer> layers = unroll(in, b);
      for (int64_t run = 0; run < runs(); ++run) {
        const Layer& layer = layers[count(run)];
        if (layer.steps.empty()) continue;
        const Step& last = layer.steps.back();
        std::copy(last.h.begin(), last.h.end(), out.hn.begin() + (run * s.batch + b) * output_);
        std::copy(last.c.begin(), last.c.end(), out.cn.begin() + (run * s.batch + b) * hidden_);
        if (run < runs() - s.directions) continue;
        for (const Step& step : layer.steps)
          std::copy(step.h.begin(), step.h.end(),
                    out.y.begin() + ((b * s.steps + step.time) * s.directions + run % s.directions) * output_);
      }
    }
    return out;
  }

  RnnInputs backward(const RnnInputs& in, const RnnOutputs& grad) const {
    RnnInputs to = zeros();
    for (int64_t b = 0; b < s.batch; ++b) {
      const std::vector<Layer> layers = unroll(in, b);
      // The gradient of what the layer being worked on gives, (steps, directions * size).
      Doubles above(grad.y.begin() + b * s.steps * s.directions * output_,
                    grad.y.begin() + (b + 1) * s.steps * s.directions * output_);
      for (int64_t number = s.layers - 1; number >= 0; --number) {
        const int64_t width = layer_input(number * s.directions);
        Doubles below(count(s.steps * width));
        for (int64_t direction = 0; direction < s.directions; ++direction) {
          const int64_t run = number * s.directions + direction, place = run * s.batch + b;
          Doubles dh(grad.hn.begin() + place * output_, grad.hn.begin() + (place + 1) * output_);
          Doubles dc(grad.cn.begin() + place * hidden_, grad.cn.begin() + (place + 1) * hidden_);
          const std::vector<Step>& steps = layers[count(run)].steps;
          for (size_t at = steps.size(); at-- > 0;) {
            const Step& step = steps[at];
            for (int64_t i = 0; i < output_; ++i)
              dh[i] += above[count((step.time * s.directions + direction) * output_ + i)];
            back(in.runs[count(run)], step, dh, dc, to.runs[count(run)], &below[count(step.time * width)]);
          }
          std::copy(dh.begin(), dh.end(), to.h0.begin() + place * output_);
          std::copy(dc.begin(), dc.end(), to.c0.begin() + place * hidden_);
        }
        above = below;
      }
      to.x[count(b)] = above;
    }
    return to;
  }

 private:
  struct Step {
    int64_t time;
    // x, and the state before; the gates after their functions; GRU's product of the new gate with the state;
    // the state after, and h before its projection.
    Doubles x, h_before, c_before, gate, product, c, unprojected, h;
  };
  struct Layer {
    std::vector<Step> steps;  // in the order in which they are worked on
  };

  static size_t count(int64_t n) { return static_cast<size_t>(n); }
  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

  // matrix (rows, columns) times vector, plus bias where there is one.
  static Doubles product(const Doubles& matrix, const Doubles& vector, const Doubles& bias) {
    Doubles out(matrix.size() / vector.size());
    for (size_t row = 0; row < out.size(); ++row) {
      out[row] = bias.empty() ? 0 : bias[row];
      for (size_t i = 0; i < vector.size(); ++i) out[row] += matrix[row * vector.size() + i] * vector[i];
    }
    return out;
  }

  // What the gradient `d` of product(matrix, vector, bias) adds to the gradients of the three.
  static void back_product(const Doubles& matrix, const Doubles& vector, const Doubles& d, Doubles& d_matrix,
                           double* d_vector, Doubles& d_bias) {
    for (size_t row = 0; row < d.size(); ++row) {
      if (!d_bias.empty()) d_bias[row] += d[row];
      for (size_t i = 0; i < vector.size(); ++i) {
        d_matrix[row * vector.size() + i] += d[row] * vector[i];
        d_vector[i] += d[row] * matrix[row * vector.size() + i];
      }
    }
  }

  std::vector<Layer> unroll(const RnnInputs& in, int64_t b) const {
    std::vector<Layer> layers;
    const int64_t length = lengths_[count(b)];
    Doubles below = in.x[count(b)];
    for (int64_t number = 0; number < s.layers; ++number) {
      const int64_t width = layer_input(number * s.directions);
      Doubles above(count(s.steps * s.directions * output_));
      for (int64_t direction = 0; direction < s.directions; ++direction) {
        const int64_t run = number * s.directions + direction, place = run * s.batch + b;
        Layer layer;
        Doubles h(in.h0.begin() + place * output_, in.h0.begin() + (place + 1) * output_);
        Doubles c(in.c0.begin() + place * hidden_, in.c0.begin() + (place + 1) * hidden_);
        for (int64_t at = 0; at < length; ++at) {
          const int64_t time = direction == 0 ? at : length - 1 - at;
          layer.steps.push_back({time, Doubles(below.begin() + time * width, below.begin() + (time + 1) * width), h, c,
                                 {}, {}, {}, {}, {}});
          advance(in.runs[count(run)], layer.steps.back());
          h = layer.steps.back().h, c = layer.steps.back().c;
          std::copy(h.begin(), h.end(), above.begin() + (time * s.directions + direction) * output_);
        }
        layers.push_back(std::move(layer));
      }
      below = above;
    }
    return layers;
  }

  void advance(const RnnParameters& w, Step& step) const {
    const size_t n = count(hidden_);
    const Doubles from_x = product(w.w_ih, step.x, w.b_ih), from_h = product(w.w_hh, step.h_before, w.b_hh);
    step.gate.resize(from_x.size());
    step.unprojected.resize(n);
    step.c = step.c_before;
    for (size_t i = 0; i < from_x.size(); ++i) step.gate[i] = from_x[i] + from_h[i];
    Doubles& g = step.gate;
    for (size_t i = 0; i < n; ++i) {
      double& h = step.unprojected[i];
      if (s.cell == INTERFUSE_RNN_TANH) h = g[i] = std::tanh(g[i]);
      if (s.cell == INTERFUSE_RNN_RELU) h = g[i] = std::max(g[i], 0.0);
      if (s.cell == INTERFUSE_LSTM) {
        for (size_t gate : {0, 1, 3}) g[gate * n + i] = sigmoid(g[gate * n + i]);
        g[2 * n + i] = std::tanh(g[2 * n + i]);
        step.c[i] = g[n + i] * step.c_before[i] + g[i] * g[2 * n + i];
        h = g[3 * n + i] * std::tanh(step.c[i]);
      }
      if (s.cell == INTERFUSE_GRU) {
        for (size_t gate : {0, 1}) g[gate * n + i] = sigmoid(g[gate * n + i]);
        g[2 * n + i] = std::tanh(from_x[2 * n + i] + g[i] * from_h[2 * n + i]);
        h = (1 - g[n + i]) * g[2 * n + i] + g[n + i] * step.h_before[i];
      }
    }
    if (s.cell == INTERFUSE_GRU) step.product.assign(from_h.begin() + hidden_ * 2, from_h.end());
    step.h = s.proj_size ? product(w.w_hr, step.unprojected, {}) : step.unprojected;
  }

  // dh and dc: of the state after the step on the way in, of the state before it on the way out.
  void back(const RnnParameters& w, const Step& step, Doubles& dh, Doubles& dc, RnnParameters& dw,
            double* dx) const {
    const size_t n = count(hidden_);
    const Doubles& g = step.gate;
    Doubles d = dh, none, from_x(g.size()), from_h(g.size()), before(count(output_));
    if (s.proj_size) {
      d.assign(n, 0);
      back_product(w.w_hr, step.unprojected, dh, dw.w_hr, d.data(), none);
    }
    for (size_t i = 0; i < n; ++i) {
      if (s.cell == INTERFUSE_RNN_TANH) from_x[i] = d[i] * (1 - g[i] * g[i]);
      if (s.cell == INTERFUSE_RNN_RELU) from_x[i] = g[i] > 0 ? d[i] : 0;
      if (s.cell == INTERFUSE_LSTM) {
        const double in = g[i], forget = g[n + i], cell = g[2 * n + i], out = g[3 * n + i], t = std::tanh(step.c[i]);
        const double grown = dc[i] + d[i] * out * (1 - t * t);
        from_x[i] = grown * cell * in * (1 - in);
        from_x[n + i] = grown * step.c_before[i] * forget * (1 - forget);
        from_x[2 * n + i] = grown * in * (1 - cell * cell);
        from_x[3 * n + i] = d[i] * t * out * (1 - out);
        dc[i] = grown * forget;
      }
      if (s.cell == INTERFUSE_GRU) {
        const double reset = g[i], update = g[n + i], fresh = g[2 * n + i];
        from_x[2 * n + i] = d[i] * (1 - update) * (1 - fresh * fresh);
        from_x[n + i] = d[i] * (step.h_before[i] - fresh) * update * (1 - update);
        from_x[i] = from_x[2 * n + i] * step.product[i] * reset * (1 - reset);
        before[i] = d[i] * update;
      }
    }
    from_h = from_x;
    for (size_t i = 0; s.cell == INTERFUSE_GRU && i < n; ++i) from_h[2 * n + i] *= g[i];
    back_product(w.w_ih, step.x, from_x, dw.w_ih, dx, dw.b_ih);
    back_product(w.w_hh, step.h_before, from_h, dw.w_hh, before.data(), dw.b_hh);
    dh = before;
  }

  interfuse_rnn_spec s;
  std::vector<int64_t> lengths_;
  int64_t hidden_, output_, gates_;
};

}  // namespace interfuse_test
