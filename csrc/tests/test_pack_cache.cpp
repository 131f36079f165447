// The cache of packed weights, seen through conv_pool and by itself: no stale pack is ever used, two threads may fill
// and use it at once, and it does not grow beyond its bound.
#include "common/pack_cache.h"

#include <atomic>
#include <thread>

#include "tests/run_conv_pool.h"

using namespace interfuse;
using namespace interfuse_test;

namespace {

const Problem kProblem = {"packed", 1, 32, 32, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
                          INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0};

interfuse_conv_pool_spec spec_of(bool channels_last, bool highest) {
  interfuse_conv_pool_spec spec = interfuse_test::spec_of(kProblem, INTERFUSE_FLOAT32, channels_last, highest);
  spec.save = 0;
  return spec;
}

constexpr size_t kWeights = 32 * 32 * 9, kInputs = 32 * 64, kOutputs = 32 * 16;

std::vector<float> reals(size_t count, unsigned seed) {
  Guarded<float> buffer(static_cast<int64_t>(count));
  fill(buffer, Values::reals, seed);
  return std::vector<float>(buffer.data(), buffer.data() + count);
}

std::vector<float> forward(const interfuse_conv_pool_spec& spec, const std::vector<float>& x, const float* weight) {
  interfuse_conv_pool* plan = nullptr;
  CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
  std::vector<float> y(kOutputs);
  CHECK_EQUAL(interfuse_conv_pool_forward(plan, x.data(), weight, nullptr, y.data(), nullptr, nullptr, 2),
              INTERFUSE_OK);
  interfuse_conv_pool_destroy(plan);
  return y;
}

// The result without any pack from before.
std::vector<float> afresh(const interfuse_conv_pool_spec& spec, const std::vector<float>& x, const float* weight) {
  clear_pack_cache();
  return forward(spec, x, weight);
}

template <class Body>
void for_each_kernel(Body body) {
  for (bool channels_last : {false, true})
    for (bool highest : {false, true}) {
      const Context context(std::string(channels_last ? "channels last" : "contiguous") + (highest ? ", highest" : ""));
      body(spec_of(channels_last, highest));
    }
}

struct Filling {
  int value, calls;
};
void fill_bytes(void* context, void* data) {
  Filling& filling = *static_cast<Filling*>(context);
  ++filling.calls;
  *static_cast<int*>(data) = filling.value;
}
int content(const Pack& pack) { return *static_cast<const int*>(pack.data()); }

}  // namespace

TEST(pack_a_weight_that_stays_is_packed_once) {
  const std::vector<float> x = reals(kInputs, 1), weight = reals(kWeights, 2);
  const interfuse_conv_pool_spec spec = spec_of(false, false);
  const std::vector<float> first = afresh(spec, x, weight.data());
  const PackCacheState before = pack_cache_state();
  CHECK(forward(spec, x, weight.data()) == first);
  const PackCacheState after = pack_cache_state();
  CHECK_EQUAL(after.hits, before.hits + 1);
  CHECK_EQUAL(after.misses, before.misses);
}

TEST(pack_elements_written_in_place_are_noticed) {
  for_each_kernel([](const interfuse_conv_pool_spec& spec) {
    const std::vector<float> x = reals(kInputs, 1);
    std::vector<float> weight = reals(kWeights, 2);
    for (size_t at : {size_t(0), size_t(1), size_t(4607), kWeights - 1}) {
      const std::vector<float> old = forward(spec, x, weight.data());
      weight[at] += 8.0f;
      const std::vector<float> got = forward(spec, x, weight.data());
      CHECK(got != old);
      CHECK(got == afresh(spec, x, weight.data()));
    }
    // Exchanged elements and a sign leave sums and magnitudes as they were.
    forward(spec, x, weight.data());
    std::swap(weight[10], weight[5000]);
    CHECK(forward(spec, x, weight.data()) == afresh(spec, x, weight.data()));
    weight[77] = -weight[77];
    CHECK(forward(spec, x, weight.data()) == afresh(spec, x, weight.data()));
  });
}

TEST(pack_another_weight_at_the_same_address_is_noticed) {
  for_each_kernel([](const interfuse_conv_pool_spec& spec) {
    const std::vector<float> x = reals(kInputs, 1);
    std::vector<float> place = reals(kWeights, 2);
    for (unsigned seed : {3u, 4u, 3u, 4u}) {
      const std::vector<float> other = reals(kWeights, seed);
      std::copy(other.begin(), other.end(), place.begin());
      CHECK(forward(spec, x, place.data()) == forward(spec, x, other.data()));
    }
  });
}

// One weight in two arrangements: the packs of both layouts and of a grouped problem stand beside each other.
TEST(pack_arrangements_of_one_weight_stay_apart) {
  const std::vector<float> weight = reals(kWeights, 2), x = reals(kInputs, 1);
  const interfuse_conv_pool_spec rows = spec_of(false, false), channels = spec_of(true, false);
  const std::vector<float> by_rows = afresh(rows, x, weight.data()), by_channels = afresh(channels, x, weight.data());
  interfuse_conv_pool_spec grouped = rows;
  grouped.groups = 2;
  const std::vector<float> by_groups = afresh(grouped, x, weight.data());
  clear_pack_cache();
  for (int round = 0; round < 3; ++round) {
    CHECK(forward(rows, x, weight.data()) == by_rows);
    CHECK(forward(channels, x, weight.data()) == by_channels);
    CHECK(forward(grouped, x, weight.data()) == by_groups);
  }
}

// Four threads, each with a weight of its own that changes all the time and one that they share.
TEST(pack_concurrent_use) {
  const std::vector<float> x = reals(kInputs, 1), shared = reals(kWeights, 2);
  const interfuse_conv_pool_spec spec = spec_of(false, false);
  const std::vector<float> with_shared = afresh(spec, x, shared.data());
  std::vector<float> weights[2][4], results[2][4];
  for (unsigned which : {0u, 1u})
    for (unsigned thread = 0; thread < 4; ++thread) {
      weights[which][thread] = reals(kWeights, 10 + 4 * which + thread);
      results[which][thread] = afresh(spec, x, weights[which][thread].data());
    }
  clear_pack_cache();
  std::atomic<int> wrong{0};
  const auto work = [&](unsigned mine) {
    interfuse_conv_pool* plan = nullptr;
    if (interfuse_conv_pool_create(&spec, &plan) != INTERFUSE_OK) return void(++wrong);
    std::vector<float> weight(kWeights), y(kOutputs);
    const auto gives = [&](const float* w, const std::vector<float>& expected) {
      const interfuse_status status =
          interfuse_conv_pool_forward(plan, x.data(), w, nullptr, y.data(), nullptr, nullptr, 1);
      if (status != INTERFUSE_OK || y != expected) ++wrong;
    };
    for (int round = 0; round < 40; ++round) {
      const unsigned which = static_cast<unsigned>(round) % 2;
      std::copy(weights[which][mine].begin(), weights[which][mine].end(), weight.begin());
      gives(weight.data(), results[which][mine]);
      gives(shared.data(), with_shared);
      if (round % 8 == static_cast<int>(mine)) clear_pack_cache();
    }
    interfuse_conv_pool_destroy(plan);
  };
  std::vector<std::thread> threads;
  for (unsigned mine = 0; mine < 4; ++mine) threads.emplace_back(work, mine);
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(wrong.load(), 0);
}

TEST(pack_the_cache_is_bounded_and_forgets_the_longest_unused) {
  clear_pack_cache();
  constexpr size_t quarter = kPackCacheBytes / 4;  // address space: only the first page of each is ever touched
  static const char weights[6] = {};
  Filling filling{0, 0};
  for (int i = 0; i < 4; ++i) {
    filling.value = i;
    const Pack pack({&weights[i], 1, 7}, quarter, fill_bytes, &filling);
    CHECK_EQUAL(content(pack), i);
  }
  CHECK_EQUAL(pack_cache_state().bytes, kPackCacheBytes);
  const Pack first({&weights[0], 1, 7}, quarter, fill_bytes, &filling);  // used again: the second is now the oldest
  CHECK_EQUAL(content(first), 0);
  CHECK_EQUAL(filling.calls, 4);
  filling.value = 4;
  const Pack fifth({&weights[4], 1, 7}, quarter, fill_bytes, &filling);
  CHECK(pack_cache_state().bytes <= kPackCacheBytes);
  CHECK_EQUAL(pack_cache_state().packs, size_t(4));
  filling.value = 9;
  CHECK_EQUAL(content(Pack({&weights[0], 1, 7}, quarter, fill_bytes, &filling)), 0);
  CHECK_EQUAL(content(Pack({&weights[1], 1, 7}, quarter, fill_bytes, &filling)), 9);  // it had left
  // One that is larger than the whole cache serves its user and is not kept.
  filling.value = 5;
  const Pack large({&weights[5], 1, 7}, kPackCacheBytes + 1, fill_bytes, &filling);
  CHECK_EQUAL(content(large), 5);
  CHECK(pack_cache_state().bytes <= kPackCacheBytes);
  clear_pack_cache();
  CHECK_EQUAL(pack_cache_state().bytes, size_t(0));
  CHECK_EQUAL(content(fifth), 4);  // what is in use outlives the cache
}

TEST(pack_other_content_replaces_the_old_pack) {
  clear_pack_cache();
  static const char weight = 0;
  Filling filling{1, 0};
  const Pack old({&weight, 1, 7}, 64, fill_bytes, &filling);
  filling.value = 2;
  const Pack fresh({&weight, 1, 8}, 64, fill_bytes, &filling);
  CHECK_EQUAL(content(old), 1);
  CHECK_EQUAL(content(fresh), 2);
  CHECK_EQUAL(pack_cache_state().packs, size_t(1));
  clear_pack_cache();
}
