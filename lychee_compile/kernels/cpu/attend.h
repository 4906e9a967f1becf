// Attention to runs of slots: what `attend_part` computes.
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

constexpr int64_t kListed = 256;  // slots that one thread takes at a time

// The slots of runs in [first, end), one after the other, and how often each counts.
struct Slots {
  std::vector<int64_t> slot;
  std::vector<float> often;
};

Slots expanded(const int64_t* start, const int64_t* length, const float* weight, int64_t runs,
               int64_t first, int64_t end) {
  Slots found;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t stop = std::min(start[run] + length[run], end);
    const float often = weight ? std::exp(weight[run]) : 1.0f;
    for (int64_t slot = std::max(start[run], first); slot < stop; ++slot) {
      found.slot.push_back(slot);
      found.often.push_back(often);
    }
  }
  return found;
}

}  // namespace

// query float [heads, queries, group, dim]; key and value [heads, any, dim or value_dim] whose
// heads and slots lie so many numbers apart; start and length int64 [heads, queries, runs]: runs of
// slots, of which a query of batch row b sees those in [first, end), int64 [batch, queries]; weight
// [heads, queries, runs]: logarithms of how often each slot counts, or null. Writes the mean of the values [heads, queries, group, value_dim],
// and the logarithms of the sum of exp(score) in which each counts that often, and once:
// [2, heads, queries, group]. A query that sees nothing gets zeros and -inf.
template <typename Number>
void attend(const float* query, const Number* key, const Number* value, const int64_t* start,
            const int64_t* length, const float* weight, const int64_t* first, const int64_t* end,
            float* mean, float* log_sum, int64_t batch, int64_t heads_per_row, int64_t queries,
            int64_t group, int64_t dim, int64_t value_dim, int64_t runs, int64_t key_head,
            int64_t key_slot, int64_t value_head, int64_t value_slot, float scale,
            int64_t threads) {
  const int64_t tasks = batch * heads_per_row * queries;
  std::vector<Slots> listed(tasks);
  int64_t parts = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : parts)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t at = task * runs;
    const int64_t seen = task / queries / heads_per_row * queries + task % queries;
    listed[task] = expanded(start + at, length + at, weight ? weight + at : nullptr, runs,
                            first[seen], end[seen]);
    parts = std::max(parts, ceil_div(listed[task].slot.size(), kListed));
  }
  const int64_t width = value_dim + 3;  // weighted values, largest, and sums of both kinds
  std::vector<float> found(tasks * parts * group * width, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks * parts; ++task) {
    const int64_t owner = task / parts, head = owner / queries;
    const int64_t count = listed[owner].slot.size(), low = task % parts * kListed;
    const int64_t high = std::min(count, low + kListed);
    const int64_t* mine = listed[owner].slot.data();
    std::vector<float> row(std::max(dim, value_dim)), score(group * kListed, -kInfinity);
    for (int64_t place = low; place < high; ++place) {
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
      const float *times = listed[owner].often.data() + low, most = largest[member];
      float sum_often = 0, sum_once = 0;
#pragma omp simd reduction(+ : sum_often, sum_once)
      for (int64_t place = 0; place < high - low; ++place) {
        const float less = mine_is[place] - most;
        const float weight_or_nan = less == less ? fast_exp(less) : less;
        const float once = less < -87.0f ? 0.0f : weight_or_nan;
        sum_once += once;
        sum_often += mine_is[place] = once * times[place];
      }
      part[member * width + value_dim + 1] = sum_often;
      part[member * width + value_dim + 2] = sum_once;
    }
    for (int64_t place = low; place < high; ++place) {
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
                       const int64_t* start, const int64_t* length, const float* weight,          \
                       const int64_t* first, const int64_t* end, float* mean, float* log_sum,     \
                       int64_t batch, int64_t heads_per_row, int64_t queries, int64_t group,      \
                       int64_t dim, int64_t value_dim, int64_t runs, int64_t key_head,            \
                       int64_t key_slot, int64_t value_head, int64_t value_slot, float scale,     \
                       int64_t threads) {                                                         \
    attend(query, key, value, start, length, weight, first, end, mean, log_sum, batch,            \
           heads_per_row, queries, group, dim, value_dim, runs, key_head, key_slot, value_head,   \
           value_slot, scale, threads);                                                           \
  }

LYCHEE_ATTEND(lychee_attend_float32, float)
LYCHEE_ATTEND(lychee_attend_bfloat16, BFloat16)
