// The tokens of the largest shares: what `Question.take_tokens` takes if none are drawn.

// share [heads, queries, slots], of which a query of batch row b may take those of the slots
// [begin, end), int64 [batch, queries], that are above -inf. room int64 [heads, queries]. Writes
// the slots taken, in order, int64 [heads, queries, most], and how many they are, int64 [heads,
// queries].
extern "C" void lychee_best(const float* share, const int64_t* begin, const int64_t* end,
                            const int64_t* room, int64_t* slot_out, int64_t* count_out,
                            int64_t batch, int64_t heads_per_row, int64_t queries, int64_t slots,
                            int64_t most, int64_t threads) {
  constexpr int32_t kBins = 4096;  // of equal width, from the smallest share to the largest
  constexpr float kLowest = std::numeric_limits<float>::lowest();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < batch * heads_per_row * queries; ++task) {
    const int64_t at = task / queries / heads_per_row * queries + task % queries;
    const int64_t low = begin[at], high = std::max(low, std::min(end[at], slots));
    const float* mine = share + task * slots;
    float largest = kLowest, smallest = kInfinity;
#pragma omp simd reduction(max : largest) reduction(min : smallest)
    for (int64_t slot = low; slot < high; ++slot) {
      largest = larger(largest, mine[slot]);
      smallest = smaller(smallest, larger(mine[slot], kLowest));
    }
    const float width = largest * 0.5f - smallest * 0.5f;  // halves, as the whole may overflow
    const float scale = width > 0 ? 0.5f * (kBins - 1) / width : 0.0f;
    std::vector<int32_t> bin(high - low), held(kBins + 1, 0);
    int32_t* const own = bin.data();
#pragma omp simd
    for (int64_t slot = low; slot < high; ++slot) {
      const float place = (larger(mine[slot], kLowest) - smallest) * scale;
      const int32_t known = static_cast<int32_t>(smaller(place, kBins - 1.0f)) + 1;
      own[slot - low] = mine[slot] > -kInfinity ? known : 0;  // bin 0 is not taken
    }
    for (const int32_t each : bin) ++held[each];
    int64_t left = std::min(room[task], most);
    int32_t last = kBins;
    while (last > 0 && held[last] <= left) left -= held[last--];
    // All of the bins above `last` are taken, and the `left` largest of the bin `last` itself.
    left = last > 0 ? left : 0;
    std::vector<int64_t> sure, close;
    for (int64_t slot = low; slot < high; ++slot) {
      if (own[slot - low] < last || own[slot - low] == 0) continue;
      (own[slot - low] > last ? sure : close).push_back(slot);
    }
    const auto before = [mine](int64_t one, int64_t other) {  // equals keep their order
      return mine[one] > mine[other] || (mine[one] == mine[other] && one < other);
    };
    std::partial_sort(close.begin(), close.begin() + left, close.end(), before);
    std::sort(close.begin(), close.begin() + left);
    std::merge(sure.begin(), sure.end(), close.begin(), close.begin() + left,
               slot_out + task * most);
    count_out[task] = static_cast<int64_t>(sure.size()) + left;
  }
}
