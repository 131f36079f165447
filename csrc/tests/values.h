// Filling buffers with numbers, and comparing results with the truth in double precision.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "tests/guarded.h"

namespace interfuse_test {

using Doubles = std::vector<double>;

inline float load(float v) { return v; }
inline float load(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline void store(float v, float& to) { to = v; }
inline void store(float v, uint16_t& to) {  // round to nearest even; NaN is not among the values
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  to = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void store(float v, int8_t& to) { to = static_cast<int8_t>(v); }

enum class Values { integers, reals };

template <class T>
Doubles fill(Guarded<T>& buffer, Values values, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> whole(-3, 3);
  std::normal_distribution<float> real;
  Doubles out(static_cast<size_t>(buffer.size()));
  for (int64_t i = 0; i < buffer.size(); ++i) {
    store(values == Values::integers ? static_cast<float>(whole(random)) : scale * real(random), buffer[i]);
    out[i] = load(buffer[i]);
  }
  return out;
}

// buffer[i] = value(i)
template <class T, class Value>
Doubles fill_by(Guarded<T>& buffer, Value&& value) {
  Doubles out(static_cast<size_t>(buffer.size()));
  for (int64_t i = 0; i < buffer.size(); ++i) store(value(i), buffer[i]), out[i] = load(buffer[i]);
  return out;
}

// The gradient of loss i: not all the same, and some zero.
inline float grad_of_loss(int64_t i) { return 1 - 0.25f * static_cast<float>(i % 5); }

template <class T>
Doubles read(const Guarded<T>& buffer) {
  Doubles out(static_cast<size_t>(buffer.size()));
  for (int64_t i = 0; i < buffer.size(); ++i) out[i] = load(buffer[i]);
  return out;
}

// One rounding to the 8 bits of bfloat16 is at most 2^-9 of an element; all before it is float32.
constexpr double kRoundedToBfloat16 = 1.0 / 512 + 1e-5;

// The Frobenius norm of the difference against that of the truth, or against `least` where terms cancel to less.
inline void compare(const char* what, const Doubles& ours, const Doubles& truth, double tolerance, double least = 0) {
  CHECK_EQUAL(ours.size(), truth.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < truth.size() && i < ours.size(); ++i) {
    error += (ours[i] - truth[i]) * (ours[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  norm = std::max(norm, least * least);
  if (error <= tolerance * tolerance * norm) return;
  std::ostringstream text;
  text << what << " differs by " << std::sqrt(error) << " where the norm is " << std::sqrt(norm)
       << ", a ratio of " << std::sqrt(error / norm) << "; allowed is " << tolerance;
  fail(__FILE__, __LINE__, text.str());
}

// How a problem is run: on so many threads, in buffers that begin or end so many elements from a guard page.
struct Setting {
  int threads;
  Flush flush;
  int64_t offset;
};

constexpr Setting kSettings[] = {{1, Flush::back, 0}, {2, Flush::front, 0}, {2, Flush::back, 1}, {1, Flush::front, 3}};

inline std::ostream& operator<<(std::ostream& text, const Setting& how) {
  return text << "threads " << how.threads << ", offset " << how.offset
              << (how.flush == Flush::front ? " from the front" : " from the back");
}

}  // namespace interfuse_test
