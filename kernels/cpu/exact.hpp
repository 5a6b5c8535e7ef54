// The inner loops of attention for tokens that are known exactly, in any float dtype.
#pragma once

#include "blocks.hpp"

namespace decoquant {

// scores[row][i] = query[row] . token[i]; query rows have whole registers, padded with zeros.
using ExactScores = void (*)(const void* const* tokens, int64_t count, int64_t size, const float* query,
                             int64_t query_stride, float* scores);
// out[row] += weight[row][i] * token[i]; rows of out have whole registers.
using ExactMix = void (*)(const void* const* tokens, int64_t count, int64_t size, const float* weights,
                          float* out, int64_t out_stride);

// The last, partial register of a token, padded with zeros.
template <class Type>
DECOQUANT_INLINE Floats tail(const typename Type::type* from, int64_t count) {
  typename Type::type padded[WIDTH] = {};
  memcpy(padded, from, count * sizeof(*from));
  return Type::load(padded);
}

constexpr int64_t FETCHED = 16;  // tokens that are fetched ahead, and worked on at a time

template <class Type>
DECOQUANT_INLINE void fetch(const void* const* tokens, int64_t index, int64_t count, int64_t size) {
  if (index >= count) return;
  const auto* token = static_cast<const char*>(tokens[index]);
  for (int64_t byte = 0; byte < size * static_cast<int64_t>(sizeof(typename Type::type)); byte += 64) {
    __builtin_prefetch(token + byte);
  }
}

template <class Type, int GROUP>
void exact_scores(const void* const* tokens, int64_t count, int64_t size, const float* query, int64_t query_stride,
                  float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    fetch<Type>(tokens, i + FETCHED, count, size);
    const auto* token = static_cast<const typename Type::type*>(tokens[i]);
    Floats sums[GROUP] = {};
    int64_t c = 0;
    for (; c + WIDTH <= size; c += WIDTH) {
      const Floats x = Type::load(token + c);
      DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
        sums[row] = fused(x, load<Floats>(query + row * query_stride + c), sums[row]);
      }
    }
    if (c < size) {
      const Floats x = tail<Type>(token + c, size - c);
      DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
        sums[row] = fused(x, load<Floats>(query + row * query_stride + c), sums[row]);
      }
    }
    DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) scores[row * BLOCK + i] = sum(sums[row]);
  }
}

template <class Type, int GROUP>
void exact_mix(const void* const* tokens, int64_t count, int64_t size, const float* weights, float* out,
               int64_t out_stride) {
  for (int64_t begin = 0; begin < count; begin += FETCHED) {  // so few stay in the cache for all channels
    const int64_t end = std::min(count, begin + FETCHED);
    for (int64_t i = end; i < end + FETCHED; ++i) fetch<Type>(tokens, i, count, size);
    for (int64_t c = 0; c < size; c += WIDTH) {
      Floats sums[GROUP];
      DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) sums[row] = load<Floats>(out + row * out_stride + c);
      const bool whole = c + WIDTH <= size;
      for (int64_t i = begin; i < end; ++i) {
        const auto* token = static_cast<const typename Type::type*>(tokens[i]) + c;
        const Floats x = whole ? Type::load(token) : tail<Type>(token, size - c);
        DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) {
          sums[row] = fused(x, splat(weights[row * BLOCK + i]), sums[row]);
        }
      }
      DECOQUANT_UNROLL for (int row = 0; row < GROUP; ++row) store(out + row * out_stride + c, sums[row]);
    }
  }
}

}  // namespace decoquant
