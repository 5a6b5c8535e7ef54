// Tile registers of AMX: the same sums as `Accumulator` of simd.hpp, for all rows of a group at once.
//
// A tile operand of codes is a chunk of CHUNK quads, LANES lanes each, as `Codes::load` gives them; the factor is one
// row of CHUNK quads for each limb of each row of the group. Where the CPU has none, `TileScope` does nothing.
#pragma once

#include "simd.hpp"

namespace decoquant {

constexpr int CHUNK = 16;  // quads of an operand

#if defined(__AMX_INT8__)

constexpr int SUM_TILES = 4;  // tile registers 0 to 3 hold sums, 4 a factor, 6 and 7 codes
constexpr int FACTOR_TILE = 4, CODE_TILE = 6;
constexpr int LIMBS = 2;

// The shapes of the tile registers while sums of a group of queries are taken, and what they were before: torch's own
// libraries may have set them in this thread.
class TileScope {
 public:
  explicit TileScope(int group, bool used) : used_(used) {
    if (!used) return;
    asm volatile("sttilecfg %0" : "=m"(before_));
    Shapes shapes{};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = 4 * CHUNK;
      shapes.rows[tile] = static_cast<uint8_t>(tile < CODE_TILE ? LIMBS * group : CHUNK);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileScope() {
    if (used_) asm volatile("ldtilecfg %0" ::"m"(before_));
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct Shapes {  // operand of the instructions
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } before_;
  bool used_;
};

// The instructions by hand: the compiler's intrinsics want literal registers and do not say which memory they read.
struct Operand {
  alignas(64) Bytes quad[CHUNK];
};
template <int TILE_REGISTER>
DECOQUANT_INLINE void tile_load(const Operand& from) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE_REGISTER), "r"(&from), "r"(64L), "m"(from));
}
template <int TILE_REGISTER>
DECOQUANT_INLINE void tile_load_factor(const int32_t* from, int64_t row_words) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE_REGISTER), "r"(from), "r"(4 * row_words) : "memory");
}
template <int TILE_REGISTER>
DECOQUANT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE_REGISTER));
}
template <int SUM, int FACTOR, int CODES>
DECOQUANT_INLINE void tile_add() {  // signed factor times unsigned codes
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(FACTOR), "i"(CODES));
}

// Sums of a tile register: per row of the group and limb, LANES lanes.
template <int GROUP>
struct TileSums {
  alignas(64) Words limb[GROUP][LIMBS];

  template <int TILE_REGISTER>
  DECOQUANT_INLINE void store() {
    asm volatile("tilestored %%tmm%c2, (%1,%3,1)" : "=m"(*this) : "r"(this), "i"(TILE_REGISTER), "r"(64L));
  }
  DECOQUANT_INLINE Words total(int row) const { return (limb[row][0] << 7) + limb[row][1]; }
};

#else

struct TileScope {
  TileScope(int, bool) {}
};

#endif

}  // namespace decoquant
