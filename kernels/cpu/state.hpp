// The C++ view of kernels/format.py: where the sections of a state lie, and the codec's tables.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace decoquant {

enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, BOOL };  // BOOL: of masks alone

constexpr int64_t UNSET = -1;       // a position, start, parameter set or fit that does not exist
constexpr uint8_t NO_EPOCH = 255;   // of a token that was written but not encoded
constexpr int64_t TILE = 64;        // slots are padded to this many
constexpr int64_t LANES = 16;       // tokens of a key tile, channels of a value chunk
constexpr int64_t QUAD = 4;         // neighbours that one 32-bit lane holds: channels of keys, tokens of values

enum Header : int64_t { ORIGIN, END };
enum Row : int64_t { START, SET, TOTAL, FITTED, COUNT, ROW_FIELDS };

// Filled in by Python (kernels/cpu/native.py), field by field in this order; every field has 8 bytes.
struct Layout {
  int64_t key;          // 1: keys, 0: values
  int64_t bits;         // 16, 8, 5, 4, 3, 2
  int64_t head_dim;
  int64_t padded_dim;   // channels in the planes: a multiple of 32 for keys with a one-bit plane, else of 16
  int64_t dtype;        // of the cache: raw, sinks, window
  int64_t sink_tokens;  // first tokens of a sequence that enter no statistics
  int64_t batch, heads, slots;
  int64_t capacity;     // slots padded to whole tiles; stride of gains, epochs and planes
  int64_t sets;         // parameter sets per row
  int64_t sinks, window;  // slots of these two sections
  int64_t planes;       // number of planes, 0 to 2
  int64_t widths[2];    // bits of each plane; low bits of a code first
  int64_t bytes;        // of the buffer

  // Byte offsets of the sections in the buffer; shapes as in `Sections`
  int64_t header, rows, raw;
  int64_t plane[2];
  int64_t gains, epochs, means, scales, average, deviation, weights, energy;
  int64_t sink_tokens_at, sink_positions, window_tokens_at, window_positions;

  // Codec
  const int8_t* entries;      // [2 ** bits], ascending; code c stands for entries[c] / steps
  const float* thresholds;    // [2 ** bits - 1]
  const float* signs;         // [head_dim], of the rotation
  const float* cosines;       // [odd, odd] for head_dim = power of two * odd, row-major [sample, frequency]
  const float* radii;         // [tried], at which a token is encoded, over its root mean square
  int64_t tried;              // 1 or 8
  double steps;               // of entries per radius
};

// A tensor of at most four dimensions, strides in elements.
struct Array {
  const void* data;
  int64_t dtype;
  int64_t stride[4];
};

template <class T>
inline T* at(void* state, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(state) + offset);
}
template <class T>
inline const T* at(const void* state, int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(state) + offset);
}

// Bytes of plane `p` per head. Both roles hold capacity * padded_dim codes of widths[p] bits; 4-byte groups of QUAD
// neighbours stand LANES in a row of 64 bytes, and lane h of a byte (bits h * width and up) is the h-th such group:
//   keys:   [capacity / 16][padded_dim * width / 32][16 tokens][4]   channel row * (32 / width) + 4 h + j
//   values: [capacity / 64][padded_dim / 16][2 * width][16 channels][4]   token row * (32 / width) + 4 h + j of the tile
inline int64_t plane_bytes(const Layout& layout, int p) {
  return layout.capacity * layout.padded_dim * layout.widths[p] / 8;
}

inline const uint8_t* plane_of(const Layout& layout, const void* state, int p, int64_t row, int64_t head) {
  return at<const uint8_t>(state, layout.plane[p]) + (row * layout.heads + head) * plane_bytes(layout, p);
}
inline uint8_t* plane_of(const Layout& layout, void* state, int p, int64_t row, int64_t head) {
  return at<uint8_t>(state, layout.plane[p]) + (row * layout.heads + head) * plane_bytes(layout, p);
}

// Where the parameters of a set begin among the means or scales, in elements.
inline int64_t set_offset(const Layout& layout, int64_t row, int64_t set, int64_t head) {
  return ((row * layout.sets + set) * layout.heads + head) * layout.head_dim;
}

// function(i), a constant, for i from 0 to COUNT - 1.
template <class Function, int... I>
inline void each_constant(const Function& function, std::integer_sequence<int, I...>) {
  (function(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class Function>
inline void each_constant(const Function& function) {
  each_constant(function, std::make_integer_sequence<int, COUNT>());
}

// function(width), a constant, for the width at hand.
template <class Function>
auto for_bits(int64_t bits, const Function& function) {
  switch (bits) {
    case 8: return function(std::integral_constant<int, 8>());
    case 5: return function(std::integral_constant<int, 5>());
    case 4: return function(std::integral_constant<int, 4>());
    case 3: return function(std::integral_constant<int, 3>());
    default: return function(std::integral_constant<int, 2>());
  }
}

}  // namespace decoquant
