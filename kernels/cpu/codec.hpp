// The codec of kernels/codec.py, one token of one head at a time: fit, encode, decode, and codes in planes.
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
constexpr float IDENTITY_SHARE = 0.2f;        // mixed into the query weights
constexpr float CONSTANT_FLOOR = 0x1p-16f;    // variance, relative to the mean's square, of a constant channel
constexpr float COORDINATE_LIMIT = 0x1p24f;   // beyond what any gain can express
constexpr float TINY = FLT_MIN;               // smallest normal float32
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

// The same for `padded_dim` codes.
inline uint8_t* scratch_codes(const Layout& layout) {
  static thread_local std::vector<uint8_t> memory;
  const auto needed = static_cast<size_t>(layout.padded_dim);
  if (memory.size() < needed) memory.resize(needed);
  return memory.data();
}

DECOQUANT_INLINE Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }
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
  alignas(64) float thresholds[32];

  explicit Codebook(const Layout& layout) {
    for (int i = 0; i < 32; ++i) entries[i] = thresholds[i] = 0;
    if (layout.bits >= 8) return;
    const int count = 1 << layout.bits;
    const auto steps = static_cast<float>(layout.steps);
    for (int i = 0; i < count; ++i) entries[i] = static_cast<float>(layout.entries[i]) / steps;
    for (int i = 0; i < count - 1; ++i) thresholds[i] = layout.thresholds[i];
  }
};

// table[index] for indices below 2 ** BITS.
template <int BITS>
DECOQUANT_INLINE Floats take(const float* table, Ints index) {
#if defined(__AVX512VNNI__)
  const __m512 low = _mm512_load_ps(table);
  if constexpr (BITS <= 4) return (Floats)_mm512_permutexvar_ps((__m512i)index, low);
  return (Floats)_mm512_permutex2var_ps(low, (__m512i)index, _mm512_load_ps(table + 16));
#elif defined(__AVX2__)
  return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  Floats found;
  for (int i = 0; i < WIDTH; ++i) found[i] = table[index[i]];
  return found;
#endif
}

template <int BITS>
DECOQUANT_INLINE Floats entry_of(const Codebook& book, Ints code) {
  if constexpr (BITS == 8) return __builtin_convertvector(code - 128, Floats) * 0.03125f;
  return take<BITS>(book.entries, code);
}

// The thresholds of one token, in its own units.
//
// The oracle divides by the radius instead of multiplying with it: a coordinate on a threshold may fall to the other
// side by rounding.
template <int BITS>
struct Thresholds {
  static constexpr int COUNT = (1 << BITS) - 1;
  alignas(64) float scaled[COUNT / LANES * LANES + LANES];

  Thresholds(const Codebook& book, float radius) {
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; i += WIDTH) {
      store(scaled + i, load<Floats>(book.thresholds + i) * radius);
    }
  }

  // How many of them are below y.
  DECOQUANT_INLINE Ints below(Floats y) const {
    Ints code{};
#if defined(__AVX512VNNI__)
    DECOQUANT_UNROLL for (int step = 1 << (BITS - 1); step > 0; step /= 2) {  // binary search
      const Floats threshold = take<BITS>(scaled, code + (step - 1));
      const __mmask16 above = _mm512_cmp_ps_mask((__m512)y, (__m512)threshold, _CMP_GT_OQ);
      code = (Ints)_mm512_mask_add_epi32((__m512i)code, above, (__m512i)code, _mm512_set1_epi32(step));
    }
#else
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) code -= (Ints)(y > scaled[i]);
#endif
    return code;
  }
};

template <>
struct Thresholds<8> {  // a uniform grid needs none
  float factor;

  Thresholds(const Codebook&, float radius) : factor(1.0f / radius * 32) {}

  DECOQUANT_INLINE Ints below(Floats y) const {
    const Floats z = y * factor;  // nan: zero times the infinity of a radius too small
    return to_ints(clamp(select(z == z, z, Floats{}), 127)) + 128;
  }
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

// codec.fit for one head: `weight` may be null; `mean_out` is null for values; `memory` has two rows.
inline void fit(const Layout& layout, const float* mean, const float* variance, const float* weight, uint16_t* mean_out,
                uint16_t* scale_out, float* memory) {
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
  if (!layout.key && layout.bits > 2) {
    std::fill_n(balance, size, 1.0f);
  } else {
    const float floor = std::max(BALANCE_FLOOR * widest, TINY);
    const float average = weight == nullptr ? 0 : mean_of(weight, size);
    for (int64_t i = 0; i < size; ++i) {
      balance[i] = 1.0f / std::sqrt(std::sqrt(std::max(spread[i], floor)));
      if (weight == nullptr) continue;
      const float relative = average > 0 ? weight[i] / std::max(average, TINY) : 1.0f;
      balance[i] *= std::sqrt(std::sqrt((1 - IDENTITY_SHARE) * relative + IDENTITY_SHARE));
    }
  }
  for (int64_t i = 0; i < size; ++i) spread[i] *= balance[i] * balance[i];
  const float power = mean_of(spread, size);
  const float norm = 1.0f / std::sqrt(power);
  for (int64_t i = 0; i < size; ++i) scale_out[i] = to_bfloat16(power > 0 ? balance[i] * norm : 1.0f);
}

// ------------------------------------------------------------------------------------------------------ encode, decode

// The row being encoded: in registers if the head size is known when compiling, else in memory.
template <int DIM>
struct Coordinates {
  static constexpr int COUNT = DIM / WIDTH;
  Floats y[COUNT];

  Coordinates(const Layout&, const float*) {}
  DECOQUANT_INLINE Floats get(int i) const { return y[i]; }
  DECOQUANT_INLINE void set(int i, Floats value) { y[i] = value; }
  template <class Body>
  DECOQUANT_INLINE void each(const Body& body) const {
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) body(i);
  }
  DECOQUANT_INLINE void rotate(const Layout& layout) {  // as rotation.hpp
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) {
      y[i] = butterflies(y[i] * load<Floats>(layout.signs + i * WIDTH));
    }
    DECOQUANT_UNROLL for (int half = 1; half < COUNT; half *= 2) {
      DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) {
        if (i & half) continue;
        const Floats left = y[i], right = y[i + half];
        y[i] = left + right;
        y[i + half] = left - right;
      }
    }
    const float norm = 1.0f / std::sqrt(static_cast<float>(DIM));
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) y[i] *= norm;
  }
};

template <>
struct Coordinates<0> {
  float* x;
  int64_t count;

  Coordinates(const Layout& layout, float* memory) : x(memory), count(whole_registers(layout.head_dim) / WIDTH) {}
  DECOQUANT_INLINE Floats get(int64_t i) const { return load<Floats>(x + i * WIDTH); }
  DECOQUANT_INLINE void set(int64_t i, Floats value) { store(x + i * WIDTH, value); }
  template <class Body>
  DECOQUANT_INLINE void each(const Body& body) const {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
  void rotate(const Layout& layout) { decoquant::rotate(layout, x); }
};

// codec.encode: writes `padded_dim` codes and returns the gain in float16. Consumes x, which must be finite.
using Encode = uint16_t (*)(const Layout& layout, const Codebook& book, const Parameters& parameters, float* x,
                            uint8_t* codes);

template <int BITS, int DIM>
uint16_t encode_of(const Layout& layout, const Codebook& book, const Parameters& parameters, float* x,
                   uint8_t* codes) {
  typedef uint8_t Narrow __attribute__((vector_size(WIDTH)));
  const int64_t size = DIM > 0 ? DIM : layout.head_dim;
  Coordinates<DIM> row(layout, x);
  row.each([&](auto i) __attribute__((always_inline)) {
    const Floats centred = clamp(load<Floats>(x + i * WIDTH), LIMIT) - load<Floats>(parameters.mean + i * WIDTH);
    row.set(i, centred * load<Floats>(parameters.scale + i * WIDTH));
  });
  row.rotate(layout);
  Floats squares{}, peak{};
  row.each([&](auto i) __attribute__((always_inline)) {
    const Floats y = clamp(row.get(i), COORDINATE_LIMIT);
    row.set(i, y);
    squares += y * y;
    if constexpr (BITS == 8) peak = max(peak, magnitude(y));
  });
  const float power = sum(squares);

  float radius;
  if constexpr (BITS == 8) {
    radius = std::max(largest(peak) * static_cast<float>(32.0 / 127), TINY);
  } else {
    radius = std::max(std::sqrt(power / static_cast<float>(size)), TINY);
  }
  const Thresholds<BITS> thresholds(book, radius);
  const bool key = layout.key;
  Floats products{};
  row.each([&](auto i) __attribute__((always_inline)) {
    const Floats y = row.get(i);
    const Ints code = thresholds.below(y);
    store(codes + i * WIDTH, __builtin_convertvector(code, Narrow));
    Floats entry = entry_of<BITS>(book, code);
    if (DIM == 0 && (i + 1) * WIDTH > size) {
      DECOQUANT_UNROLL for (int lane = 0; lane < WIDTH; ++lane) entry[lane] = i * WIDTH + lane < size ? entry[lane] : 0;
    }
    products += entry * (key ? y : entry);
  });
  if (DIM == 0) memset(codes + size, 0, layout.padded_dim - size);

  const float product = sum(products);
  float gain = 0;
  if (product > 0) {
    gain = power / std::max(product, TINY);
    if (!key) gain = std::sqrt(gain);
  }
  return to_half(std::min(gain, GAIN_MAX));
}

template <int BITS>
Encode encode_for_size(int64_t head_dim) {
  if constexpr (WIDTH >= 4) {
    if (head_dim == 64) return encode_of<BITS, 64>;
  }
  if constexpr (WIDTH >= 8) {
    if (head_dim == 128) return encode_of<BITS, 128>;
  }
  if constexpr (WIDTH >= 16) {
    if (head_dim == 256) return encode_of<BITS, 256>;
  }
  return encode_of<BITS, 0>;
}

inline Encode encode_for(const Layout& layout) {
  return for_bits(layout.bits, [&](auto width) { return encode_for_size<width()>(layout.head_dim); });
}

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
  const int64_t size = layout.head_dim;
  for (int64_t c = 0; c < size; c += WIDTH) {
    const Ints code = __builtin_convertvector(load<Narrow>(codes + c), Ints);
    store(x + c, entry_of<BITS>(book, code) * factor);
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
