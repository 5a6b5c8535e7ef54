// The fixed orthonormal matrix of codec.rotate: diag(signs) (Hadamard kron DCT-II).
#pragma once

#include <utility>

#include "simd.hpp"

namespace decoquant {

template <int HALF, int... I>
DECOQUANT_INLINE Floats exchanged(Floats x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ HALF)...);
}

// One step of the butterfly within a register: (a + b, a - b) for lanes HALF apart.
template <int HALF>
DECOQUANT_INLINE Floats butterfly(Floats x) {
  Ints lane;
  DECOQUANT_UNROLL for (int i = 0; i < WIDTH; ++i) lane[i] = i & HALF;
  const Floats other = exchanged<HALF>(x, std::make_integer_sequence<int, WIDTH>());
  return select(lane != 0, other - x, x + other);
}

// All steps within a register.
DECOQUANT_INLINE Floats butterflies(Floats x) {
  x = butterfly<2>(butterfly<1>(x));
  if constexpr (WIDTH > 4) x = butterfly<4>(x);
  if constexpr (WIDTH > 8) x = butterfly<8>(x);
  return x;
}

// Unnormalised Walsh-Hadamard transform over `order` runs of `run` numbers, in place, half = 1, 2, 4, ... as the oracle.
inline void hadamard(float* x, int64_t order, int64_t run) {
  const int64_t size = order * run;
  int64_t half = 1;
  if (run == 1 && order >= WIDTH) {
    for (int64_t i = 0; i < size; i += WIDTH) {
      store(x + i, butterflies(load<Floats>(x + i)));
    }
    half = WIDTH;
  }
  for (; half < order; half *= 2) {
    const int64_t distance = half * run;
    for (int64_t begin = 0; begin < size; begin += 2 * distance) {
      float *a = x + begin, *b = a + distance;
      int64_t i = 0;
      for (; i + WIDTH <= distance; i += WIDTH) {
        const Floats left = load<Floats>(a + i), right = load<Floats>(b + i);
        store(a + i, left + right);
        store(b + i, left - right);
      }
      for (; i < distance; ++i) {
        const float left = a[i], right = b[i];
        a[i] = left + right;
        b[i] = left - right;
      }
    }
  }
}

// x[run][...] @ matrix or its transpose, for each of `order` runs of `run` numbers.
inline void multiply_runs(float* x, int64_t order, int64_t run, const float* matrix, bool transposed) {
  constexpr int64_t SMALL = 128;
  float small[SMALL];
  for (int64_t i = 0; i < order; ++i, x += run) {
    // Head sizes with an odd factor above SMALL do not fit the stack; none is known, so speed does not matter there.
    float* result = run <= SMALL ? small : new float[run];
    for (int64_t j = 0; j < run; ++j) {
      float total = 0;
      for (int64_t k = 0; k < run; ++k) total += x[k] * matrix[transposed ? j * run + k : k * run + j];
      result[j] = total;
    }
    memcpy(x, result, run * sizeof(float));
    if (result != small) delete[] result;
  }
}

// codec.rotate on one row, in place.
inline void rotate(const Layout& layout, float* x) {
  const int64_t size = layout.head_dim, order = size & -size, run = size / order;
  for (int64_t i = 0; i < size; ++i) x[i] *= layout.signs[i];
  hadamard(x, order, run);
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(order));
  for (int64_t i = 0; i < size; ++i) x[i] *= norm;
  if (run > 1) multiply_runs(x, order, run, layout.cosines, false);
}

// codec.unrotate on one row, in place.
inline void unrotate(const Layout& layout, float* x) {
  const int64_t size = layout.head_dim, order = size & -size, run = size / order;
  if (run > 1) multiply_runs(x, order, run, layout.cosines, true);
  hadamard(x, order, run);
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(order));
  for (int64_t i = 0; i < size; ++i) x[i] = x[i] * norm * layout.signs[i];
}

}  // namespace decoquant
