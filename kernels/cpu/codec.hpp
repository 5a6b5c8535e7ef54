// The codec of kernels/codec.py, one token of one head at a time: fit, decode, and codes in planes.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "rotation.hpp"
#include "rows.hpp"

namespace decoquant {

constexpr float LIMIT = 0x1p50f;              // larger magnitudes are saturated before encoding
constexpr float GAIN_MAX = 65504.0f;          // largest float16
constexpr float BALANCE_FLOOR = 1e-6f;        // of the largest channel variance
constexpr float IDENTITY_SHARE = 0.02f;       // mixed into the query weights
constexpr float CONSTANT_FLOOR = 0x1p-16f;    // variance, relative to the mean's square, of a constant channel
constexpr float COORDINATE_LIMIT = 0x1p24f;   // beyond what any gain can express
constexpr float TINY = FLT_MIN;               // smallest normal float32
constexpr float LEAST_COSINE = 0.70710678f;   // below it a gain is the one of least error
constexpr double REFIT_GROWTH = 1.5;          // of the tokens of a sequence, from one fit to the next
constexpr uint16_t NEVER_WRITTEN = 0xbc00;    // -1 in float16, the gain of a slot never written or exactly zero

inline bool is_written(uint16_t gain) { return !(gain & 0x8000); }

inline float largest_of(int64_t dtype) {
  return dtype == FLOAT32 ? FLT_MAX : dtype == BFLOAT16 ? 0x1.fep127f : GAIN_MAX;
}

// ---------------------------------------------------------------------------------------------------------------- rows

// Memory of this thread for `count` rows; the next call on the thread takes it back.
inline float* scratch_rows(int64_t count, int64_t size) {
  static thread_local std::vector<float> memory;
  const auto needed = static_cast<size_t>(count * whole_registers(size));
  if (memory.size() < needed) memory.resize(needed);
  return memory.data();
}

// The same for the codes of `count` tokens and a register more.
inline uint8_t* scratch_codes(const Layout& layout, int64_t count) {
  static thread_local std::vector<uint8_t> memory;
  const auto needed = static_cast<size_t>(count * layout.padded_dim + WIDTH);
  if (memory.size() < needed) memory.resize(needed);
  return memory.data();
}

DECOQUANT_INLINE Floats clamp(Floats x, float limit) {  // nan stays nan
#if defined(__AVX512VNNI__)
  return (Floats)_mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), (__m512)x));
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), (__m256)x));
#else
  x = select(x > limit, splat(limit), x);
  return select(x < -limit, splat(-limit), x);
#endif
}
DECOQUANT_INLINE bool any(Ints mask) {
#if defined(__AVX512VNNI__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t found = 0;
  DECOQUANT_UNROLL for (int i = 0; i < WIDTH; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Rounds a row to what `dtype` can express.
inline void round_row(int64_t dtype, int64_t size, float* x) {
  if (dtype == FLOAT32) return;
  for (int64_t c = 0; c < size; c += WIDTH) {
    uint16_t part[WIDTH];
    const auto y = load<Floats>(x + c);
    dtype == BFLOAT16 ? to_bfloat16(part, y) : to_half(part, y);
    store(x + c, dtype == BFLOAT16 ? from_bfloat16(part) : from_half(part));
  }
}

struct Magnitudes {
  bool nonzero;  // some channel is not zero; nan counts as zero
  bool within;   // all are numbers of at most `limit`
};

inline Magnitudes magnitudes(const float* x, int64_t size, float limit) {
  Ints nonzero{}, beyond{};
  for (int64_t c = 0; c < size; c += WIDTH) {
    const Floats y = magnitude(load<Floats>(x + c));
    nonzero |= (Ints)(y > 0.0f);
    beyond |= ~(Ints)(y <= limit);
  }
  return {any(nonzero), !any(beyond)};
}

// Makes nan zero and infinities large numbers: an inner product with them must stay finite.
inline void make_finite(int64_t dtype, int64_t size, float* x) {
  const Floats large = splat(std::min(LIMIT, largest_of(dtype)));
  for (int64_t c = 0; c < size; c += WIDTH) {
    Floats y = load<Floats>(x + c);
    y = select(y == y, y, Floats{});
    y = select(y > FLT_MAX, large, y);
    store(x + c, select(y < -FLT_MAX, -large, y));
  }
}

// ------------------------------------------------------------------------------------------------------------ codebook

struct Codebook {
  // Entries and thresholds in units of the radius; 8 bits need neither.
  alignas(64) float entries[32];
  // [step]: where codes divide that agree in all but the last bits, twice `2 ** step` of them, by half of the first.
  alignas(64) float thresholds[5][16];
  float positive[16];  // thresholds above zero, ascending

  explicit Codebook(const Layout& layout) : entries{}, thresholds{}, positive{} {
    if (layout.bits >= 8) return;
    const int count = 1 << layout.bits;
    const auto steps = static_cast<float>(layout.steps);
    for (int i = 0; i < count; ++i) entries[i] = static_cast<float>(layout.entries[i]) / steps;
    for (int step = 0; step < layout.bits; ++step) {
      for (int i = 0; i < count; i += 2 << step) thresholds[step][i / 2] = layout.thresholds[i + (1 << step) - 1];
    }
    for (int i = count / 2; i < count - 1; ++i) positive[i - count / 2] = layout.thresholds[i];
  }
};

// A table of COUNT numbers in registers.
template <int COUNT>
struct Lookup {
  static constexpr int PARTS = (COUNT + WIDTH - 1) / WIDTH;
  Floats part[PARTS];

  explicit Lookup(const float* table) {
    DECOQUANT_UNROLL for (int i = 0; i < PARTS; ++i) part[i] = load<Floats>(table + i * WIDTH);
  }

  DECOQUANT_INLINE Floats at(Ints index) const {
#if defined(__AVX512VNNI__)
    if constexpr (PARTS == 1) return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)part[0]);
    return (Floats)_mm512_permutex2var_ps((__m512)part[0], (__m512i)index, (__m512)part[PARTS - 1]);
#elif defined(__AVX2__)
    Floats found = (Floats)_mm256_permutevar8x32_ps((__m256)part[0], (__m256i)index);
    DECOQUANT_UNROLL for (int i = 1; i < PARTS; ++i) {
      found = select(index >= i * WIDTH, (Floats)_mm256_permutevar8x32_ps((__m256)part[i], (__m256i)index), found);
    }
    return found;
#else
    Floats found;
    DECOQUANT_UNROLL for (int i = 0; i < WIDTH; ++i) found[i] = part[index[i] / WIDTH][index[i] % WIDTH];
    return found;
#endif
  }
};

// code + step where y > threshold, else code.
DECOQUANT_INLINE Ints add_where(Floats y, Floats threshold, Ints code, int32_t step) {
#if defined(__AVX512VNNI__)
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)y, (__m512)threshold, _CMP_GT_OQ);
  return (Ints)_mm512_mask_add_epi32((__m512i)code, above, (__m512i)code, _mm512_set1_epi32(step));
#else
  return code + ((Ints)(y > threshold) & step);
#endif
}

// Codes of the nearest entries, and entries of codes.
template <int BITS>
class Nearest {
 public:
  static constexpr int COUNT = 1 << BITS;

#if defined(__AVX2__)
  explicit Nearest(const Codebook& book) : Nearest(book, std::make_integer_sequence<int, BITS - 1>()) {}

  DECOQUANT_INLINE Ints code(Floats y) const {
    Ints pair = add_where(y, middle_, Ints{}, COUNT / 4);  // half the code
    DECOQUANT_UNROLL for (int i = BITS - 2; i > 0; --i) pair = add_where(y, step_[i].at(pair), pair, (1 << i) / 2);
    return add_where(y, step_[0].at(pair), pair + pair, 1);
  }
#else  // no lookups in registers: compares with all thresholds
  explicit Nearest(const Codebook& book) : entries_(book.entries) {
    for (int i = 0; i < COUNT / 2; ++i) positive_[i] = splat(book.positive[i]);
  }

  DECOQUANT_INLINE Ints code(Floats y) const {
    Ints count{};
    const Floats size = magnitude(y);
    DECOQUANT_UNROLL for (int i = 0; i < COUNT / 2 - 1; ++i) count -= (Ints)(size > positive_[i]);
    return (count ^ ~(Ints)(y > 0.0f)) + COUNT / 2;
  }
#endif
  DECOQUANT_INLINE Floats entry(Ints code) const { return entries_.at(code); }

 private:
  Lookup<COUNT> entries_;
#if defined(__AVX2__)
  template <int... STEP>
  Nearest(const Codebook& book, std::integer_sequence<int, STEP...>)
      : entries_(book.entries),
        middle_(splat(book.thresholds[BITS - 1][0])),
        step_{Lookup<COUNT / 2>(book.thresholds[STEP])...} {}

  Floats middle_;
  Lookup<COUNT / 2> step_[BITS - 1];
#else
  Floats positive_[COUNT / 2];
#endif
};

template <>
class Nearest<8> {  // on a uniform grid
 public:
  explicit Nearest(const Codebook&) {}

  DECOQUANT_INLINE Ints code(Floats y) const { return to_ints(clamp(y * 32.0f, 127)) + 128; }
  DECOQUANT_INLINE Floats entry(Ints code) const { return __builtin_convertvector(code - 128, Floats) * 0.03125f; }
};

// ---------------------------------------------------------------------------------------------------------- parameters

// One parameter set of one head as rows.
struct Parameters {
  const float *mean, *scale;
};

// Reads a set into two rows of memory; values have a mean of zero.
inline Parameters load_parameters(const Layout& layout, const void* state, int64_t row, int64_t set, int64_t head,
                                  float* memory) {
  const int64_t offset = set_offset(layout, row, set, head);
  float *mean = memory, *scale = memory + whole_registers(layout.head_dim);
  load_row(BFLOAT16, at<uint16_t>(state, layout.scales) + offset, 1, layout.head_dim, scale);
  if (layout.key) {
    load_row(BFLOAT16, at<uint16_t>(state, layout.means) + offset, 1, layout.head_dim, mean);
  } else {
    std::fill_n(mean, whole_registers(layout.head_dim), 0.0f);
  }
  return {mean, scale};
}

inline float mean_of(const float* x, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += x[i];
  return static_cast<float>(total / static_cast<double>(size));
}

// codec.weights for one head.
inline void weights_of(const float* energy, int64_t size, uint16_t* weights) {
  const float average = mean_of(energy, size);
  for (int64_t i = 0; i < size; ++i) {
    const float relative = average > 0 ? energy[i] / std::max(average, TINY) : 1.0f;
    weights[i] = to_bfloat16((1 - IDENTITY_SHARE) * relative + IDENTITY_SHARE);
  }
}

// codec.fit for one head: `weights` is null if all channels weigh the same; `mean_out` is null for values; `memory` has
// two rows.
inline void fit(const Layout& layout, const float* mean, const float* variance, const uint16_t* weights,
                uint16_t* mean_out, uint16_t* scale_out, float* memory) {
  const int64_t size = layout.head_dim;
  float *spread = memory, *balance = memory + whole_registers(size);
  float widest = 0;
  for (int64_t i = 0; i < size; ++i) {
    float centre = 0;
    if (mean_out != nullptr) {
      mean_out[i] = to_bfloat16(mean[i]);
      centre = from_bfloat16(mean_out[i]);
    }
    // Spread about the rounded mean, which is what the codes will have to express.
    const float distance = mean[i] - centre;
    spread[i] = std::max(variance[i] + distance * distance, CONSTANT_FLOOR * (centre * centre));
    widest = std::max(widest, spread[i]);
  }
  const float floor = std::max(BALANCE_FLOOR * widest, TINY);
  for (int64_t i = 0; i < size; ++i) {
    const float deviation = std::sqrt(std::max(spread[i], floor));
    const float fourth_root = std::sqrt(deviation);
    balance[i] = 1.0f / (layout.key ? fourth_root * std::sqrt(fourth_root) : deviation);
    if (weights != nullptr) balance[i] *= std::sqrt(std::sqrt(std::sqrt(from_bfloat16(weights[i]))));
  }
  for (int64_t i = 0; i < size; ++i) spread[i] *= balance[i] * balance[i];
  const float power = mean_of(spread, size);
  const float norm = 1.0f / std::sqrt(power);
  for (int64_t i = 0; i < size; ++i) scale_out[i] = to_bfloat16(power > 0 ? balance[i] * norm : 1.0f);
}

// -------------------------------------------------------------------------------------------------------------- decode

// codec.decode: a row from `padded_dim` codes.
using Decode = void (*)(const Layout& layout, const Codebook& book, const Parameters& parameters, const uint8_t* codes,
                        uint16_t gain, float* x);

template <int BITS>
void decode_of(const Layout& layout, const Codebook& book, const Parameters& parameters, const uint8_t* codes,
               uint16_t gain, float* x) {
  typedef uint8_t Narrow __attribute__((vector_size(WIDTH)));
  uint16_t gains[WIDTH];
  std::fill_n(gains, WIDTH, gain);
  const Floats factor = from_half(gains);
  const Nearest<BITS> nearest(book);
  const int64_t size = layout.head_dim;
  for (int64_t c = 0; c < size; c += WIDTH) {
    const Ints code = __builtin_convertvector(load<Narrow>(codes + c), Ints);
    store(x + c, nearest.entry(code) * factor);
  }
  unrotate(layout, x);
  for (int64_t c = 0; c < size; ++c) x[c] = x[c] / parameters.scale[c] + parameters.mean[c];
}

inline Decode decode_for(const Layout& layout) {
  return for_bits(layout.bits, [](auto width) -> Decode { return decode_of<width()>; });
}

// -------------------------------------------------------------------------------------------------------------- planes

// The planes of one head.
struct HeadPlanes {
  uint8_t* plane[2];

  HeadPlanes(const Layout& layout, void* state, int64_t row, int64_t head) : plane{} {
    for (int p = 0; p < layout.planes; ++p) plane[p] = plane_of(layout, state, p, row, head);
  }
};

// The bits [offset, offset + BITS) of one token's codes in a plane of BITS. A quad of neighbouring channels is handled
// as one 32-bit word (keys), or the words of sixteen channels as one row of the tile (values).
template <int BITS>
struct PlaneOf {
  static constexpr int BYTE_LANES = 8 / BITS;
  static constexpr uint32_t MASK = (1u << BITS) - 1;
  static constexpr uint32_t MASKS = MASK * 0x01010101u;  // of the four bytes of a word
  static constexpr int64_t ROW = LANES * QUAD;           // bytes

  static uint8_t* key_word(uint8_t* plane, int64_t padded_dim, int64_t slot) {
    return plane + slot / LANES * (padded_dim * BITS * LANES / 8) + slot % LANES * QUAD;
  }
  static void write_key(uint8_t* plane, int64_t padded_dim, int64_t slot, int offset, const uint8_t* codes) {
    uint8_t* to = key_word(plane, padded_dim, slot);
    for (int64_t c = 0; c < padded_dim; c += QUAD * BYTE_LANES, to += ROW) {
      uint32_t word = 0;
      DECOQUANT_UNROLL for (int lane = 0; lane < BYTE_LANES; ++lane) {
        word |= (load<uint32_t>(codes + c + QUAD * lane) >> offset & MASKS) << (lane * BITS);
      }
      store(to, word);
    }
  }
  static void read_key(const uint8_t* plane, int64_t padded_dim, int64_t slot, int offset, uint8_t* codes) {
    const uint8_t* from = key_word(const_cast<uint8_t*>(plane), padded_dim, slot);
    for (int64_t c = 0; c < padded_dim; c += QUAD * BYTE_LANES, from += ROW) {
      const auto word = load<uint32_t>(from);
      DECOQUANT_UNROLL for (int lane = 0; lane < BYTE_LANES; ++lane) {
        uint8_t* to = codes + c + QUAD * lane;
        store(to, load<uint32_t>(to) | (word >> (lane * BITS) & MASKS) << offset);
      }
    }
  }

  // The row of the first chunk, and the bit of a word, that hold a token of values.
  static uint8_t* value_row(uint8_t* plane, int64_t padded_dim, int64_t slot) {
    const int64_t group = slot % TILE / QUAD;
    return plane + slot / TILE * (padded_dim * BITS * TILE / 8) + group / BYTE_LANES * ROW;
  }
  static int value_bit(int64_t slot) {
    return static_cast<int>(slot % QUAD * 8 + slot % TILE / QUAD % BYTE_LANES * BITS);
  }
  static void write_value(uint8_t* plane, int64_t padded_dim, int64_t slot, int offset, const uint8_t* codes) {
    const int bit = value_bit(slot);
    uint8_t* to = value_row(plane, padded_dim, slot);
    for (int64_t c = 0; c < padded_dim; c += LANES, to += 2 * BITS * ROW) {
      uint32_t words[LANES];
      memcpy(words, to, sizeof words);
      for (int i = 0; i < LANES; ++i) {
        const uint32_t part = codes[c + i] >> offset & MASK;
        words[i] = (words[i] & ~(MASK << bit)) | part << bit;
      }
      memcpy(to, words, sizeof words);
    }
  }
  static void read_value(const uint8_t* plane, int64_t padded_dim, int64_t slot, int offset, uint8_t* codes) {
    const int bit = value_bit(slot);
    const uint8_t* from = value_row(const_cast<uint8_t*>(plane), padded_dim, slot);
    for (int64_t c = 0; c < padded_dim; c += LANES, from += 2 * BITS * ROW) {
      uint32_t words[LANES];
      memcpy(words, from, sizeof words);
      for (int i = 0; i < LANES; ++i) codes[c + i] |= static_cast<uint8_t>((words[i] >> bit & MASK) << offset);
    }
  }

  static void write(const Layout& layout, uint8_t* plane, int64_t slot, int offset, const uint8_t* codes) {
    (layout.key ? write_key : write_value)(plane, layout.padded_dim, slot, offset, codes);
  }
  static void read(const Layout& layout, const uint8_t* plane, int64_t slot, int offset, uint8_t* codes) {
    (layout.key ? read_key : read_value)(plane, layout.padded_dim, slot, offset, codes);
  }
};

// Writes the `padded_dim` codes of one token. Tokens of values within a tile share bytes: not for two threads at once.
inline void write_codes(const Layout& layout, const HeadPlanes& planes, int64_t slot, const uint8_t* codes) {
  int offset = 0;
  for (int p = 0; p < layout.planes; offset += static_cast<int>(layout.widths[p++])) {
    switch (layout.widths[p]) {
      case 8: PlaneOf<8>::write(layout, planes.plane[p], slot, offset, codes); break;
      case 4: PlaneOf<4>::write(layout, planes.plane[p], slot, offset, codes); break;
      case 2: PlaneOf<2>::write(layout, planes.plane[p], slot, offset, codes); break;
      default: PlaneOf<1>::write(layout, planes.plane[p], slot, offset, codes);
    }
  }
}

// Reads the `padded_dim` codes of one token.
inline void read_codes(const Layout& layout, const HeadPlanes& planes, int64_t slot, uint8_t* codes) {
  memset(codes, 0, layout.padded_dim);
  int offset = 0;
  for (int p = 0; p < layout.planes; offset += static_cast<int>(layout.widths[p++])) {
    switch (layout.widths[p]) {
      case 8: PlaneOf<8>::read(layout, planes.plane[p], slot, offset, codes); break;
      case 4: PlaneOf<4>::read(layout, planes.plane[p], slot, offset, codes); break;
      case 2: PlaneOf<2>::read(layout, planes.plane[p], slot, offset, codes); break;
      default: PlaneOf<1>::read(layout, planes.plane[p], slot, offset, codes);
    }
  }
}

}  // namespace decoquant
