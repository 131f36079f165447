// conv_pool's gradients: one thread's way through its strips.
//
// The gradient of x of a row is finished when no later strip reaches it: the rows that the next strip still adds to are
// carried over. What a thread's first strip shares with the thread before, it computes itself: the windows before its
// own that reach into its rows come first, for the gradient of x only.
#include "common/scratch.h"
#include "cpu/conv_pool_backward.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {


void set_steps(const BackwardPlan& plan, Strip* s) {
  s->step[2] = plan.lanes;
  s->step[1] = s->size[2] * s->step[2];
  s->step[0] = s->size[1] * s->step[1];
  s->image_step = s->size[0] * s->step[0];
  s->floats = s->images * s->image_step;
}

Strip make_strip(const BackwardPlan& plan, int64_t image, int64_t images, int64_t begin, int64_t end) {
  Strip s;
  s.image = image, s.images = images, s.begin = begin, s.end = end;
  for (int i = 0; i < 3; ++i) {
    s.lo[i] = i == plan.axis ? plan.touch_begin(begin) : 0;
    s.size[i] =
        (i == plan.axis ? plan.touch_end(end - 1) : (plan.extent(i) - 1) * plan.stride[i] + plan.reach(i)) - s.lo[i];
  }
  set_steps(plan, &s);
  return s;
}

// Room for every strip: as if neither padding nor the end of the axis cut it short.
Strip largest_strip(const BackwardPlan& plan) {
  Strip s = make_strip(plan, 0, plan.strip_images, 0, plan.strip_steps);
  const int i = plan.axis;
  s.size[i] = ((plan.strip_steps - 1) * plan.window_stride[i] + plan.window[i] - 1) * plan.stride[i] + plan.reach(i);
  set_steps(plan, &s);
  return s;
}

class Worker {
 public:
  Worker(const BackwardPlan& plan, const Task& task)
      : plan_(plan), p_(*plan.p), task_(task), channels_(task.k_end - task.k_begin) {
    allocate();
  }

  void run() {
    const int64_t steps = plan_.count[plan_.axis];
    for (int64_t at = task_.begin; at < task_.end;) {
      const int64_t image = at / steps, begin = at % steps;
      if (begin == 0 && plan_.strip_images > 1 && task_.end - at >= steps) {
        const int64_t images = least(plan_.strip_images, (task_.end - at) / steps);
        first_row_ = carried_ = 0;
        strip(make_strip(plan_, image, images, 0, steps), true);
        at += images * steps;
      } else {
        const int64_t end = least(steps, begin + task_.end - at);
        part_of_image(image, begin, end);
        at += end - begin;
      }
    }
  }

 private:
  void part_of_image(int64_t image, int64_t begin, int64_t end) {
    first_row_ = begin == 0 ? 0 : plan_.touch_begin(begin);
    int64_t again = begin;
    while (task_.grad_x && again > 0 && plan_.touch_end(again - 1) > first_row_) --again;
    carried_ = 0;
    for (int64_t at = again; at < end;) {
      const int64_t stop = least(at + plan_.strip_steps, at < begin ? begin : end);
      strip(make_strip(plan_, image, 1, at, stop), at >= begin);
      at = stop;
    }
  }

  // ---- working space ----------------------------------------------------------------------------------------------

  void allocate() {
    Strip s = largest_strip(plan_);
    int64_t carried = s.floats / s.size[plan_.axis] * carry_rows();
    if (plan_.in_planes()) {
      planes_ = planes_of(plan_, s, channels_);
      s.floats = in_channels() * planes_.channel;
      const Slab slab = slab_of(s, 0, carry_rows());
      carried = slab.count * slab.length;
      const int64_t row = greatest(kLanes * 4, 2 * in_channels()) * greatest(plan_.in[2], plan_.conv[2]);
      sources_ = static_cast<PlaneSource*>(scratch(Slot::rows, static_cast<size_t>(plan_.taps) * sizeof(PlaneSource) +
                                                                   static_cast<size_t>(row) * sizeof(float)));
      row_ = reinterpret_cast<float*>(sources_ + plan_.taps);
      const bool patches = plan_.method == Method::patches;
      gradient_ = scratch_floats(Slot::products,
                                 patches ? patches_floats(plan_, channels_) : s.images * planes_.gradient_floats());
    } else if (plan_.method == Method::dense) {
      const int64_t pixels = pixels_of(s), row = 2 * greatest(greatest(plan_.conv[2], p_.out.w), p_.group_out) + kLanes;
      gradient_ = scratch_floats(Slot::products, divide_up(channels_, kBlock) * kBlock * pixels);
      row_ = scratch_floats(Slot::rows, row + pixels);
      offsets_ = reinterpret_cast<int32_t*>(row_ + row);
    } else if (plan_.method == Method::winograd) {
      const TileStrip t = tiles_of(plan_, s);
      gradient_ = scratch_floats(Slot::products, winograd_floats(t));
      clear_spare_rows(t, gradient_);
      values_ = scratch_floats(Slot::rows, 2 * t.window_floats());
      places_ = reinterpret_cast<int32_t*>(values_ + t.window_floats());
    } else {
      plan_lists(plan_, s, channels_, &lists_);
      const int64_t count = lists_.tile_count * lists_.channels;
      lists_.values = scratch_floats(Slot::products, 2 * count * lists_.capacity);
      lists_.offsets = reinterpret_cast<int32_t*>(lists_.values + count * lists_.capacity);
      lists_.counts = static_cast<int32_t*>(scratch(Slot::rows, static_cast<size_t>(count) * sizeof(int32_t)));
    }
    x_ = scratch_floats(Slot::tiles, s.floats);
    if (!task_.grad_x) return;
    grad_x_ = scratch_floats(Slot::gradient, s.floats + plan_.units * plan_.chunks * carried);
    carry_ = grad_x_ + s.floats;
    carry_step_ = carried;
  }

  int64_t in_channels() const { return plan_.unit_groups * p_.group_in; }  // of a unit
  int64_t pixels_of(const Strip& s) const {
    return s.images * (s.end - s.begin) * (plan_.count[0] * plan_.count[1] * plan_.count[2] / plan_.count[plan_.axis]);
  }

  // ---- a strip ----------------------------------------------------------------------------------------------------

  void strip(const Strip& s, bool ours) {
    const bool weights = ours && task_.grad_weight, biases = ours && task_.grad_bias;
    if (!weights && !biases && !task_.grad_x) return;
    if (plan_.method == Method::dense) find_offsets(s);
    for (int64_t unit = task_.unit_begin; unit < task_.unit_end; ++unit)
      plan_.method == Method::planes     ? planes_unit(s, unit, weights, biases)
      : plan_.method == Method::patches  ? patches_unit(s, weights, biases)
      : plan_.method == Method::winograd ? tiles_unit(s, unit, weights, biases)
                                         : packed_unit(s, unit, weights, biases);
    carried_ = greatest(s.lo[plan_.axis] + s.size[plan_.axis] - finished_end(s), 0);
  }

  void packed_unit(const Strip& s, int64_t group, bool weights, bool biases) {
    const int64_t pixels = pixels_of(s), blocks = divide_up(channels_, kBlock),
                  first = group * p_.group_out + task_.k_begin;
    const bool sparse = plan_.method == Method::sparse;
    if (sparse) {
      plan_lists(plan_, s, channels_, &lists_);
      list_gradients(plan_, s, first, lists_);
      if (biases) sum_lists(task_.grad_bias + first);
    } else {
      dense_gradients(plan_, s, first, channels_, gradient_, row_);
      if (biases) sum_pixels(pixels, task_.grad_bias + first);
    }
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const int64_t channel = group * p_.group_in + chunk * plan_.lanes;
      const int64_t in_channels = least(plan_.lanes, p_.group_in - chunk * plan_.lanes);
      const int64_t base = (group * plan_.chunks + chunk) * plan_.k_padded * plan_.taps * plan_.lanes;
      if (weights) {
        pack_input(plan_, s, channel, in_channels, x_);
        float* sums = task_.grad_weight + base + task_.k_begin * plan_.taps * plan_.lanes;
        sparse ? sparse_weight_gradient(plan_, s, lists_, x_, sums)
               : dense_weight_gradient(plan_, s, gradient_, offsets_, pixels, blocks, x_, sums);
      }
      if (task_.grad_x) {
        float* carry = carry_ + (group * plan_.chunks + chunk) * carry_step_;
        resume(s, s.floats, carry);
        sparse
            ? sparse_input_gradient(plan_, s, lists_, plan_.packed_weight + base, grad_x_)
            : dense_input_gradient(plan_, s, gradient_, offsets_, pixels, blocks, plan_.packed_weight + base, grad_x_);
        store_input_gradient(plan_, s, channel, in_channels, greatest(finished_begin(s), first_row_), finished_end(s),
                             grad_x_);
        suspend(s, carry);
      }
    }
  }

  void planes_unit(const Strip& s, int64_t unit, bool weights, bool biases) {
    const int64_t group = unit * plan_.unit_groups, groups = least(plan_.unit_groups, p_.groups - group);
    const int64_t split = plan_.unit_groups == 1 ? channels_ : p_.group_out;  // output channels of one group
    const int64_t first = group * p_.group_out + task_.k_begin, channel = group * p_.group_in,
                  in_channels = groups * p_.group_in;
    planes_ = planes_of(plan_, s, groups * split);
    planes_gradients(plan_, s, planes_, first, groups * split, gradient_, row_);
    if (biases) sum_planes(s.images, groups * split, task_.grad_bias + first);
    if (weights) {
      pack_planes(plan_, s, planes_, channel, in_channels, x_, row_);
      for (int64_t g = 0; g < groups; ++g)
        planes_weight_gradient(plan_, s, planes_, gradient_ + g * split * planes_.gradient_channel, split,
                               x_ + g * p_.group_in * planes_.channel,
                               task_.grad_weight + (first + g * split) * p_.group_in * plan_.taps * kLanes);
    }
    if (!task_.grad_x) return;
    float* carry = carry_ + unit * carry_step_;
    resume(s, in_channels * planes_.channel, carry);
    for (int64_t g = 0; g < groups; ++g)
      planes_input_gradient(plan_, s, planes_, gradient_ + g * split * planes_.gradient_channel, split,
                            plan_.packed_weight + (group + g) * plan_.taps * p_.group_out * p_.group_in,
                            grad_x_ + g * p_.group_in * planes_.channel, sources_);
    store_planes(plan_, s, planes_, channel, in_channels, greatest(finished_begin(s), first_row_), finished_end(s), grad_x_,
                 row_);
    suspend(s, carry);
  }

  void patches_unit(const Strip& s, bool weights, bool biases) {
    planes_ = planes_of(plan_, s, channels_);
    if (weights) pack_planes(plan_, s, planes_, 0, p_.in_channels, x_, row_);
    if (task_.grad_x) resume(s, p_.in_channels * planes_.channel, carry_);
    patches_gradients(plan_, s, planes_, task_.k_begin, channels_, x_, weights ? task_.grad_weight : nullptr,
                      task_.grad_x ? grad_x_ : nullptr, biases ? task_.grad_bias : nullptr, gradient_);
    if (!task_.grad_x) return;
    store_planes(plan_, s, planes_, 0, p_.in_channels, greatest(finished_begin(s), first_row_), finished_end(s), grad_x_,
                 row_);
    suspend(s, carry_);
  }

  void tiles_unit(const Strip& s, int64_t group, bool weights, bool biases) {
    const TileStrip t = tiles_of(plan_, s);
    const int64_t first = group * p_.group_out, channel = group * p_.group_in,
                  base = group * plan_.depth_points * 36 * plan_.lanes;
    window_gradients(plan_, s, t, first, channels_, values_, places_);
    if (biases) sum_windows(t, task_.grad_bias + first);
    if (weights) pack_input(plan_, s, channel, p_.group_in, x_);
    float* carry = carry_ + group * carry_step_;
    if (task_.grad_x) resume(s, s.floats, carry);
    if (!weights && !task_.grad_x) return;
    winograd_gradients(plan_, s, t, values_, places_, x_, plan_.packed_weight + base * p_.group_out,
                       weights ? task_.grad_weight + base * plan_.k_padded : nullptr, task_.grad_x ? grad_x_ : nullptr,
                       gradient_);
    if (!task_.grad_x) return;
    Vec check = zero();
    for (int64_t i = 0; i < s.floats; i += kLanes) check = multiply_add(load(grad_x_ + i), zero(), check);
    if (!is_finite(check)) plan_.mark_broken();
    store_input_gradient(plan_, s, channel, p_.group_in, greatest(finished_begin(s), first_row_), finished_end(s), grad_x_);
    suspend(s, carry);
  }

  // ---- what strips hand on ----------------------------------------------------------------------------------------

  int64_t carry_rows() const {
    const int i = plan_.axis;
    return greatest(0, (plan_.window[i] - 1 - plan_.window_stride[i]) * plan_.stride[i] + plan_.reach(i));
  }
  // The rows that no later strip adds to.
  int64_t finished_begin(const Strip& s) const { return s.begin == 0 ? 0 : s.lo[plan_.axis]; }
  int64_t finished_end(const Strip& s) const {
    return s.end == plan_.count[plan_.axis] ? plan_.in[plan_.axis] + plan_.pad[plan_.axis] : plan_.touch_begin(s.end);
  }

  // Some rows of the strips' axis in a strip's buffer: `count` runs of `length` floats, `step` apart.
  struct Slab {
    int64_t start, count, step, length;
  };
  Slab slab_of(const Strip& s, int64_t row, int64_t rows) const {
    if (!plan_.in_planes()) {
      int64_t count = s.images, length = plan_.lanes;
      for (int i = 0; i < plan_.axis; ++i) count *= s.size[i];
      for (int i = plan_.axis + 1; i < 3; ++i) length *= s.size[i];
      return {row * length, count, s.size[plan_.axis] * length, rows * length};
    }
    const int64_t planes = in_channels() * s.images;
    if (plan_.axis == 0) return {row * planes_.slice, planes, planes_.image, rows * planes_.slice};
    if (plan_.axis == 1) return {row * planes_.row, planes * s.size[0], planes_.slice, rows * planes_.row};
    // A strip starts at a multiple of the stride, so what is handed on starts at the same column of every phase.
    return {row / plan_.stride[2], planes * s.size[0] * s.size[1] * plan_.stride[2], planes_.phase,
            divide_up(rows, plan_.stride[2])};
  }
  // Zeros, but for the rows that the strip before already added to.
  void resume(const Strip& s, int64_t floats, const float* carry) {
    memset(grad_x_, 0, static_cast<size_t>(floats) * sizeof(float));
    const Slab slab = slab_of(s, 0, carried_);
    for (int64_t i = 0; carried_ && i < slab.count; ++i)
      memcpy(grad_x_ + slab.start + i * slab.step, carry + i * slab.length,
             static_cast<size_t>(slab.length) * sizeof(float));
  }
  void suspend(const Strip& s, float* carry) {
    const int64_t rows = s.lo[plan_.axis] + s.size[plan_.axis] - finished_end(s);
    if (s.end == plan_.count[plan_.axis] || rows <= 0) return;
    const Slab slab = slab_of(s, s.size[plan_.axis] - rows, rows);
    for (int64_t i = 0; i < slab.count; ++i)
      memcpy(carry + i * slab.length, grad_x_ + slab.start + i * slab.step,
             static_cast<size_t>(slab.length) * sizeof(float));
  }

  // Where each pixel of the strip has its first kernel tap, in floats.
  void find_offsets(const Strip& s) {
    int64_t begin[3], end[3], at = 0;
    for (int i = 0; i < 3; ++i) {
      begin[i] = i == plan_.axis ? s.begin : 0;
      end[i] = i == plan_.axis ? s.end : plan_.count[i];
    }
    for (int64_t n = 0; n < s.images; ++n)
      for (int64_t d = begin[0]; d < end[0]; ++d)
        for (int64_t h = begin[1]; h < end[1]; ++h)
          for (int64_t w = begin[2]; w < end[2]; ++w)
            offsets_[at++] = static_cast<int32_t>(n * s.image_step + (d * plan_.stride[0] - s.lo[0]) * s.step[0] +
                                                  (h * plan_.stride[1] - s.lo[1]) * s.step[1] +
                                                  (w * plan_.stride[2] - s.lo[2]) * s.step[2]);
  }

  // ---- the bias: sums of a strip in float, of all in double ---------------------------------------------------------

  static float sum_of(const float* values, int64_t count) {
    Vec sums = zero();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sums += load(values + i);
    sums += load_first(values + i, static_cast<int>(count - i));
    return sum_lanes(sums);
  }
  void sum_lists(double* biases) const {
    for (int64_t list = 0; list < lists_.tile_count * lists_.channels; ++list)
      biases[list % lists_.channels] += sum_of(lists_.values + list * lists_.capacity, lists_.counts[list]);
  }
  void sum_pixels(int64_t pixels, double* biases) const {
    for (int64_t block = 0; block * kBlock < channels_; ++block) {
      float sums[kBlock] = {};
      for (int64_t i = 0; i < pixels; ++i)
        for (int k = 0; k < kBlock; ++k) sums[k] += gradient_[(block * pixels + i) * kBlock + k];
      for (int64_t k = 0; k < kBlock && block * kBlock + k < channels_; ++k) biases[block * kBlock + k] += sums[k];
    }
  }
  void sum_planes(int64_t images, int64_t channels, double* biases) const {
    const int64_t rows = images * planes_.pixels[0] * planes_.pixels[1];
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < channels; ++k)
        biases[k] += sum_of(gradient_ + row * planes_.gradient_row + k * planes_.gradient_channel + planes_.left,
                            planes_.pixels[2]);
  }

  void sum_windows(const TileStrip& t, double* biases) const {
    for (int64_t k = 0; k < channels_; k += kLanes) {
      Vec sums = zero();
      for (int64_t i = 0; i < t.window_floats(); i += t.k_lanes) sums += load(values_ + i + k);
      for (int64_t lane = 0; lane < least(kLanes, channels_ - k); ++lane) biases[k + lane] += sums[lane];
    }
  }

  const BackwardPlan& plan_;
  const ConvPool& p_;
  const Task& task_;
  const int64_t channels_;  // output channels of a unit
  int64_t first_row_ = 0,
          carried_ = 0;  // the thread's rows begin there; rows of the strip before that wait in the carry
  float *x_ = nullptr, *grad_x_ = nullptr, *carry_ = nullptr, *gradient_ = nullptr, *row_ = nullptr, *values_ = nullptr;
  int32_t* places_ = nullptr;
  int64_t carry_step_ = 0;
  SparseLists lists_{};
  Planes planes_{};
  PlaneSource* sources_ = nullptr;
  int32_t* offsets_ = nullptr;
};

}  // namespace

int64_t largest_strip_floats(const BackwardPlan& plan) { return largest_strip(plan).floats; }

void run_strips(const BackwardPlan& plan, const Task& task) {
  if (task.begin >= task.end || task.unit_begin >= task.unit_end) return;
  Worker worker(plan, task);
  worker.run();
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
