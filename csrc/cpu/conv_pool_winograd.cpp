// Winograd convolution with pooling: the plan of a call, its threads, and what happens to values that are not finite.
// Compiled once per ISA.
#include "cpu/conv_pool_winograd.h"

#include "common/content_hash.h"
#include "common/pack_cache.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/conv_pool_direct.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// What data and product of a block may take of the L2 cache (1 MiB on the smallest machines that this is for); the
// rest is for the weight and the tensors that stream through.
constexpr int64_t kCacheFloats = (int64_t(640) << 10) / 4;

WinogradPlan make_plan(const ConvPool& p, int threads) {
  WinogradPlan plan{};
  plan.depth_tile = winograd_depth_tile(p);
  plan.depth_points = p.kernel.d == 1 ? 1 : plan.depth_tile + 2;
  plan.points = plan.depth_points * kPlane;
  // With pooling, results behind the last window are not needed.
  const auto tiles = [](int64_t conv, int64_t out, int64_t window, int64_t tile) {
    return divide_up(least(conv, out * window), tile);
  };
  plan.tiles = {tiles(p.conv.d, p.out.d, p.window.d, plan.depth_tile), tiles(p.conv.h, p.out.h, p.window.h, kTile),
                tiles(p.conv.w, p.out.w, p.window.w, kTile)};
  plan.all_tiles = p.batch * plan.tiles.volume();
  plan.channels = p.group_in;
  plan.filters = p.group_out;

  // Tiles and filters come in whole register tiles.
  int64_t tile_unit = kLanes, filter_unit = kFilterRows, least_block = kLanes * kTileVectors;
  if (p.channels_last) {
    plan.panel = panel_width(plan.filters);
    filter_unit = plan.panel;
    tile_unit = gemm_tile_rows(static_cast<int>(plan.panel / kLanes));
    least_block = round_up(32, tile_unit);
  }
  const int64_t filters = round_up(plan.filters, filter_unit);
  const int64_t share_of_thread = round_up(divide_up(plan.all_tiles, threads), tile_unit);
  // Data gets two thirds of the cache, product one: a large block saves reading the weight, a large chunk saves
  // reading data from L2 once more.
  int64_t block = kCacheFloats * 2 / 3 / (plan.points * plan.channels) / tile_unit * tile_unit;
  block = least(greatest(block, least_block), kMostBlock / tile_unit * tile_unit);
  const int64_t blocks = divide_up(share_of_thread, block);
  plan.block = least(block, round_up(divide_up(share_of_thread, blocks), tile_unit));
  int64_t chunk = kCacheFloats / 3 / (plan.points * plan.block) / filter_unit * filter_unit;
  chunk = least(greatest(chunk, greatest(filter_unit, 16)), filters);
  plan.chunks = divide_up(filters, chunk);
  plan.chunk = round_up(divide_up(filters, plan.chunks), filter_unit);
  plan.chunks = divide_up(filters, plan.chunk);
  if (p.channels_last) {
    plan.data_row = channel_pitch(plan.channels);
    plan.product_row = plan.chunk;
    plan.data_plane = plane_pitch(plan.block * plan.data_row);
    plan.product_plane = plane_pitch(plan.block * plan.product_row);
  } else {
    plan.data_row = plan.block % 128 ? plan.block : plan.block + 16;
    plan.product_row = plan.block;
    plan.data_plane = plane_pitch(plan.channels * plan.data_row + kLanes);
    plan.product_plane = plane_pitch(plan.chunk * plan.product_row + kLanes);
  }
  return plan;
}

struct PackJob {
  const ConvPool& p;
  const WinogradPlan& plan;
  const WinogradKernel& kernel;
  const ConvPoolForward& a;
};

void fill_pack(void* context, void* data) {
  const PackJob& job = *static_cast<const PackJob*>(context);
  parallel(job.a.threads, [&](int thread, int threads) {
    job.kernel.weight(job.p, job.plan, job.a.weight, static_cast<float*>(data), thread, threads);
  });
}

PackKey pack_key(const ConvPool& p, const WinogradPlan& plan, const ConvPoolForward& a) {
  const int64_t bytes = p.out_channels * p.group_in * p.kernel.volume() * (p.dtype == INTERFUSE_FLOAT32 ? 4 : 2);
  uint64_t kind = 0x77696e6f67726164u + kLanes;
  for (int64_t part :
       {static_cast<int64_t>(p.dtype), static_cast<int64_t>(p.channels_last), static_cast<int64_t>(plan.depth_points),
        p.ws.c, p.groups, plan.channels, plan.filters, plan.chunk})
    kind = hash_mix(kind ^ static_cast<uint64_t>(part));
  return {a.weight, kind, content_hash(a.weight, bytes, a.threads)};
}

// The blocks of one thread's tiles, one after the other.
void run_tiles(const WinogradCall& call, const WinogradKernel& kernel, Range tiles) {
  const WinogradPlan& plan = call.plan;
  float* data = scratch_floats(Slot::tiles, plan.points * plan.data_plane);
  float* product = scratch_floats(Slot::products, plan.points * plan.product_plane);
  for (int64_t tile = tiles.begin; tile < tiles.end; tile += plan.block) {
    const int64_t count = least(plan.block, tiles.end - tile);
    for (int64_t group = 0; group < call.p.groups; ++group) {
      kernel.data(call, group, tile, count, 0, plan.channels, data);
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
        kernel.finish(call, group, tile, count, chunk, data, product);
    }
  }
}

}  // namespace

void conv_pool_winograd(const ConvPool& p, const ConvPoolForward& a) {
  const WinogradPlan plan = make_plan(p, a.threads);
  const bool bf16 = p.dtype == INTERFUSE_BFLOAT16;
  const WinogradKernel& kernel =
      p.channels_last ? *winograd_channels(bf16, plan.depth_tile) : *winograd_rows(bf16, plan.depth_tile);
  PackJob job{p, plan, kernel, a};
  const Pack weight(pack_key(p, plan, a), static_cast<size_t>(p.groups * plan.weight_group()) * sizeof(float),
                    fill_pack, &job);
  uint8_t* broken = static_cast<uint8_t*>(scratch(Slot::flags, static_cast<size_t>(p.batch)));
  memset(broken, 0, static_cast<size_t>(p.batch));
  const WinogradCall call{p, plan, a, static_cast<const float*>(weight.data()), broken};
  const int64_t unit = p.channels_last ? 1 : kLanes, units = divide_up(plan.all_tiles, unit);
  parallel(a.threads, [&](int thread, int threads) {
    const Range mine = share(units, thread, threads);
    run_tiles(call, kernel, {mine.begin * unit, least(mine.end * unit, plan.all_tiles)});
  });
  // A NaN or an infinity spreads over its whole tile, and large values overflow in the transforms. Every such result is
  // noticed: each point of a tile enters its results with a factor that is not zero, and none becomes finite again.
  redo_broken(p, a, broken);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
