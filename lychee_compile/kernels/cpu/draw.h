// Drawing of tokens: what `decode_drawing.draw` does.

// share [heads, queries, slots]: logarithms of shares, of which a query of batch row b may
// draw those of the slots [begin, end), int64 [batch, queries]. room int64 [heads, queries];
// salt int64 [heads]; luck uint8 [65536]: bins by which luck raises a slot. Writes the slots drawn,
// in order, int64 [heads, queries, most]; the bins of their shares, int32 likewise; how many they
// are, int64 [heads, queries]; and the bin of the highest priority that is not read, int32
// [heads, queries], or 0.
extern "C" void lychee_draw(const float* share, const int64_t* begin, const int64_t* end,
                            const int64_t* room, const int64_t* salt, const uint8_t* luck,
                            int64_t* slot_out, int32_t* bin_out, int64_t* count_out,
                            int32_t* cut_out, int64_t batch, int64_t heads_per_row,
                            int64_t queries, int64_t slots, int64_t most, int64_t bins,
                            int64_t first_bin, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < batch * heads_per_row * queries; ++task) {
    const int64_t head = task / queries, query = task % queries;
    const int64_t at = head / heads_per_row * queries + query;
    const int64_t low = begin[at], high = std::max(low, std::min(end[at], slots));
    const float* mine = share + task * slots;
    std::vector<uint16_t> priority(high - low);
    std::vector<uint8_t> bin(high - low);
#pragma omp simd
    for (int64_t slot = low; slot < high; ++slot) {
      const float known = mine[slot] >= -87.0f ? fast_exp(mine[slot]) : 0.0f;
      const int32_t entry = (as_bits(known) >> 20) - static_cast<int32_t>(first_bin);
      bin[slot - low] = std::min(std::max(entry, 1), static_cast<int32_t>(bins) - 1);
    }
    std::vector<int64_t> held(bins, 0);
    for (int64_t slot = low; slot < high; ++slot) {
      const int64_t raised = bin[slot - low] + luck[(slot + salt[head]) & 0xFFFF];
      const int64_t bounded = std::min(raised, bins - 1);
      // A share that no number holds is none: such a token is never drawn.
      priority[slot - low] = mine[slot] > -103.0f ? bounded : 0;
      ++held[priority[slot - low]];
    }
    int64_t left = std::min(room[task], most), last = bins - 1;
    while (last > 0 && held[last] <= left) left -= held[last--];
    // Of the bin `last` the first `left` are read, and of the bins above all; bin 0 is none.
    int64_t ties = last > 0 ? left : 0, count = 0;
    for (int64_t slot = low; slot < high && count < most; ++slot) {
      const int64_t mine_is = priority[slot - low];
      if (mine_is < last || mine_is == 0 || (mine_is == last && ties-- <= 0)) continue;
      slot_out[task * most + count] = slot;
      bin_out[task * most + count++] = bin[slot - low];
    }
    count_out[task] = count;
    cut_out[task] = static_cast<int32_t>(last);
  }
}
