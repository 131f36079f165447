// From a checked walk to a launch of rnn_kernel.h's kernels, for one arithmetic; each has a file of its own, because the
// kernels take long to compile.
#pragma once

#include <cuda_runtime.h>

#include "common/error.h"
#include "cuda/rnn_kernel.h"

namespace interfuse {
namespace cuda {

inline void succeed(cudaError_t status, const char* what) {
  if (status != cudaSuccess) invalid("rnn: %s failed: %s.", what, cudaGetErrorString(status));
}

template <class Kind>
void pack(const RnnLaunch& given, bool backward, const void* w_hh) {
  const int64_t threads = given.walk.directions * given.team.fragments() * 32, block = 32 * kWarps;
  rnn_pack<Kind><<<static_cast<unsigned>((threads + block - 1) / block), static_cast<unsigned>(block), 0,
             static_cast<cudaStream_t>(given.stream)>>>(
      given.walk, given.team, backward, w_hh, given.workspace);
  succeed(cudaGetLastError(), "packing the weights");
}

template <class Arrays>
void launch_kernel(void (*kernel)(RnnWalk, RnnTeam, Arrays, char*), const RnnLaunch& given, const Arrays& arrays) {
  RnnTeam team = given.team;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.attrs = attributes;
  config.blockDim = dim3(static_cast<unsigned>(32 * team.warps()));
  config.dynamicSmemBytes = static_cast<size_t>(team.shared_bytes());
  config.stream = static_cast<cudaStream_t>(given.stream);
  succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(team.shared_bytes())),
          "asking for shared memory");
  if (team.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(team.cluster);
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
    if (team.cluster > 8)
      succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "asking for a large cluster");
  }
  if (team.clusters > 1) {
    // All blocks of a team must run at the same time, and clusters fill whole parts of the device only.
    int running = 0;
    if (team.cluster > 1) {
      config.gridDim = dim3(static_cast<unsigned>(team.blocks()));
      succeed(cudaOccupancyMaxActiveClusters(&running, kernel, &config), "counting the clusters that can run");
    } else {
      int device = 0, each = 0;
      succeed(cudaGetDevice(&device), "asking for the device");
      succeed(cudaDeviceGetAttribute(&running, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
      succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(config.blockDim.x),
                                                            config.dynamicSmemBytes),
              "counting the blocks that can run");
      if (each == 0) running = 0;
    }
    const int64_t room = running / team.clusters;
    if (room == 0)
      invalid("rnn: %d clusters of %d blocks must run at once, and this device runs %d; use the Triton kernels.",
              team.clusters, team.cluster, running);
    team.teams = team.teams < room ? team.teams : room;
    succeed(cudaMemsetAsync(given.workspace + team.flags_at(given.walk.directions), 0,
                             static_cast<size_t>(team.flags_bytes()), config.stream), "clearing flags");
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  config.gridDim = dim3(static_cast<unsigned>(team.teams * team.blocks()));
  succeed(cudaLaunchKernelEx(&config, kernel, given.walk, team, arrays, given.workspace), "the CUDA launch");
}

template <class Kind, int kGates>
void launch_of(const RnnLaunch& given, const RnnForwardArrays& arrays) {
  launch_kernel(given.team.column_tiles == 1 ? rnn_forward<Kind, kGates, 1> : rnn_forward<Kind, kGates, 2>, given, arrays);
}

template <class Kind, int kGates>
void launch_of(const RnnLaunch& given, const RnnBackwardArrays& arrays) {
  launch_kernel(given.team.column_tiles == 1 ? rnn_backward<Kind, kGates, 1> : rnn_backward<Kind, kGates, 2>, given, arrays);
}

template <class Kind, class Arrays>
void launch(const RnnLaunch& given, bool backward, const void* w_hh, const Arrays& arrays) {
  if (given.first(backward)) pack<Kind>(given, backward, w_hh);
  if (given.walk.gates == 4) return launch_of<Kind, 4>(given, arrays);
  if (given.walk.gates == 3) return launch_of<Kind, 3>(given, arrays);
  launch_of<Kind, 1>(given, arrays);
}

}  // namespace cuda
}  // namespace interfuse
