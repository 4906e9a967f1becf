// What the kernels for CPUs share. All tensors are contiguous unless strides are given.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kChunk = 2048;  // slots that one thread takes at a time

// By value, not by reference as in the standard library: so that loops are vectorised.
inline float larger(float one, float other) { return one < other ? other : one; }
inline float smaller(float one, float other) { return other < one ? other : one; }

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

inline float as_float(int32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline int32_t as_bits(float number) {
  int32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

// exp(x), in steps that compilers vectorise (Cephes' expf). Below -87 it is exp(-87), not 0.
inline float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = smaller(larger(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504088896341f + kRound;
  const float whole = shifted - kRound;
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return as_float(as_bits(sum) + (as_bits(shifted) - as_bits(kRound)) * (1 << 23));
}

// log(x) of a normal positive number, in steps that compilers vectorise (Cephes' logf).
inline float fast_log(float x) {
  const int32_t bits = as_bits(x) - 0x3f3504f3;  // the mantissa from sqrt(1/2) to sqrt(2)
  const float whole = static_cast<float>(bits >> 23);
  const float rest = as_float((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const float square = rest * rest;
  float sum = 7.0376836292e-2f;
  sum = sum * rest - 1.1514610310e-1f;
  sum = sum * rest + 1.1676998740e-1f;
  sum = sum * rest - 1.2420140846e-1f;
  sum = sum * rest + 1.4249322787e-1f;
  sum = sum * rest - 1.6668057665e-1f;
  sum = sum * rest + 2.0000714765e-1f;
  sum = sum * rest - 2.4999993993e-1f;
  sum = sum * rest + 3.3333331174e-1f;
  sum = sum * rest * square - 2.12194440e-4f * whole - 0.5f * square;
  return sum + rest + 0.693359375f * whole;
}

}  // namespace
