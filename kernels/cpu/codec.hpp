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

// The same for `padded_dim` codes and a register more.
inline uint8_t* scratch_codes(const Layout& layout) {
  static thread_local std::vector<uint8_t> memory;
  const auto needed = static_cast<size_t>(layout.padded_dim + WIDTH);
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

// ------------------------------------------------------------------------------------------------------ encode, decode

// codec.leaf
inline int64_t leaf(int64_t head_dim) { return std::min<int64_t>(std::max<int64_t>(head_dim / 8, 8), 16); }

// What codec._shape needs of the parameters of a head, and memory for one token.
class Shaping {
 public:
  // `weights`, bfloat16, is null if all channels weigh the same. Takes `rows(layout)` rows of memory.
  Shaping(const Layout& layout, const float* scale, const uint16_t* weights, float* memory) {
    const int64_t size = layout.head_dim, stride = whole_registers(size);
    float* price_row = memory;
    balanced = memory + stride;
    entries = memory + 2 * stride;
    error = memory + 3 * stride;
    targets = memory + 4 * stride;
    ratios_ = memory + 5 * stride;
    half_ = size / 2;
    leaf_ = leaf(size);
    float least = FLT_MAX;
    for (int64_t i = 0; i < size; ++i) least = std::min(least, scale[i]);
    for (int64_t i = 0; i < size; ++i) {
      const float relative = least / scale[i];
      price_row[i] = relative * relative;
      if (weights != nullptr) price_row[i] *= from_bfloat16(weights[i]);
    }
    std::fill(price_row + size, price_row + stride, 0.0f);
    price = price_row;
    std::copy_n(price, size, balanced);
    divide(0, 0, size, size & -size, balanced);
  }

  // Splits of a row into halves, one after the other, until it is a leaf.
  static int64_t levels(int64_t size) {
    const int64_t smallest = leaf(size);
    int64_t count = 0;
    for (int64_t order = size & -size; order > 1 && size > smallest; order /= 2, size /= 2) ++count;
    return count;
  }
  static int64_t rows(const Layout& layout) { return 5 + (levels(layout.head_dim) + 1) / 2; }

  bool is_leaf(int64_t size, int64_t order) const { return order == 1 || size <= leaf_; }

  // A^-1 B of the node with `size` channels from `begin` on, with the norm of two transforms.
  const float* ratios(int64_t level, int64_t begin) const { return ratios_ + level * half_ + begin / 2; }

  const float* price;
  float *balanced, *entries, *error, *targets;  // rows

 private:
  // `prices` of the node, consumed.
  void divide(int64_t level, int64_t begin, int64_t size, int64_t order, float* prices) {
    if (is_leaf(size, order)) return;
    const int64_t half = size / 2;
    float *first = prices, *second = prices + half, *ratio = ratios_ + level * half_ + begin / 2;
    const auto transform = static_cast<float>(order / 2);
    for (int64_t i = 0; i < half; ++i) {
      const float p = first[i], q = second[i], total = p + q;
      ratio[i] = (p - q) / total / transform;
      first[i] = 2 * p * q / total;
      second[i] = total / 2;
    }
    divide(level + 1, begin, half, order / 2, first);
    divide(level + 1, begin + half, half, order / 2, second);
  }

  float* ratios_;
  int64_t half_, leaf_;
};

// codec._shape: codes and, in units of the radius, entries of a rotated token.
template <int BITS>
class Shaper {
 public:
  Shaper(const Layout& layout, const Codebook& book, const Shaping& shaping, float radius, uint8_t* codes)
      : layout_(layout), book_(book), shaping_(shaping), radius_(radius), thresholds_(book, radius), codes_(codes) {}

  void run(const float* y) const {
    const int64_t size = layout_.head_dim;
    shape(0, 0, size, size & -size, y, shaping_.targets);
  }

 private:
  // The node with `size` channels from `begin` on: `y` are its targets, `memory` has room for those of nodes below.
  void shape(int64_t level, int64_t begin, int64_t size, int64_t order, const float* y, float* memory) const {
    if (shaping_.is_leaf(size, order)) {
      round(begin, size, y);
      return;
    }
    const int64_t half = size / 2, run = size / order;
    order /= 2;
    shape(level + 1, begin, half, order, y, memory);
    float* error = shaping_.error;
    const float *entries = shaping_.entries + begin, *ratios = shaping_.ratios(level, begin);
    for (int64_t i = 0; i < half; ++i) error[i] = y[i] - entries[i] * radius_;
    hadamard(error, order, run);
    if (run > 1) multiply_runs(error, order, run, layout_.cosines, true);
    for (int64_t i = 0; i < half; ++i) error[i] *= ratios[i];
    if (run > 1) multiply_runs(error, order, run, layout_.cosines, false);
    hadamard(error, order, run);
    for (int64_t i = 0; i < half; ++i) memory[i] = y[half + i] + error[i];
    shape(level + 1, begin + half, half, order, memory, memory + half);
  }

  // To the nearest entries. What is written beyond the end is written again by the next leaf, or of no account.
  void round(int64_t begin, int64_t size, const float* y) const {
    typedef uint8_t Narrow __attribute__((vector_size(WIDTH)));
    for (int64_t i = 0; i < size; i += WIDTH) {
      const Ints code = thresholds_.below(load<Floats>(y + i));
      store(codes_ + begin + i, __builtin_convertvector(code, Narrow));
      store(shaping_.entries + begin + i, entry_of<BITS>(book_, code));
    }
  }

  const Layout& layout_;
  const Codebook& book_;
  const Shaping& shaping_;
  const float radius_;
  const Thresholds<BITS> thresholds_;
  uint8_t* codes_;
};

// codec.encode: writes `padded_dim` codes and returns the gain in float16. Consumes x, which must be finite.
using Encode = uint16_t (*)(const Layout& layout, const Codebook& book, const Parameters& parameters,
                            const Shaping& shaping, float* x, uint8_t* codes);

template <int BITS>
uint16_t encode_of(const Layout& layout, const Codebook& book, const Parameters& parameters, const Shaping& shaping,
                   float* x, uint8_t* codes) {
  const int64_t size = layout.head_dim, stride = whole_registers(size);
  for (int64_t i = 0; i < stride; i += WIDTH) {
    const Floats centred = clamp(load<Floats>(x + i), LIMIT) - load<Floats>(parameters.mean + i);
    const Floats y = clamp(centred * load<Floats>(parameters.scale + i), COORDINATE_LIMIT);
    store(shaping.balanced + i, y);
    store(x + i, y);
  }
  rotate(layout, x);
  std::fill(x + size, x + stride, 0.0f);
  Floats squares{}, peak{};
  for (int64_t i = 0; i < stride; i += WIDTH) {
    const Floats y = load<Floats>(x + i);
    squares += y * y;
    if constexpr (BITS == 8) peak = max(peak, magnitude(y));
  }
  float radius;
  if constexpr (BITS == 8) {
    radius = largest(peak) * static_cast<float>(32.0 / 127);
  } else {
    radius = std::sqrt(sum(squares) / static_cast<float>(size)) * static_cast<float>(layout.spread);
  }
  Shaper<BITS>(layout, book, shaping, std::max(radius, TINY), codes).run(x);
  memset(codes + size, 0, layout.padded_dim - size);
  std::fill(shaping.entries + size, shaping.entries + stride, 0.0f);
  unrotate(layout, shaping.entries);

  Floats powers{}, inners{}, norms{};
  for (int64_t i = 0; i < stride; i += WIDTH) {
    const Floats price = load<Floats>(shaping.price + i), y = load<Floats>(shaping.balanced + i);
    const Floats entry = load<Floats>(shaping.entries + i), priced = select(price > 0.0f, y * price, Floats{});
    powers += priced * y;
    inners += priced * entry;
    norms += entry * entry * price;
  }
  const float power = sum(powers), inner = sum(inners), norm = sum(norms);
  if (!(inner > 0)) return 0;
  float gain = inner / std::max(norm, TINY);
  if (inner * inner >= LEAST_COSINE * LEAST_COSINE * power * norm) {
    gain = layout.key ? power / std::max(inner, TINY) : std::sqrt(power / std::max(norm, TINY));
  }
  return to_half(std::min(gain, GAIN_MAX));
}

inline Encode encode_for(const Layout& layout) {
  return for_bits(layout.bits, [](auto width) -> Encode { return encode_of<width()>; });
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
