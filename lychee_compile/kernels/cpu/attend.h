// Attention to listed slots: what `attend_part` computes.
namespace {

inline float to_float(float number) { return number; }

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 number) {
  return as_float(static_cast<int32_t>(static_cast<uint32_t>(number.bits) << 16));
}

inline float larger_or_nan(float one, float other) {
  return std::isnan(one) || one > other ? one : other;
}

constexpr int64_t kListed = 256;  // listed slots that one thread takes at a time

}  // namespace

// query float [heads, queries, group, dim]; key and value [heads, any, dim or value_dim] whose
// heads and slots lie so many numbers apart; slot int64 [heads, queries, listed], of which those
// that are hidden, uint8 likewise, count nothing; weight [heads, queries, listed]: logarithms of
// how often each counts, or null. Writes the mean of the values [heads, queries, group, value_dim],
// and the logarithms of the sum of exp(score) in which each counts that often, and once:
// [2, heads, queries, group]. A query that sees nothing gets zeros and -inf.
template <typename Number>
void attend(const float* query, const Number* key, const Number* value, const int64_t* slot,
            const uint8_t* hidden, const float* weight, float* mean, float* log_sum, int64_t heads,
            int64_t queries, int64_t group, int64_t dim, int64_t value_dim, int64_t listed,
            int64_t key_head, int64_t key_slot, int64_t value_head, int64_t value_slot, float scale,
            int64_t threads) {
  const int64_t parts = std::max<int64_t>(ceil_div(listed, kListed), 1), tasks = heads * queries;
  const int64_t width = value_dim + 3;  // weighted values, largest, and sums of both kinds
  std::vector<float> found(tasks * parts * group * width, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks * parts; ++task) {
    const int64_t owner = task / parts, head = owner / queries;
    const int64_t low = task % parts * kListed, high = std::min(listed, low + kListed);
    const int64_t* mine = slot + owner * listed;
    std::vector<float> row(std::max(dim, value_dim)), score(group * kListed, -kInfinity);
    for (int64_t place = low; place < high; ++place) {
      if (hidden[owner * listed + place]) continue;
      const Number* held = key + head * key_head + mine[place] * key_slot;
      for (int64_t d = 0; d < dim; ++d) row[d] = to_float(held[d]);
      for (int64_t member = 0; member < group; ++member) {
        const float* asked = query + (owner * group + member) * dim;
        const float* known = row.data();
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += asked[d] * known[d];
        score[member * kListed + place - low] = sum * scale;
      }
    }
    float* part = found.data() + task * group * width;
    std::vector<float> largest(group, -kInfinity);
    for (int64_t member = 0; member < group; ++member) {
      float* const mine_is = score.data() + member * kListed;
      for (int64_t place = 0; place < high - low; ++place)
        largest[member] = larger_or_nan(largest[member], mine_is[place]);
      if (largest[member] == -kInfinity) continue;
      for (int64_t place = 0; place < high - low; ++place) {
        const float once = std::exp(mine_is[place] - largest[member]);
        const float often = weight ? once * std::exp(weight[owner * listed + low + place]) : once;
        part[member * width + value_dim + 1] += often;
        part[member * width + value_dim + 2] += once;
        mine_is[place] = often;
      }
    }
    for (int64_t place = low; place < high; ++place) {
      if (hidden[owner * listed + place]) continue;
      const Number* held = value + head * value_head + mine[place] * value_slot;
      for (int64_t d = 0; d < value_dim; ++d) row[d] = to_float(held[d]);
      for (int64_t member = 0; member < group; ++member) {
        if (largest[member] == -kInfinity) continue;
        const float often = score[member * kListed + place - low];
        float* sum = part + member * width;
        const float* known = row.data();
#pragma omp simd
        for (int64_t d = 0; d < value_dim; ++d) sum[d] += often * known[d];
      }
    }
    for (int64_t member = 0; member < group; ++member)
      part[member * width + value_dim] = largest[member];
  }
  for (int64_t owner = 0; owner < tasks; ++owner) {
    for (int64_t member = 0; member < group; ++member) {
      const auto part = [&](int64_t number) {
        return found.data() + ((owner * parts + number) * group + member) * width;
      };
      float largest = -kInfinity, often = 0, once = 0;
      for (int64_t number = 0; number < parts; ++number) {
        const float each = part(number)[value_dim];
        largest = larger_or_nan(largest, each);
      }
      float* out = mean + (owner * group + member) * value_dim;
      std::fill(out, out + value_dim, 0.0f);
      const int64_t at = owner * group + member;
      log_sum[at] = log_sum[tasks * group + at] = -kInfinity;
      if (largest == -kInfinity) continue;
      for (int64_t number = 0; number < parts; ++number) {
        const float* each = part(number);
        if (each[value_dim] == -kInfinity) continue;
        const float factor = std::exp(each[value_dim] - largest);
        often += factor * each[value_dim + 1];
        once += factor * each[value_dim + 2];
        for (int64_t d = 0; d < value_dim; ++d) out[d] += factor * each[d];
      }
      for (int64_t d = 0; d < value_dim; ++d) out[d] /= often;
      log_sum[at] = largest + std::log(often);
      log_sum[tasks * group + at] = largest + std::log(once);
    }
  }
}

#define LYCHEE_ATTEND(name, Number)                                                               \
  extern "C" void name(const float* query, const Number* key, const Number* value,                \
                       const int64_t* slot, const uint8_t* hidden, const float* weight,           \
                       float* mean, float* log_sum, int64_t heads, int64_t queries,               \
                       int64_t group, int64_t dim, int64_t value_dim, int64_t listed,             \
                       int64_t key_head, int64_t key_slot, int64_t value_head,                    \
                       int64_t value_slot, float scale, int64_t threads) {                        \
    attend(query, key, value, slot, hidden, weight, mean, log_sum, heads, queries, group, dim,    \
           value_dim, listed, key_head, key_slot, value_head, value_slot, scale, threads);        \
  }

LYCHEE_ATTEND(lychee_attend_float32, float)
LYCHEE_ATTEND(lychee_attend_bfloat16, BFloat16)
