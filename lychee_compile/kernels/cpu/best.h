// The tokens of the largest shares: what `Question.take_tokens` takes if none are drawn.
namespace {

// Return an integer that is larger for a larger number.
inline uint32_t ordered(float number) {
  const uint32_t bits = static_cast<uint32_t>(as_bits(number));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace

// share [heads, queries, slots], of which a query of batch row b may take those of the slots
// [begin, end), int64 [batch, queries], that are above -inf. room int64 [heads, queries]. Writes
// the slots taken, in order, int64 [heads, queries, most], and how many they are, int64 [heads,
// queries].
extern "C" void lychee_best(const float* share, const int64_t* begin, const int64_t* end,
                            const int64_t* room, int64_t* slot_out, int64_t* count_out,
                            int64_t batch, int64_t heads_per_row, int64_t queries, int64_t slots,
                            int64_t most, int64_t threads) {
  constexpr int kShift = 20;  // the leading 12 bits divide the shares into bins
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < batch * heads_per_row * queries; ++task) {
    const int64_t at = task / queries / heads_per_row * queries + task % queries;
    const int64_t low = begin[at], high = std::max(low, std::min(end[at], slots));
    const float* mine = share + task * slots;
    std::vector<uint32_t> known(high - low), held(1 << (32 - kShift), 0), close;
    for (int64_t slot = low; slot < high; ++slot) {
      // 0 is less than any other: such a slot is not taken.
      known[slot - low] = mine[slot] > -kInfinity ? ordered(mine[slot]) : 0;
      ++held[known[slot - low] >> kShift];
    }
    int64_t left = std::min(room[task], most), bin = (1 << (32 - kShift)) - 1;
    while (bin > 0 && held[bin] <= left) left -= held[bin--];
    for (const uint32_t each : known)
      if (each >> kShift == static_cast<uint32_t>(bin) && each != 0) close.push_back(each);
    left = std::min<int64_t>(left, close.size());
    uint32_t least = std::numeric_limits<uint32_t>::max();  // of `close` nothing is taken
    if (left > 0) {
      std::nth_element(close.begin(), close.begin() + (left - 1), close.end(), std::greater<>());
      least = close[left - 1];
      for (const uint32_t each : close) left -= each > least;  // what is left are equals of it
    }
    int64_t count = 0;
    for (int64_t slot = low; slot < high && count < most; ++slot) {
      const uint32_t each = known[slot - low];
      const bool above = each >> kShift > static_cast<uint32_t>(bin) || each > least;
      if (above || (each == least && left-- > 0)) slot_out[task * most + count++] = slot;
    }
    count_out[task] = count;
  }
}
