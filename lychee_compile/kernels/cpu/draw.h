// Drawing of tokens: what `decode_drawing.draw` does.
namespace {

// The bin of a share, of its logarithm: eight to an octave, from 1 on.
inline int32_t bin_of(float log_share) { return (as_bits(fast_exp(log_share)) >> 20) + 1; }

}  // namespace

// share [heads, queries, slots]: logarithms of shares, of which a query of batch row b may
// draw those of the slots [begin, end), int64 [batch, queries]. room int64 [heads, queries];
// salt int64 [heads]; luck uint8 [65536]: bins by which luck raises a slot, at most
// `luckiest`. Writes the slots drawn,
// in order, int64 [heads, queries, most]; the bins of their shares, int32 likewise, the first of
// which is 1; how many they are, int64 [heads, queries]; and the bin of the highest priority that is
// not read, int32 [heads, queries]. Returns 0, or 1 if a query would have to tell shares apart that
// are hardly any: then nothing is to be read.
extern "C" int64_t lychee_draw(const float* share, const int64_t* begin, const int64_t* end,
                               const int64_t* room, const int64_t* salt, const uint8_t* luck,
                               int64_t* slot_out, int32_t* bin_out, int64_t* count_out,
                               int32_t* cut_out, int64_t batch, int64_t heads_per_row,
                               int64_t queries, int64_t slots, int64_t most, int64_t bins,
                               int64_t luckiest, int64_t threads) {
  constexpr float kHardlyAny = -87.0f;  // log of the least share that is drawn here
  int64_t failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : failed)
  for (int64_t task = 0; task < batch * heads_per_row * queries; ++task) {
    const int64_t head = task / queries, query = task % queries;
    const int64_t at = head / heads_per_row * queries + query;
    const int64_t low = begin[at], high = std::max(low, std::min(end[at], slots));
    const float* mine = share + task * slots;
    std::vector<int32_t> bin(high - low), priority(high - low);
    int32_t* const own = bin.data();
#pragma omp simd
    for (int64_t slot = low; slot < high; ++slot) {
      own[slot - low] = bin_of(mine[slot]);
    }
    std::vector<int64_t> held(bins, 0);
    for (int64_t slot = low; slot < high; ++slot) {
      own[slot - low] = std::min<int32_t>(own[slot - low], bins - 1);
      const int64_t raised = own[slot - low] + luck[(slot + salt[head]) & 0xFFFF];
      priority[slot - low] = mine[slot] > kHardlyAny ? std::min(raised, bins - 1) : 0;
      ++held[priority[slot - low]];
    }
    int64_t left = std::min(room[task], most), last = bins - 1;
    while (last > 0 && held[last] <= left) left -= held[last--];
    // One of hardly any share might be luckier than those of the bin `last`.
    if (held[0] > 0 && last <= luckiest + bin_of(kHardlyAny)) {
      ++failed;
      continue;
    }
    int64_t count = 0;  // of the bin `last` the first `left` are read, and of the bins above all
    for (int64_t slot = low; slot < high && count < most; ++slot) {
      const int64_t mine_is = priority[slot - low];
      if (mine_is < last || (mine_is == last && left-- <= 0)) continue;
      slot_out[task * most + count] = slot;
      bin_out[task * most + count++] = own[slot - low];
    }
    count_out[task] = count;
    cut_out[task] = static_cast<int32_t>(last);
  }
  return failed > 0;
}
