// rnn's entries on NVIDIA GPUs: checks, plan, choice of the arithmetic.
#include "common/error.h"
#include "cuda/rnn_launches.h"

namespace interfuse {
namespace cuda {
namespace {

constexpr int64_t kMost = int64_t(1) << 48;  // elements of a tensor; products of checked sizes stay far from overflow
constexpr int kOldest = 80;

int gates_of(int cell) { return cell == INTERFUSE_LSTM ? 4 : cell == INTERFUSE_GRU ? 3 : 1; }

RnnWalk checked(const interfuse_cuda_rnn_spec* given) {
  if (!given) invalid("rnn: no spec was given; fill in an interfuse_cuda_rnn_spec.");
  const interfuse_cuda_rnn_spec& s = *given;
  if (s.cell < INTERFUSE_RNN_TANH || s.cell > INTERFUSE_GRU)
    invalid("rnn: cell is %d; allowed are the values of interfuse_cell, 0 to 3.", s.cell);
  if (s.dtype != INTERFUSE_FLOAT32 && s.dtype != INTERFUSE_BFLOAT16 && s.dtype != INTERFUSE_FLOAT16)
    invalid("rnn: dtype is %d; allowed are INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16 and INTERFUSE_FLOAT16.", s.dtype);
  if (s.directions != 1 && s.directions != 2) invalid("rnn: directions is %d; allowed are 1 and 2.", s.directions);
  if (s.hidden_size < 1 || s.hidden_size > 1 << 20)
    invalid("rnn: hidden_size is %lld; allowed is 1 to 2^20.", (long long)s.hidden_size);
  if (s.batch < 0 || s.steps < 0 || s.batch > kMost || s.steps > kMost ||
      (s.batch > 0 && s.steps > kMost / 8 / s.hidden_size / s.batch))
    invalid("rnn: batch is %lld and steps %lld; both must be at least 0, and the gates of all tokens at most 2^48 elements.",
            (long long)s.batch, (long long)s.steps);
  const int64_t by_step = s.token_strides[0], by_sequence = s.token_strides[1];
  if (!(by_step == s.batch && by_sequence == 1) && !(by_step == 1 && by_sequence == s.steps))
    invalid("rnn: token_strides are %lld and %lld; tokens are numbered with time first (batch, 1) or last (1, steps).",
            (long long)by_step, (long long)by_sequence);
  const bool whole = s.part[0] == 0 && s.part[1] == 0;
  if (!whole && (s.directions != 1 || s.part[0] < 0 || s.part[0] >= s.part[1] || s.part[1] > s.steps))
    invalid("rnn: part is %lld to %lld of %lld steps, in %d directions; it must be a range of the steps that is not empty, in "
            "one direction, or {0, 0} for all steps.",
            (long long)s.part[0], (long long)s.part[1], (long long)s.steps, s.directions);
  const Arithmetic arithmetic = s.dtype == INTERFUSE_BFLOAT16  ? Arithmetic::bfloat16
                                : s.dtype == INTERFUSE_FLOAT16 ? Arithmetic::float16
                                : s.tf32                       ? Arithmetic::tf32
                                                               : Arithmetic::float32;
  return {s.cell, gates_of(s.cell), s.directions, arithmetic, s.batch, s.steps, s.hidden_size, by_step, by_sequence,
          s.part[0], whole ? s.steps : s.part[1]};
}

void check_carry(const RnnWalk& walk, const float* carry) {
  if (!carry && (walk.begin > 0 || walk.end < walk.steps))
    invalid("rnn: a part of the steps was asked for without carry, which brings the states from one part to the next.");
}

RnnMachine machine_of(const interfuse_cuda_device& device) {
  if (device.compute_capability < kOldest)
    invalid("rnn: the device has compute capability %d.%d; the CUDA kernels need 8.0 (Ampere) or newer.",
            device.compute_capability / 10, device.compute_capability % 10);
  // 16 blocks are more than every device must allow, and what those of 9.0 and 10.0 do. Others have no such clusters.
  const int major = device.compute_capability / 10;
  return {major == 9 || major == 10 ? 16 : 1, device.shared_bytes, device.multiprocessors};
}

template <class Arrays>
void run(const RnnWalk& walk, bool backward, const void* w_hh, const Arrays& arrays, void* workspace, void* stream) {
  if (!workspace) invalid("rnn: no workspace was given; interfuse_cuda_rnn_plan says how many bytes it takes.");
  const RnnTeam team = rnn_team(walk, backward, machine_of(current_device()));
  const RnnLaunch given = {walk, team, static_cast<char*>(workspace), stream};
  switch (walk.arithmetic) {
    case Arithmetic::bfloat16: return launch_bfloat16(given, w_hh, arrays);
    case Arithmetic::float16: return launch_float16(given, w_hh, arrays);
    case Arithmetic::tf32: return launch_tf32(given, w_hh, arrays);
    case Arithmetic::float32: return launch_float32(given, w_hh, arrays);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace interfuse

extern "C" {

interfuse_status interfuse_cuda_rnn_plan(const interfuse_cuda_rnn_spec* spec, int32_t backward,
                                         const interfuse_cuda_device* device, interfuse_cuda_rnn_team* team) {
  using namespace interfuse;
  return guarded([&] {
    const cuda::RnnWalk walk = cuda::checked(spec);
    if (!team) invalid("rnn: plan was given no place for its answer.");
    const cuda::RnnMachine machine = cuda::machine_of(device ? *device : cuda::current_device());
    *team = {};
    if (walk.batch == 0) return;
    const cuda::RnnTeam t = cuda::rnn_team(walk, backward != 0, machine);
    *team = {t.cluster, t.clusters, 32 * t.warps(), 8 * t.column_tiles, t.teams, t.shared_bytes(),
             t.workspace_bytes(walk.directions)};
  });
}

interfuse_status interfuse_cuda_rnn_forward(const interfuse_cuda_rnn_spec* spec,
                                            const interfuse_cuda_rnn_forward_arrays* arrays, void* workspace, void* stream) {
  using namespace interfuse;
  return guarded([&] {
    const cuda::RnnWalk walk = cuda::checked(spec);
    if (walk.batch == 0) return;
    if (!arrays || !arrays->w_hh || !arrays->hn || (walk.steps > 0 && (!arrays->pre || !arrays->y)))
      invalid("rnn: forward was given a null pointer for pre, w_hh, y or hn; all four are needed.");
    const interfuse_cuda_rnn_forward_arrays& a = *arrays;
    if (walk.cell == INTERFUSE_LSTM && (!a.cn || (a.gates && !a.state)))
      invalid("rnn: an LSTM's forward needs cn, and state where gates are saved.");
    cuda::check_carry(walk, a.carry);
    const cuda::RnnForwardArrays all = {a.pre, a.b_hn, a.h0, a.c0, a.lengths, a.y, a.hn, a.cn, a.gates, a.state, a.carry};
    cuda::run(walk, false, a.w_hh, all, workspace, stream);
  });
}

interfuse_status interfuse_cuda_rnn_backward(const interfuse_cuda_rnn_spec* spec,
                                             const interfuse_cuda_rnn_backward_arrays* arrays, void* workspace,
                                             void* stream) {
  using namespace interfuse;
  return guarded([&] {
    const cuda::RnnWalk walk = cuda::checked(spec);
    if (walk.batch == 0) return;
    if (!arrays || !arrays->w_hh || (walk.steps > 0 && !arrays->grads))
      invalid("rnn: backward was given a null pointer for w_hh or grads; both are needed.");
    const interfuse_cuda_rnn_backward_arrays& a = *arrays;
    const bool saved = walk.cell == INTERFUSE_LSTM  ? a.gates && a.state
                       : walk.cell == INTERFUSE_GRU ? a.gates && a.y
                                                    : a.y != nullptr;
    if (walk.steps > 0 && !saved)
      invalid("rnn: backward needs what forward saved: gates and state of an LSTM, gates and y of a GRU, y of an RNN.");
    cuda::check_carry(walk, a.carry);
    const cuda::RnnBackwardArrays all = {a.grad_y, a.grad_hn, a.grad_cn, a.h0,      a.c0,      a.lengths, a.y,
                                         a.gates,  a.state,   a.grads,   a.grad_h0, a.grad_c0, a.carry};
    cuda::run(walk, true, a.w_hh, all, workspace, stream);
  });
}

}  // extern "C"
