// The two inner loops of attention: scores of a block of packed keys, weighted sum of a block of packed values.
#pragma once

#include <algorithm>

#include "amx.hpp"

namespace decoquant {

constexpr int BLOCK = 256;  // tokens whose scores are held at once
constexpr int TILES = BLOCK / TILE;

struct Planes {
  const uint8_t* lower;
  const uint8_t* upper;  // the one-bit plane of 5 and 3 bits
};

// Prefetches the codes of the next block along memory, whatever the order of the arithmetic: other orders are slower.
template <int BITS>
class Ahead {
 public:
  Ahead(const Planes& planes, int64_t lower, int64_t upper) : lower_(planes.lower + lower), upper_(planes.upper + upper) {}

  // A row of 64 bytes for each that `Codes::load` reads, of which a narrow register takes a part.
  DECOQUANT_INLINE void load() {
    DECOQUANT_UNROLL for (int line = 0; line < LOWER_ROWS<BITS>; ++line) __builtin_prefetch(lower_ + 64 * line, 0, 2);
    lower_ += 64 * LOWER_ROWS<BITS>;
    if constexpr (BITS == 5 || BITS == 3) {
      __builtin_prefetch(upper_, 0, 2);
      upper_ += 64;
    }
  }

 private:
  const uint8_t *lower_, *upper_;
};

// Whether sums of a group of queries are taken by tile registers: with fewer rows or wider codes, vectors are faster.
constexpr bool is_tiled(int64_t bits, int64_t group) {
#if defined(__AMX_INT8__)
  return bits != 16 && group >= (bits == 8 ? 8 : 3);
#else
  (void)bits, (void)group;
  return false;
#endif
}

// How the factor that a group of queries is folded to lies in memory, in words: two limbs of each quad and row. Vectors
// read it quad by quad, [quad][row][limb]; tile registers chunk by chunk, [chunk][row][limb][CHUNK].
struct FactorLayout {
  int64_t group;
  bool tiled;

  int64_t size(int64_t padded_dim) const {
    const int64_t quads = padded_dim / QUAD;
    return (tiled ? (quads + CHUNK - 1) / CHUNK * CHUNK : quads) * group * 2;
  }
  int64_t at(int64_t quad, int64_t row) const {
    return tiled ? (quad / CHUNK * group + row) * 2 * CHUNK + quad % CHUNK : (quad * group + row) * 2;
  }
  int64_t limb_step() const { return tiled ? CHUNK : 1; }
};

// A group of queries folded with one parameter set: q . x = gain * scale * (sum of factor * (entry + 128) - shift) + mean.
struct Folded {
  const int32_t* factor;  // as `FactorLayout` says
  const uint32_t* shift;  // [group]
  const float* scale;     // [group]
  const float* mean;      // [group]
};

// Inner products of `GROUP` queries with the tokens of tiles [first, last) of 16; zero where the gain is negative.
//   planes: at the block's first token; gains: float16 [BLOCK]; scores: float32 [GROUP][BLOCK]
using Scores = void (*)(const Table& table, const Planes& planes, int64_t padded_dim, const uint16_t* gains,
                        const Folded& query, int64_t first, int64_t last, float* scores);

// Turns integer sums over the channels into the scores of a register of tokens.
template <int GROUP, class Total>
DECOQUANT_INLINE void finish_scores(const uint16_t* gains, const Folded& query, int64_t token, float* scores, const Total& total) {
  const Floats gain = from_half(gains + token);
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
    const Floats product = __builtin_convertvector((Ints)(total(row) - query.shift[row]), Floats);
    const Floats score = fused(product, gain * query.scale[row], splat(query.mean[row]));
    store(scores + row * BLOCK + token, select(gain < 0, Floats{}, score));
  }
}

#if defined(__AMX_INT8__)

// The codes of a chunk, or what of it there is (the factor is zero beyond), as a tile operand: decoded to `out`, or where
// they lie if they are entries as they are. As many are fetched ahead.
template <int BITS>
DECOQUANT_INLINE const Operand* decode(const Book& book, const uint8_t* lower, const uint8_t* upper, int64_t loads,
                                       Ahead<BITS>& ahead, Operand& out) {
  constexpr int QUADS = Codes<BITS>::QUADS;
  if (BITS == 8 && loads >= CHUNK / QUADS) {
    DECOQUANT_UNROLL for (int i = 0; i < CHUNK / QUADS; ++i) ahead.load();
    return reinterpret_cast<const Operand*>(lower);
  }
  DECOQUANT_UNROLL for (int i = 0; i < CHUNK / QUADS; ++i) {
    if (i >= loads) break;
    Codes<BITS>::load(book, lower, upper, out.quad + i * QUADS);
    ahead.load();
    lower += LOWER_ROWS<BITS> * 64;
    upper += 64;
  }
  return &out;
}

template <int BITS, int GROUP>
void tiled_scores(const Table& table, const Planes& planes, int64_t padded_dim, const uint16_t* gains,
                  const Folded& query, int64_t first, int64_t last, float* scores) {
  constexpr int LOADS = CHUNK / Codes<BITS>::QUADS;  // of a chunk
  constexpr FactorLayout layout{GROUP, true};
  const Book book(table);
  const int64_t loads = padded_dim / (QUAD * Codes<BITS>::QUADS);
  const int64_t lower_tile = loads * LOWER_ROWS<BITS> * 64, upper_tile = loads * 64;
  Operand decoded[SUM_TILES];
  const Operand* codes[SUM_TILES] = {};
  const int64_t next = BLOCK / LANES + first / SUM_TILES * SUM_TILES;
  Ahead<BITS> ahead(planes, next * lower_tile, next * upper_tile);
  // So many tiles of tokens at a time; blocks are padded to whole ones.
  for (int64_t tile = first / SUM_TILES * SUM_TILES; tile < last; tile += SUM_TILES) {
    each_constant<SUM_TILES>([](auto sum) { tile_zero<sum()>(); });
    for (int64_t done = 0; done < loads; done += LOADS) {
      for (int sum = 0; sum < SUM_TILES; ++sum) {
        const uint8_t* lower = planes.lower + (tile + sum) * lower_tile + done * LOWER_ROWS<BITS> * 64;
        const uint8_t* upper = planes.upper + (tile + sum) * upper_tile + done * 64;
        codes[sum] = decode<BITS>(book, lower, upper, loads - done, ahead, decoded[sum]);
      }
      tile_load_factor<FACTOR_TILE>(query.factor + layout.at(done * Codes<BITS>::QUADS, 0), CHUNK);
      each_constant<SUM_TILES>([&](auto sum) {
        tile_load<CODE_TILE + sum() % 2>(*codes[sum()]);
        tile_add<sum(), FACTOR_TILE, CODE_TILE + sum() % 2>();
      });
    }
    each_constant<SUM_TILES>([&](auto sum) {
      TileSums<GROUP> sums;
      sums.template store<sum()>();
      finish_scores<GROUP>(gains, query, (tile + sum()) * LANES, scores, [&](int row) { return sums.total(row); });
    });
  }
}

#endif

template <int BITS, int GROUP>
void scores_of(const Table& table, const Planes& planes, int64_t padded_dim, const uint16_t* gains,
               const Folded& query, int64_t first, int64_t last, float* scores) {
#if defined(__AMX_INT8__)
  if constexpr (is_tiled(BITS, GROUP)) {
    return tiled_scores<BITS, GROUP>(table, planes, padded_dim, gains, query, first, last, scores);
  }
#endif
  constexpr int QUADS = Codes<BITS>::QUADS;
  constexpr int SETS = GROUP >= 4 ? 1 : 4 / GROUP;  // independent sums hide the latency of the multiplication
  const Book book(table);
  const int64_t loads = padded_dim / (QUAD * QUADS);
  const int64_t lower_tile = loads * LOWER_ROWS<BITS> * 64, upper_tile = loads * 64;
  const int64_t next = BLOCK / LANES + first;
  Ahead<BITS> ahead(planes, next * lower_tile, next * upper_tile);
  for (int64_t tile = first; tile < last; ++tile) {
    DECOQUANT_UNROLL for (int half = 0; half < HALVES; ++half) {
      const uint8_t* lower = planes.lower + tile * lower_tile + half * 4 * WIDTH;
      const uint8_t* upper = planes.upper + tile * upper_tile + half * 4 * WIDTH;
      const int32_t* factor = query.factor;
      Accumulator sums[SETS][GROUP];
      for (int64_t i = 0; i < loads; ++i) {
        Bytes codes[QUADS];
        Codes<BITS>::load(book, lower, upper, codes);
        DECOQUANT_UNROLL for (int quad = 0; quad < QUADS; ++quad) {
          DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
            const int32_t* words = factor + (quad * GROUP + row) * 2;
            sums[quad % SETS][row].add(codes[quad], words, words + 1);
          }
        }
        if (half == 0) ahead.load();
        lower += LOWER_ROWS<BITS> * 64;
        upper += 64;
        factor += QUADS * GROUP * 2;
      }
      finish_scores<GROUP>(gains, query, tile * LANES + half * WIDTH, scores, [&](int row) {
        Words total = sums[0][row].total();
        DECOQUANT_UNROLL for (int set = 1; set < SETS; ++set) total += sums[set][row].total();
        return total;
      });
    }
  }
}

// The weights of a block as the integer factor of a dot product over tokens, weight = scale * factor.
struct Weights {
  alignas(64) int32_t factor[MAX_GROUP][2][BLOCK / QUAD];
  uint32_t shift[MAX_GROUP];
  float scale[MAX_GROUP];
};

constexpr float LOG2_E = 1.44269504f;
constexpr float LEAST_PEAK = 1e-30f;  // of numbers to be split: the reciprocal of its unit is finite

// cap * tanh(score / cap), in place, with a relative error below 2e-6.
inline void cap_scores(float* scores, int64_t count, float cap) {
  for (int64_t t = 0; t < count; t += WIDTH) {
    const Floats score = load<Floats>(scores + t), x = score / cap, square = x * x;
    const Floats fading = exp2(magnitude(x) * (-2 * LOG2_E));
    const Floats large = (Floats)((Words)((1.0f - fading) / (1.0f + fading)) | ((Words)x & 0x80000000u));
    Floats series = splat(-17.0f / 315);  // where the difference above cancels
    series = fused(series, square, splat(2.0f / 15));
    series = fused(series, square, splat(-1.0f / 3));
    const Floats small = fused(series * square, x, x);
    store(scores + t, cap * select(magnitude(x) < 0.25f, small, large));
  }
}

// Turns scores [GROUP][BLOCK] into weights e^(score - maximum) and brings the running maxima and sums up to date; sums
// of the values have to be multiplied by `decay`.
using Softmax = void (*)(float* scores, float* maxima, float* sums, float* decay);

template <int GROUP>
void softmax_of(float* scores, float* maxima, float* sums, float* decay) {
  Floats peaks[GROUP];
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) peaks[row] = load<Floats>(scores + row * BLOCK);
  for (int64_t t = WIDTH; t < BLOCK; t += WIDTH) {
    DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
      peaks[row] = max(load<Floats>(scores + row * BLOCK + t), peaks[row]);
    }
  }
  Floats from[GROUP], totals[GROUP];
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
    const float peak = largest(peaks[row]), before = maxima[row];
    decay[row] = 1;
    if (peak > before || before != before) {
      decay[row] = before == -__builtin_inff() ? 0 : __builtin_expf(before - peak);
      sums[row] *= decay[row];
      maxima[row] = peak;
    }
    from[row] = splat(maxima[row] == -__builtin_inff() ? 0 : maxima[row]);
    totals[row] = Floats{};
  }
  for (int64_t t = 0; t < BLOCK; t += WIDTH) {
    DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
      const Floats weight = exp2((load<Floats>(scores + row * BLOCK + t) - from[row]) * LOG2_E);
      totals[row] += weight;
      store(scores + row * BLOCK + t, weight);
    }
  }
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) sums[row] += sum(totals[row]);
}

// Quantises weight * gain of `tiles` tiles to the factor of `Mix`; false if all are zero. Only tokens of the parameter
// set `set` count where `epochs` is given. `products`: float32 [GROUP][BLOCK], overwritten.
using Weigh = bool (*)(const float* scores, const uint16_t* gains, const uint8_t* epochs, int64_t set, int64_t tiles,
                       float steps, float* products, Weights& weights);

template <int GROUP>
bool weigh_of(const float* scores, const uint16_t* gains, const uint8_t* epochs, int64_t set, int64_t tiles,
              float steps, float* products, Weights& weights) {
  Floats peaks[GROUP] = {};
  for (int64_t t = 0; t < tiles * TILE; t += WIDTH) {
    Floats gain = from_half(gains + t);
    gain = select(gain < 0, Floats{}, gain);
    if (epochs) {
      DECOQUANT_UNROLL for (int lane = 0; lane < WIDTH; ++lane) gain[lane] = epochs[t + lane] == set ? gain[lane] : 0;
    }
    DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
      const Floats product = load<Floats>(scores + row * BLOCK + t) * gain;
      store(products + row * BLOCK + t, product);
      peaks[row] = max(product, peaks[row]);
    }
  }
  bool any = false;
  Floats inverse[GROUP];
  Words totals[GROUP] = {};
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
    const float peak = largest(peaks[row]);
    any |= peak > 0;
    const float scale = (peak > LEAST_PEAK ? peak : LEAST_PEAK) / FACTOR_LIMIT;
    inverse[row] = splat(1 / scale);
    weights.scale[row] = scale / steps;
  }
  if (!any) return false;
  for (int64_t t = 0; t < tiles * TILE; t += TILE) {
    DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
      Ints value[TILE / WIDTH];
      DECOQUANT_UNROLL for (int i = 0; i < TILE / WIDTH; ++i) {
        value[i] = to_ints(load<Floats>(products + row * BLOCK + t + i * WIDTH) * inverse[row]);
        totals[row] += (Words)value[i];
      }
      split_tile(value, weights.factor[row][0] + t / QUAD, weights.factor[row][1] + t / QUAD);
    }
  }
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) weights.shift[row] = sum(totals[row]) * 128;
  return true;
}

// out[row] = out[row] * decay[row] + sum of weight * entry, over `tiles` tiles of 64 tokens.
//   planes: at the first tile; out: float32 [GROUP][padded_dim]
using Mix = void (*)(const Table& table, const Planes& planes, int64_t padded_dim, const Weights& weights,
                     int64_t tiles, const float* decay, float* out);

// Brings `out` up to date with the integer sums of a register of channels.
template <int GROUP, class Total>
DECOQUANT_INLINE void finish_mix(const Weights& weights, int64_t padded_dim, int64_t channel, const float* decay, float* out,
                                 const Total& total) {
  DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
    float* to = out + row * padded_dim + channel;
    const Floats share = __builtin_convertvector((Ints)(total(row) - weights.shift[row]), Floats);
    store(to, fused(share, splat(weights.scale[row]), load<Floats>(to) * decay[row]));
  }
}

#if defined(__AMX_INT8__)

template <int BITS, int GROUP>
void tiled_mix(const Table& table, const Planes& planes, int64_t padded_dim, const Weights& weights, int64_t tiles,
               const float* decay, float* out) {
  static_assert(TILE == QUAD * CHUNK);
  constexpr int LOADS = CHUNK / Codes<BITS>::QUADS;
  constexpr int64_t LOWER_CHUNK = LOADS * LOWER_ROWS<BITS> * 64, UPPER_CHUNK = LOADS * 64;
  const Book book(table);
  const int64_t chunks = padded_dim / LANES;
  Ahead<BITS> ahead(planes, TILES * chunks * LOWER_CHUNK, TILES * chunks * UPPER_CHUNK);
  Operand decoded[SUM_TILES];
  const Operand* codes[SUM_TILES] = {};
  for (int64_t chunk = 0; chunk < chunks; chunk += SUM_TILES) {
    const int64_t sums = std::min<int64_t>(SUM_TILES, chunks - chunk);
    each_constant<SUM_TILES>([](auto sum) { tile_zero<sum()>(); });
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int sum = 0; sum < sums; ++sum) {
        const int64_t index = tile * chunks + chunk + sum;
        const uint8_t *lower = planes.lower + index * LOWER_CHUNK, *upper = planes.upper + index * UPPER_CHUNK;
        codes[sum] = decode<BITS>(book, lower, upper, LOADS, ahead, decoded[sum]);
      }
      tile_load_factor<FACTOR_TILE>(weights.factor[0][0] + tile * CHUNK, BLOCK / QUAD);
      each_constant<SUM_TILES>([&](auto sum) {
        if (sum() >= sums) return;
        tile_load<CODE_TILE + sum() % 2>(*codes[sum()]);
        tile_add<sum(), FACTOR_TILE, CODE_TILE + sum() % 2>();
      });
    }
    each_constant<SUM_TILES>([&](auto sum) {
      if (sum() >= sums) return;
      TileSums<GROUP> totals;
      totals.template store<sum()>();
      const auto total = [&](int row) { return totals.total(row); };
      finish_mix<GROUP>(weights, padded_dim, (chunk + sum()) * LANES, decay, out, total);
    });
  }
}

#endif

template <int BITS, int GROUP>
void mix_of(const Table& table, const Planes& planes, int64_t padded_dim, const Weights& weights, int64_t tiles,
            const float* decay, float* out) {
#if defined(__AMX_INT8__)
  if constexpr (is_tiled(BITS, GROUP)) {
    return tiled_mix<BITS, GROUP>(table, planes, padded_dim, weights, tiles, decay, out);
  }
#endif
  constexpr int QUADS = Codes<BITS>::QUADS;
  constexpr int SETS = GROUP >= 4 ? 1 : 4 / GROUP;
  constexpr int LOADS = TILE / (QUAD * QUADS);
  constexpr int64_t LOWER_CHUNK = LOADS * LOWER_ROWS<BITS> * 64, UPPER_CHUNK = LOADS * 64;
  const Book book(table);
  const int64_t chunks = padded_dim / LANES;
  Ahead<BITS> ahead(planes, TILES * chunks * LOWER_CHUNK, TILES * chunks * UPPER_CHUNK);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    DECOQUANT_UNROLL for (int half = 0; half < HALVES; ++half) {
      Accumulator sums[SETS][GROUP];
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint8_t* lower = planes.lower + (tile * chunks + chunk) * LOWER_CHUNK + half * 4 * WIDTH;
        const uint8_t* upper = planes.upper + (tile * chunks + chunk) * UPPER_CHUNK + half * 4 * WIDTH;
        DECOQUANT_UNROLL for (int i = 0; i < LOADS; ++i) {
          Bytes codes[QUADS];
          Codes<BITS>::load(book, lower, upper, codes);
          DECOQUANT_UNROLL for (int quad = 0; quad < QUADS; ++quad) {
            DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
              const int64_t token = tile * (TILE / QUAD) + i * QUADS + quad;
              sums[quad % SETS][row].add(codes[quad], weights.factor[row][0] + token, weights.factor[row][1] + token);
            }
          }
          if (half == 0) ahead.load();
          lower += LOWER_ROWS<BITS> * 64;
          upper += 64;
        }
      }
      finish_mix<GROUP>(weights, padded_dim, chunk * LANES + half * WIDTH, decay, out, [&](int row) {
        Words total = sums[0][row].total();
        DECOQUANT_UNROLL for (int set = 1; set < SETS; ++set) total += sums[set][row].total();
        return total;
      });
    }
  }
}

// The kernels for a group of queries and a width of codes; `group` is one of GROUPS.
constexpr int GROUPS[] = {1, 2, 3, 4, 6, 8};  // those up to MAX_GROUP are there
Scores scores_for(int group, int64_t bits);
Mix mix_for(int group, int64_t bits);

// function<group>() for the group at hand.
template <class Function>
auto for_group(int group, const Function& function) {
  if constexpr (MAX_GROUP > 4) {
    if (group == 8) return function(std::integral_constant<int, 8>());
    if (group == 6) return function(std::integral_constant<int, 6>());
  }
  if constexpr (MAX_GROUP > 2) {
    if (group == 4) return function(std::integral_constant<int, 4>());
    if (group == 3) return function(std::integral_constant<int, 3>());
  }
  if (group == 2) return function(std::integral_constant<int, 2>());
  return function(std::integral_constant<int, 1>());
}

}  // namespace decoquant
