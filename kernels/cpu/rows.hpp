// Rows: the channels of a token, read from any float dtype to float32 and written back.
//
// Buffers of rows hold whole registers; what lies beyond the channels is zero.
#pragma once

#include <algorithm>

#include "simd.hpp"

namespace decoquant {

inline int64_t item_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

inline int64_t whole_registers(int64_t size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

// One register to another dtype, to nearest even.
DECOQUANT_INLINE void to_half(uint16_t* to, Floats x) {
#if defined(__AVX512VNNI__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < WIDTH; ++i) to[i] = to_half(x[i]);
#endif
}
DECOQUANT_INLINE void to_bfloat16(uint16_t* to, Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  store(to, __builtin_convertvector(x != x ? Words{} + 0x7fc0u : rounded, Halfs));
}

template <class Type, class Body>
DECOQUANT_INLINE void each_register_of(const void* data, int64_t stride, int64_t size, const Body& body) {
  const auto* from = static_cast<const typename Type::type*>(data);
  int64_t c = 0;
  if (stride == 1) {
    for (; c + WIDTH <= size; c += WIDTH) body(c, Type::load(from + c));
  }
  for (; c < size; c += WIDTH) {
    typename Type::type part[WIDTH] = {};
    const int64_t count = std::min<int64_t>(WIDTH, size - c);
    for (int64_t i = 0; i < count; ++i) part[i] = from[(c + i) * stride];
    body(c, Type::load(part));
  }
}

// Calls body(channel, register) along a row of any dtype and stride; zeros beyond its end.
template <class Body>
DECOQUANT_INLINE void each_register(int64_t dtype, const void* data, int64_t stride, int64_t size, const Body& body) {
  if (dtype == FLOAT32) return each_register_of<Float32>(data, stride, size, body);
  if (dtype == BFLOAT16) return each_register_of<BFloat16>(data, stride, size, body);
  each_register_of<Float16>(data, stride, size, body);
}

inline void load_row(int64_t dtype, const void* data, int64_t stride, int64_t size, float* x) {
  each_register(dtype, data, stride, size, [x](int64_t c, Floats y) { store(x + c, y); });
}

inline const void* row_of(const Array& array, int64_t i, int64_t j, int64_t k) {
  const int64_t offset = i * array.stride[0] + j * array.stride[1] + k * array.stride[2];
  return static_cast<const char*>(array.data) + offset * item_size(array.dtype);
}

// Writes a row to `size` contiguous elements.
inline void store_row(int64_t dtype, const float* x, int64_t size, void* data) {
  if (dtype == FLOAT32) {
    memcpy(data, x, size * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(data);
  for (int64_t c = 0; c < size; c += WIDTH) {
    uint16_t part[WIDTH];
    const auto y = load<Floats>(x + c);
    dtype == BFLOAT16 ? to_bfloat16(part, y) : to_half(part, y);
    memcpy(to + c, part, std::min<int64_t>(WIDTH, size - c) * sizeof *to);
  }
}

}  // namespace decoquant
