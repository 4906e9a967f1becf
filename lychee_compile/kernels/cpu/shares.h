// Shares of the softmax, summed over the heads of a group: what `Question.share_of` computes.

// raw [heads, group, queries, slots]; a query of batch row b may choose the slots
// [begin, end), int64 [batch, queries]. Writes the logarithms of shares [heads, queries, slots],
// -inf for all other slots. Returns 0, or 1 if a score is not finite: then nothing is to be read.
extern "C" int64_t lychee_shares(const float* raw, const int64_t* begin, const int64_t* end,
                                 float* share, int64_t batch, int64_t heads_per_row,
                                 int64_t group, int64_t queries, int64_t slots,
                                 int64_t threads) {
  constexpr float kLeast = -80.0f;  // _LEAST_SHARE
  const int64_t heads = batch * heads_per_row, chunks = ceil_div(slots, kChunk);
  const int64_t rows = heads * group * queries;
  std::vector<float> most(rows * chunks, -kInfinity), sum(rows * chunks, 0);
  const auto span = [&](int64_t row, int64_t query, int64_t chunk) {
    const int64_t at = row * queries + query;
    const int64_t low = std::max(begin[at], chunk * kChunk);
    return std::make_pair(low, std::min(end[at], std::min(slots, (chunk + 1) * kChunk)));
  };
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < rows * chunks; ++task) {
    const int64_t row = task / chunks, query = row % queries;
    const auto [low, high] = span(row / queries / group / heads_per_row, query, task % chunks);
    const float* mine = raw + row * slots;
    float largest = -kInfinity, total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t slot = low; slot < high; ++slot) largest = larger(largest, mine[slot]);
    const float known = std::isfinite(largest) ? largest : 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t slot = low; slot < high; ++slot) {
      // NaN and -inf reach the sum, which is then not finite
      total += fast_exp(mine[slot] - known) + (mine[slot] - mine[slot]);
    }
    most[task] = largest;
    sum[task] = total;
  }
  std::vector<float> log_sum(rows);
  for (int64_t row = 0; row < rows; ++row) {
    float largest = -kInfinity;
    double total = 0;
    for (int64_t at = row * chunks; at < (row + 1) * chunks; ++at) {
      if (!std::isfinite(sum[at]) || most[at] == kInfinity) return 1;
      largest = std::max(largest, most[at]);
    }
    if (largest == -kInfinity) continue;  // there is no slot
    for (int64_t at = row * chunks; at < (row + 1) * chunks; ++at)
      if (sum[at] > 0) total += sum[at] * std::exp(static_cast<double>(most[at]) - largest);
    log_sum[row] = largest + static_cast<float>(std::log(total));
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < heads * queries * chunks; ++task) {
    const int64_t at = task / chunks, head = at / queries, query = at % queries;
    const auto [low, high] = span(head / heads_per_row, query, task % chunks);
    float* out = share + at * slots;
    const int64_t first = task % chunks * kChunk, last = std::min(slots, first + kChunk);
    float largest[kChunk];
    float* total = out + first;  // of the slots from `first` on
    for (int64_t slot = 0; slot < last - first; ++slot) total[slot] = 0, largest[slot] = -kInfinity;
    for (int64_t member = 0; member < group; ++member) {
      const int64_t row = (head * group + member) * queries + query;
      const float *mine = raw + row * slots + first, less = log_sum[row];
#pragma omp simd
      for (int64_t slot = low - first; slot < high - first; ++slot) {
        const float each = mine[slot] - less;
        largest[slot] = larger(largest[slot], each);
        total[slot] += fast_exp(larger(each, kLeast));
      }
    }
#pragma omp simd
    for (int64_t slot = 0; slot < last - first; ++slot) {
      const float known = fast_log(larger(total[slot], 1e-37f));
      total[slot] = largest[slot] > kLeast ? known : largest[slot];
    }
  }
  return 0;
}
