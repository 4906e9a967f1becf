// Scores by sketches: what `KeySketches.scores` computes.
namespace {

template <int kRank>
void scan_chunk(const int8_t* codes, const float* weight, const float* constant, float* raw,
                int64_t rows, int64_t row_stride, int64_t count, int64_t rank) {
  const int64_t size = kRank ? kRank : rank;
  float known_rank[kRank ? kRank : 1];
  std::vector<float> any_rank(kRank ? 0 : size);
  float* const code = kRank ? known_rank : any_rank.data();
  for (int64_t slot = 0; slot < count; ++slot) {
    for (int64_t d = 0; d < size; ++d) code[d] = codes[slot * size + d];
    for (int64_t row = 0; row < rows; ++row) {
      const float* mine = weight + row * size;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < size; ++d) sum += code[d] * mine[d];
      raw[row * row_stride + slot] = sum + constant[row];
    }
  }
}

}  // namespace

// codes int8 [heads, held, rank]; weight [heads, blocks, rows, rank]; constant [heads, blocks,
// rows]; raw float [heads, rows, slots], of which the slots [first, last) are written. Block s
// has the slots from s * block on, and block is a multiple of kChunk or kChunk one of block.
extern "C" void lychee_scan(const int8_t* codes, const float* weight, const float* constant,
                            float* raw, int64_t heads, int64_t held, int64_t blocks, int64_t rows,
                            int64_t rank, int64_t slots, int64_t block, int64_t first,
                            int64_t last, int64_t threads) {
  const int64_t size = std::min(block, kChunk);
  const int64_t begin = first / size, chunks = ceil_div(last, size) - begin;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < heads * chunks; ++task) {
    const int64_t head = task / chunks, low = (begin + task % chunks) * size;
    const int64_t count = std::min(size, last - low), at = head * blocks + low / block;
    const auto run = rank == 32   ? scan_chunk<32>
                     : rank == 64 ? scan_chunk<64>
                     : rank == 16 ? scan_chunk<16>
                                  : scan_chunk<0>;
    run(codes + (head * held + low) * rank, weight + at * rows * rank, constant + at * rows,
        raw + head * rows * slots + low, rows, slots, count, rank);
  }
}
