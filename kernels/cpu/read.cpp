// Reads memory and does nothing else: the limit of any kernel over the same bytes.

#include "parallel.hpp"
#include "simd.hpp"

// Returns the exclusive or of the 64-bit words of a buffer of a multiple of 64 bytes, so that no read can be left out.
extern "C" uint64_t decoquant_read(const void* data, int64_t bytes, void* gomp_parallel, int64_t threads) {
  using namespace decoquant;
  constexpr int64_t PIECE = 1 << 20;
  typedef uint64_t Longs __attribute__((vector_size(64)));
  std::atomic<uint64_t> result{0};
  parallel(gomp_parallel, threads, (bytes + PIECE - 1) / PIECE, [&](int64_t piece) {
    const char* from = static_cast<const char*>(data) + piece * PIECE;
    const int64_t size = bytes - piece * PIECE < PIECE ? bytes - piece * PIECE : PIECE;
    Longs sums[4] = {};
    int64_t i = 0;
    for (; i + 256 <= size; i += 256) {
      DECOQUANT_UNROLL for (int j = 0; j < 4; ++j) sums[j] ^= load<Longs>(from + i + 64 * j);
    }
    for (; i < size; i += 64) sums[0] ^= load<Longs>(from + i);
    const Longs sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) total ^= sum[lane];
    result.fetch_xor(total);
  });
  return result;
}
