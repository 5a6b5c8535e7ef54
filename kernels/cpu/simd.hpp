// Vectors of the instruction set this file is compiled for: codebook lookups and integer dot products.
//
// A `Bytes` register holds codes of LANES / HALVES lanes, QUAD neighbours in each. Codebook entries are looked up as
// entry + 128, because the multiply instructions want one unsigned operand; the dot product's sum then carries
// 128 * (sum of the other operand), which the caller subtracts. Sums wrap around: only the true result has to fit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "state.hpp"

namespace decoquant {

#define DECOQUANT_INLINE __attribute__((always_inline)) inline
#define DECOQUANT_UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512VNNI__)
constexpr int WIDTH = 16;     // 32-bit lanes of a register
constexpr int MAX_GROUP = 8;  // rows whose accumulators fit in the registers
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int MAX_GROUP = 4;
#else
constexpr int WIDTH = 4;
constexpr int MAX_GROUP = 2;
#endif
constexpr int HALVES = LANES / WIDTH;  // registers per row of a tile

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Shorts __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halfs __attribute__((vector_size(2 * WIDTH)));

template <class Vector>
DECOQUANT_INLINE Vector load(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}
template <class Vector>
DECOQUANT_INLINE void store(void* to, Vector vector) {
  memcpy(to, &vector, sizeof vector);
}
DECOQUANT_INLINE Floats splat(float x) { return x - Floats{}; }
DECOQUANT_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
DECOQUANT_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
DECOQUANT_INLINE Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// a * b + c, rounded once where the CPU can.
DECOQUANT_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512VNNI__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

DECOQUANT_INLINE float sum(Floats x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = x[0];
  DECOQUANT_UNROLL for (int i = 1; i < WIDTH; ++i) total += x[i];
  return total;
#endif
}
DECOQUANT_INLINE float largest(Floats x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float peak = x[0];
  DECOQUANT_UNROLL for (int i = 1; i < WIDTH; ++i) peak = x[i] > peak ? x[i] : peak;
  return peak;
#endif
}

DECOQUANT_INLINE uint32_t sum(Words x) {
  uint32_t lanes[WIDTH], total = 0;
  store(lanes, x);
  for (const uint32_t lane : lanes) total += lane;
  return total;
}

// Rounds to nearest even; |x| below 2^22.
DECOQUANT_INLINE Ints to_ints(Floats x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_cvtps_epi32((__m512)x);
#else
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23
  return (Ints)(x + magic) - (Ints)magic;
#endif
}

// 2^x with a relative error below 2e-7; 0 below -126, x at most 127; nan stays nan.
DECOQUANT_INLINE Floats exp2(Floats x) {
#if defined(__AVX512VNNI__)
  const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const Floats clipped = select(x < -126.0f, splat(-126.0f), x);
  const Ints rounded = to_ints(clipped - 0.5f);
  const Floats rest = clipped - __builtin_convertvector(rounded, Floats);
#endif
  Floats p = splat(1.877576676e-3f);  // 2^x for x from 0 to 1, of least relative error
  p = fused(p, rest, splat(8.989340217e-3f));
  p = fused(p, rest, splat(5.582631781e-2f));
  p = fused(p, rest, splat(2.401536172e-1f));
  p = fused(p, rest, splat(6.931530732e-1f));
  p = fused(p, rest, splat(9.999999251e-1f));
#if defined(__AVX512VNNI__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)x);
#else
  return select(x < -126.0f, Floats{}, p * (Floats)((rounded + 127) << 23));
#endif
}

DECOQUANT_INLINE Floats from_half(const uint16_t* from) {
#if defined(__AVX512VNNI__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const Words bits = __builtin_convertvector(load<Halfs>(from), Words);
  const Words magnitude = bits & 0x7fff;
  // Exponents are rebiased by a multiplication, which also makes subnormals right; infinity and nan keep theirs.
  const Floats finite = (Floats)(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  const Words special = 0x7f800000u | (magnitude << 13);
  const Words unsigned_bits = magnitude >= 0x7c00u ? special : (Words)finite;
  return (Floats)(unsigned_bits | ((bits & 0x8000) << 16));
#endif
}
DECOQUANT_INLINE Floats from_bfloat16(const uint16_t* from) {
#if defined(__AVX512VNNI__)  // GCC 12 converts in two halves
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
#else
  return (Floats)(__builtin_convertvector(load<Halfs>(from), Words) << 16);
#endif
}

// Scalars, to nearest even.
DECOQUANT_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DECOQUANT_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint16_t to_half(float x) {
#if defined(__AVX512VNNI__) || defined(__AVX2__)
  return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {  // subnormal: the addition below rounds at 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
#endif
}

// Tokens of any float dtype.
struct Float32 {
  using type = float;
  static DECOQUANT_INLINE Floats load(const float* from) { return decoquant::load<Floats>(from); }
};
struct BFloat16 {
  using type = uint16_t;
  static DECOQUANT_INLINE Floats load(const uint16_t* from) { return from_bfloat16(from); }
};
struct Float16 {
  using type = uint16_t;
  static DECOQUANT_INLINE Floats load(const uint16_t* from) { return from_half(from); }
};

// ------------------------------------------------------------------------------------------------------ dot products

// The quantised factor of a dot product: two 32-bit words for each quad of neighbours.
//   AVX-512: the high and the low limb, four signed bytes each, value = 128 * high + low, low from 0 to 127
//   else:    neighbours 0 and 2, 1 and 3, as signed 16-bit numbers
#if defined(__AVX512VNNI__)
constexpr int32_t FACTOR_LIMIT = 127 * 128 - 1;
#else
constexpr int32_t FACTOR_LIMIT = 32767;
#endif

// The words of the quads of a register, values within FACTOR_LIMIT.
DECOQUANT_INLINE void split_quads(Ints value, int32_t* first, int32_t* second) {
#if defined(__AVX512VNNI__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm512_cvtepi32_epi8((__m512i)(value >> 7)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm512_cvtepi32_epi8((__m512i)(value & 127)));
#else
  const auto pair = [](int32_t low, int32_t high) {
    return static_cast<int32_t>(static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16);
  };
  int32_t values[WIDTH];
  store(values, value);
  for (int quad = 0; quad < WIDTH / QUAD; ++quad) {
    const int32_t* of = values + quad * QUAD;
    first[quad] = pair(of[0], of[2]);
    second[quad] = pair(of[1], of[3]);
  }
#endif
}

// The same for the registers of a tile.
DECOQUANT_INLINE void split_tile(const Ints (&value)[TILE / WIDTH], int32_t* first, int32_t* second) {
#if defined(__AVX512VNNI__)
  const __m512i a = _mm512_packs_epi32((__m512i)value[0], (__m512i)value[1]);
  const __m512i b = _mm512_packs_epi32((__m512i)value[2], (__m512i)value[3]);
  const __m512i low = _mm512_set1_epi16(127);
  const __m512i high_limbs = _mm512_packs_epi16(_mm512_srai_epi16(a, 7), _mm512_srai_epi16(b, 7));
  const __m512i low_limbs = _mm512_packs_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
  // Packing works within 128 bits: quad 4 * register + lane lies at 4 * lane + register.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(first, _mm512_permutexvar_epi32(order, high_limbs));
  _mm512_storeu_si512(second, _mm512_permutexvar_epi32(order, low_limbs));
#else
  DECOQUANT_UNROLL for (int i = 0; i < TILE / WIDTH; ++i) {
    split_quads(value[i], first + i * WIDTH / QUAD, second + i * WIDTH / QUAD);
  }
#endif
}

// Adds the products of `codes` with one quad of the factor, per lane.
struct Accumulator {
  Words a{}, b{};

#if defined(__AVX512VNNI__)
  // The instruction by hand: GCC 12 copies registers around its intrinsic, which costs a fifth of the speed.
  DECOQUANT_INLINE void add(Bytes codes, const int32_t* first, const int32_t* second) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(a) : "v"(codes), "m"(*first));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(b) : "v"(codes), "m"(*second));
  }
  DECOQUANT_INLINE Words total() const { return (a << 7) + b; }
#elif defined(__AVX2__)
  DECOQUANT_INLINE void add(Bytes codes, const int32_t* first, const int32_t* second) {
    const __m256i even = (__m256i)((Shorts)codes & 255), odd = (__m256i)((Shorts)codes >> 8);
    a += (Words)_mm256_madd_epi16(even, _mm256_set1_epi32(*first));
    b += (Words)_mm256_madd_epi16(odd, _mm256_set1_epi32(*second));
  }
  DECOQUANT_INLINE Words total() const { return a + b; }
#else
  DECOQUANT_INLINE void add(Bytes codes, const int32_t* first, const int32_t* second) {
    const Words lanes = (Words)codes;
    const auto low = [](int32_t pair) { return static_cast<uint32_t>(static_cast<int16_t>(pair)); };
    a += (lanes & 255) * low(*first) + (lanes >> 16 & 255) * static_cast<uint32_t>(*first >> 16);
    b += (lanes >> 8 & 255) * low(*second) + (lanes >> 24) * static_cast<uint32_t>(*second >> 16);
  }
  DECOQUANT_INLINE Words total() const { return a + b; }
#endif
};

// ----------------------------------------------------------------------------------------------------------- lookups

// Codebook entries + 128, ready for `Codes::load`.
struct Table {
  alignas(64) uint8_t entry[64];

  Table(const int8_t* entries, int64_t bits) {
    for (int i = 0; i < 64; ++i) entry[i] = bits >= 8 ? 0 : static_cast<uint8_t>(entries[i & ((1 << bits) - 1)] + 128);
  }
};

template <int SHIFT>
DECOQUANT_INLINE Bytes shifted(Bytes x) {  // bits move between the two bytes of a pair: mask them off afterwards
  if constexpr (SHIFT > 0) return (Bytes)((Shorts)x >> SHIFT);
  if constexpr (SHIFT < 0) return (Bytes)((Shorts)x << -SHIFT);
  return x;
}

#if defined(__AVX512VBMI__)
// The instruction ignores the upper two bits of an index and the table repeats itself, so nothing is masked off.
struct Book {
  Bytes table;
  explicit Book(const Table& from) : table(decoquant::load<Bytes>(from.entry)) {}
  template <int WIDTH_BITS>
  DECOQUANT_INLINE Bytes entry(Bytes index) const {
    return (Bytes)_mm512_permutexvar_epi8((__m512i)index, (__m512i)table);
  }
  template <int LOW_BITS>  // index: low bits from one plane, the bit above them from another
  DECOQUANT_INLINE Bytes entry(Bytes low, Bytes high) const {
    constexpr uint8_t mask = (1 << LOW_BITS) - 1;
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(mask), (__m512i)low, (__m512i)high, 0xca);
    return (Bytes)_mm512_permutexvar_epi8(index, (__m512i)table);
  }
};
#elif defined(__AVX2__)
struct Book {
  Bytes table, upper;
  explicit Book(const Table& from) {
    memcpy(&table, from.entry, 16);
    memcpy(reinterpret_cast<char*>(&table) + 16, from.entry, 16);
    memcpy(&upper, from.entry + 16, 16);
    memcpy(reinterpret_cast<char*>(&upper) + 16, from.entry + 16, 16);
  }
  template <int WIDTH_BITS>
  DECOQUANT_INLINE Bytes entry(Bytes index) const {
    constexpr uint8_t mask = (1 << WIDTH_BITS) - 1;
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)(index & mask));
  }
  template <int LOW_BITS>
  DECOQUANT_INLINE Bytes entry(Bytes low, Bytes high) const {
    constexpr uint8_t mask = (1 << LOW_BITS) - 1, bit = 1 << LOW_BITS;
    const Bytes index = (low & mask) | (high & bit);
    if constexpr (LOW_BITS < 4) return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
    const __m256i nibble = (__m256i)(index & 15);
    return (Bytes)_mm256_blendv_epi8(
        _mm256_shuffle_epi8((__m256i)table, nibble), _mm256_shuffle_epi8((__m256i)upper, nibble),
        (__m256i)shifted<-3>(index));
  }
};
#else
// Looked up out of line: inlined, a scalar loop for each of many lookups takes the compiler most of a minute.
__attribute__((noinline)) inline Bytes looked_up(const uint8_t* table, Bytes index) {
  uint8_t from[4 * WIDTH];
  memcpy(from, &index, sizeof from);
  for (uint8_t& x : from) x = table[x];
  return load<Bytes>(from);
}

struct Book {
  const uint8_t* table;
  explicit Book(const Table& from) : table(from.entry) {}
  template <int WIDTH_BITS>
  DECOQUANT_INLINE Bytes entry(Bytes index) const {
    constexpr uint8_t mask = (1 << WIDTH_BITS) - 1;
    return looked_up(table, index & mask);
  }
  template <int LOW_BITS>
  DECOQUANT_INLINE Bytes entry(Bytes low, Bytes high) const {
    constexpr uint8_t mask = (1 << LOW_BITS) - 1, bit = 1 << LOW_BITS;
    return (*this).template entry<LOW_BITS + 1>((low & mask) | (high & bit));
  }
};
#endif

// Reads the planes of BITS-wide codes; `load` gives the entries of QUADS consecutive quads.
template <int BITS>
struct Codes;

template <>
struct Codes<8> {
  static constexpr int QUADS = 4;
  static DECOQUANT_INLINE void load(const Book&, const uint8_t* plane, const uint8_t*, Bytes* out) {
    DECOQUANT_UNROLL for (int i = 0; i < 4; ++i) out[i] = decoquant::load<Bytes>(plane + 64 * i);
  }
};

template <>
struct Codes<4> {
  static constexpr int QUADS = 4;
  static DECOQUANT_INLINE void load(const Book& book, const uint8_t* plane, const uint8_t*, Bytes* out) {
    DECOQUANT_UNROLL for (int i = 0; i < 2; ++i) {
      const Bytes x = decoquant::load<Bytes>(plane + 64 * i);
      out[2 * i] = book.entry<4>(x);
      out[2 * i + 1] = book.entry<4>(shifted<4>(x));
    }
  }
};

template <>
struct Codes<2> {
  static constexpr int QUADS = 4;
  static DECOQUANT_INLINE void load(const Book& book, const uint8_t* plane, const uint8_t*, Bytes* out) {
    const Bytes x = decoquant::load<Bytes>(plane);
    out[0] = book.entry<2>(x);
    out[1] = book.entry<2>(shifted<2>(x));
    out[2] = book.entry<2>(shifted<4>(x));
    out[3] = book.entry<2>(shifted<6>(x));
  }
};

template <>
struct Codes<5> {
  static constexpr int QUADS = 8;
  template <int I>
  static DECOQUANT_INLINE void pair(const Book& book, const uint8_t* plane, Bytes bits, Bytes* out) {
    const Bytes x = decoquant::load<Bytes>(plane + 64 * I);
    out[2 * I] = book.entry<4>(x, shifted<2 * I - 4>(bits));
    out[2 * I + 1] = book.entry<4>(shifted<4>(x), shifted<2 * I - 3>(bits));
  }
  static DECOQUANT_INLINE void load(const Book& book, const uint8_t* plane, const uint8_t* upper, Bytes* out) {
    const Bytes bits = decoquant::load<Bytes>(upper);
    pair<0>(book, plane, bits, out);
    pair<1>(book, plane, bits, out);
    pair<2>(book, plane, bits, out);
    pair<3>(book, plane, bits, out);
  }
};

template <>
struct Codes<3> {
  static constexpr int QUADS = 8;
  template <int I>
  static DECOQUANT_INLINE void four(const Book& book, const uint8_t* plane, Bytes bits, Bytes* out) {
    const Bytes x = decoquant::load<Bytes>(plane + 64 * I);
    out[4 * I] = book.entry<2>(x, shifted<4 * I - 2>(bits));
    out[4 * I + 1] = book.entry<2>(shifted<2>(x), shifted<4 * I - 1>(bits));
    out[4 * I + 2] = book.entry<2>(shifted<4>(x), shifted<4 * I>(bits));
    out[4 * I + 3] = book.entry<2>(shifted<6>(x), shifted<4 * I + 1>(bits));
  }
  static DECOQUANT_INLINE void load(const Book& book, const uint8_t* plane, const uint8_t* upper, Bytes* out) {
    const Bytes bits = decoquant::load<Bytes>(upper);
    four<0>(book, plane, bits, out);
    four<1>(book, plane, bits, out);
  }
};

template <int BITS>
constexpr int LOWER_ROWS = Codes<BITS>::QUADS * (BITS == 8 ? 8 : BITS >= 4 ? 4 : 2) / 8;  // rows of plane 0 per load

}  // namespace decoquant
