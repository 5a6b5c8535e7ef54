// codec.encode of kernels/codec.py: tokens of one head to codes and gains.
//
// A register holds one channel of several attempts, each of them one token at one radius: lane `radius * tokens + token`.
// So no step along the channels, and nearly all are, moves numbers between lanes.
#pragma once

#include "codec.hpp"

namespace decoquant {

// codec.leaf
inline int64_t leaf(int64_t head_dim) { return std::min<int64_t>(std::max<int64_t>(head_dim / 8, 8), 16); }

// --------------------------------------------------------------------------------------------------- lanes of attempts

// One channel of `TOKENS` tokens, again for each radius.
template <int TOKENS>
DECOQUANT_INLINE Floats spread(const float* channel) {
  if constexpr (TOKENS == WIDTH) return load<Floats>(channel);
  if constexpr (TOKENS == 1) return splat(*channel);
  static_assert(TOKENS <= 2 || TOKENS == WIDTH);
  typedef int64_t Pairs __attribute__((vector_size(4 * WIDTH)));
  return (Floats)(load<int64_t>(channel) - Pairs{});
}

// function(tokens), a constant, for the number of tokens at hand: one that `Encoder::tokens_of` returns.
template <class Function>
void for_tokens(int64_t tokens, const Function& function) {
  if (tokens == WIDTH) return function(std::integral_constant<int, WIDTH>());
  if (tokens == 2) return function(std::integral_constant<int, 2>());
  function(std::integral_constant<int, 1>());
}

// a[first], b[first], a[first + 1], ...
template <int FIRST, int... I>
DECOQUANT_INLINE Floats zip(Floats a, Floats b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * WIDTH)...);
}

// [channel][tokens] from rows, `stride` apart.
template <int TOKENS>
void interleave(const float* rows, int64_t stride, int64_t size, float* channels) {
  int64_t c = 0;
  if constexpr (TOKENS == 2) {
    constexpr auto lanes = std::make_integer_sequence<int, WIDTH>();
    for (; c + WIDTH <= size; c += WIDTH) {
      const auto a = load<Floats>(rows + c), b = load<Floats>(rows + stride + c);
      store(channels + 2 * c, zip<0>(a, b, lanes));
      store(channels + 2 * c + WIDTH, zip<WIDTH / 2>(a, b, lanes));
    }
  }
  for (; c < size; ++c) {
    for (int token = 0; token < TOKENS; ++token) channels[c * TOKENS + token] = rows[token * stride + c];
  }
}

// `hadamard` of rotation.hpp for COUNT registers.
template <int COUNT, int HALF = 1>
DECOQUANT_INLINE void butterflies(Floats (&x)[COUNT]) {
  if constexpr (HALF < COUNT) {
    DECOQUANT_UNROLL for (int i = 0; i < COUNT / 2; ++i) {
      Floats &a = x[i / HALF * 2 * HALF + i % HALF], &b = x[i / HALF * 2 * HALF + i % HALF + HALF];
      const Floats left = a, right = b;
      a = left + right;
      b = left - right;
    }
    butterflies<COUNT, 2 * HALF>(x);
  }
}

// `multiply_runs` of rotation.hpp; `spare` has room for a run.
inline void multiply_runs_of_lanes(float* lanes, int64_t order, int64_t run, const float* matrix, bool transposed,
                                   float* spare) {
  for (int64_t i = 0; i < order; ++i, lanes += run * WIDTH) {
    for (int64_t j = 0; j < run; ++j) {
      Floats total{};
      for (int64_t k = 0; k < run; ++k) {
        total += load<Floats>(lanes + k * WIDTH) * matrix[transposed ? j * run + k : k * run + j];
      }
      store(spare + j * WIDTH, total);
    }
    memcpy(lanes, spare, run * WIDTH * sizeof(float));
  }
}

// ------------------------------------------------------------------------------------------------------------ rounding

// What a leaf of `order` runs of `run` channels is rounded with. Lanes: `x` is what is wanted, `reached` becomes what the
// codes stand for, times `order`; `spare` has room for a run.
struct Leaf {
  const Codebook& book;
  Floats radius;
  int64_t order, run;
  const float* cosines;
  float* spare;
};
using Round = void (*)(const Leaf& leaf, const float* x, float* reached, uint8_t* codes);

template <int BITS>
class Rounder {
 public:
  // The oracle divides by the radius: a coordinate on a threshold may fall to the other side here.
  explicit Rounder(const Leaf& leaf) : nearest_(leaf.book), radius_(leaf.radius), inverse_(1.0f / leaf.radius) {}

  // Of one channel, `y` becomes what its codes stand for.
  DECOQUANT_INLINE void round(Floats& y, uint8_t* codes) const {
    typedef uint8_t Narrow __attribute__((vector_size(WIDTH)));
    const Ints code = nearest_.code(y * inverse_);
    store(codes, __builtin_convertvector(code, Narrow));
    y = nearest_.entry(code) * radius_;
  }

  // Of COUNT channels without an odd factor.
  template <int COUNT>
  DECOQUANT_INLINE void round_all(const float* x, float* reached, uint8_t* codes) const {
    Floats y[COUNT];
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) y[i] = load<Floats>(x + i * WIDTH);
    butterflies(y);
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) round(y[i], codes + i * WIDTH);
    butterflies(y);
    DECOQUANT_UNROLL for (int i = 0; i < COUNT; ++i) store(reached + i * WIDTH, y[i]);
  }

 private:
  const Nearest<BITS> nearest_;
  const Floats radius_, inverse_;
};

template <int BITS>
void round_of(const Leaf& leaf, const float* x, float* reached, uint8_t* codes) {
  const Rounder<BITS> rounder(leaf);
  const auto [book, radius, order, run, cosines, spare] = leaf;
  if (run == 1 && order == 16) return rounder.template round_all<16>(x, reached, codes);
  if (run == 1 && order == 8) return rounder.template round_all<8>(x, reached, codes);
  memcpy(reached, x, order * run * WIDTH * sizeof(float));
  hadamard(reached, order, run * WIDTH);
  if (run > 1) multiply_runs_of_lanes(reached, order, run, cosines, false, spare);
  for (int64_t i = 0; i < order * run; ++i) {
    auto y = load<Floats>(reached + i * WIDTH);
    rounder.round(y, codes + i * WIDTH);
    store(reached + i * WIDTH, y);
  }
  if (run > 1) multiply_runs_of_lanes(reached, order, run, cosines, true, spare);
  hadamard(reached, order, run * WIDTH);
}

// ------------------------------------------------------------------------------------------------------------- encoder

// codec.encode for the tokens of one head with one parameter set.
class Encoder {
 public:
  // `weights`, bfloat16, is null if all channels weigh the same.
  Encoder(const Layout& layout, const Codebook& book, const void* state, int64_t row, int64_t head, int64_t set,
          const uint16_t* weights)
      : layout_(layout),
        book_(book),
        round_(for_bits(layout.bits, [](auto width) -> Round { return round_of<width()>; })),
        size_(layout.head_dim),
        stride_(whole_registers(size_)),
        order_(size_ & -size_),
        leaf_(leaf(size_)),
        tokens_(tokens_of(layout)) {
    const int64_t rows = 3 + (levels() + 1) / 2 + tokens_, run = size_ / order_;
    const int64_t lanes = 2 * size_ + run + (size_ + 3) / 4;
    float* memory = scratch_rows(1, rows * stride_ + tokens_ * size_ + lanes * WIDTH + LINE);
    memory += (LINE - reinterpret_cast<uintptr_t>(memory) / sizeof(float) % LINE) % LINE;
    const auto take = [&memory](int64_t count) { return (memory += count) - count; };
    reached_ = take(size_ * WIDTH);
    wanted_ = take(size_ * WIDTH);
    spare_ = take(run * WIDTH);
    attempts_ = reinterpret_cast<uint8_t*>(take((size_ + 3) / 4 * WIDTH));
    rows_ = take(tokens_ * stride_);
    parameters_ = load_parameters(layout, state, row, set, head, take(2 * stride_));
    price_ = take(stride_);
    ratios_ = take((levels() + 1) / 2 * stride_);
    channels_ = take(tokens_ * size_);
    price(weights);
  }

  // Tokens that are encoded at once.
  int64_t tokens() const { return tokens_; }

  // Room for one of them, finite; gets lost.
  float* token(int64_t index) const { return rows_ + index * stride_; }

  // Encodes `count` tokens: `codes` is [count][padded_dim], gains are float16.
  void encode(int64_t count, uint8_t* codes, uint16_t* gains) {
    for (int64_t token = 0; token < count; ++token) prepare(token);
    // Lanes without a token repeat one: the CPU may be slow on arbitrary numbers.
    for (int64_t token = count; token < tokens_; ++token) {
      memcpy(rows_ + token * stride_, rows_ + (count - 1) * stride_, size_ * sizeof(float));
      spread_[token] = spread_[count - 1];
    }
    for_tokens(tokens_, [this](auto tokens) { interleave<tokens()>(rows_, stride_, size_, channels_); });
    const int64_t together = WIDTH / tokens_;
    for (int64_t first = 0; first < layout_.tried; first += together) {
      attempt(first);
      for (int64_t token = 0; token < count; ++token) {
        int64_t best = UNSET;
        for (int64_t lane = token; lane < WIDTH; lane += tokens_) {
          if (first + lane != token && !(errors_[lane] < kept_[token].error)) continue;
          kept_[token] = {errors_[lane], cross_[lane], norm_[lane], radius_[lane]};
          best = lane;
        }
        if (best == UNSET) continue;
        extract(best, codes + token * layout_.padded_dim);
      }
    }
    for (int64_t token = 0; token < count; ++token) {
      memset(codes + token * layout_.padded_dim + size_, 0, layout_.padded_dim - size_);
      gains[token] = gain(token);
    }
  }

 private:
  static constexpr int64_t LINE = 16;  // floats of a cache line

  struct Kept {
    float error, cross, norm, radius;
  };

  static int64_t tokens_of(const Layout& layout) { return std::max<int64_t>(1, WIDTH / layout.tried); }

  bool is_leaf(int64_t size, int64_t order) const { return order == 1 || size <= leaf_; }

  // Splits of a row into halves, one after the other, until it is a leaf.
  int64_t levels() const {
    int64_t count = 0;
    for (int64_t size = size_, order = order_; !is_leaf(size, order); order /= 2, size /= 2) ++count;
    return count;
  }

  // (p - q) / (p + q) of the node with `size` channels from `begin` on.
  float* ratios(int64_t level, int64_t begin) const { return ratios_ + (level * size_ + begin) / 2; }

  // codec.cost, and the ratios that come of it.
  void price(const uint16_t* weights) {
    const float least = *std::min_element(parameters_.scale, parameters_.scale + size_);
    for (int64_t i = 0; i < size_; ++i) {
      const float relative = least / parameters_.scale[i];
      price_[i] = relative * relative;
      if (weights != nullptr) price_[i] *= from_bfloat16(weights[i]);
    }
    std::fill(price_ + size_, price_ + stride_, 0.0f);
    std::copy_n(price_, size_, channels_);
    divide(0, 0, size_, order_, channels_);
  }

  // `prices` of a node, consumed.
  void divide(int64_t level, int64_t begin, int64_t size, int64_t order, float* prices) const {
    if (is_leaf(size, order)) return;
    const int64_t half = size / 2;
    float *first = prices, *second = prices + half, *ratio = ratios(level, begin);
    for (int64_t i = 0; i < half; ++i) {
      const float p = first[i], q = second[i], total = p + q;
      ratio[i] = (p - q) / total;
      first[i] = 2 * p * q / total;
      second[i] = total / 2;
    }
    divide(level + 1, begin, half, order / 2, first);
    divide(level + 1, begin + half, half, order / 2, second);
  }

  // Balances a token and gives it the signs of the rotation.
  void prepare(int64_t token) {
    float* x = rows_ + token * stride_;
    for (int64_t i = 0; i < stride_; i += WIDTH) {
      const Floats centred = clamp(load<Floats>(x + i), LIMIT) - load<Floats>(parameters_.mean + i);
      store(x + i, clamp(centred * load<Floats>(parameters_.scale + i), COORDINATE_LIMIT));
    }
    std::fill(x + size_, x + stride_, 0.0f);
    Floats squares{}, powers{};
    for (int64_t i = 0; i < stride_; i += WIDTH) {
      const auto y = load<Floats>(x + i);
      squares += y * y;
      powers += y * y * load<Floats>(price_ + i);
    }
    power_[token] = sum(powers);
    spread_[token] = layout_.bits == 8 ? largest_rotated(x) * static_cast<float>(32.0 / 127)
                                     : std::sqrt(sum(squares) / static_cast<float>(size_));
    for (int64_t i = 0; i < size_; ++i) x[i] *= layout_.signs[i];
  }

  float largest_rotated(const float* x) const {
    float* y = wanted_;
    memcpy(y, x, stride_ * sizeof(float));
    rotate(layout_, y);
    std::fill(y + size_, y + stride_, 0.0f);
    Floats peak{};
    for (int64_t i = 0; i < stride_; i += WIDTH) peak = max(peak, magnitude(load<Floats>(y + i)));
    return largest(peak);
  }

  // The codes of a lane.
  void extract(int64_t lane, uint8_t* codes) const {
    int64_t c = 0;
#if defined(__AVX512VBMI__)
    const __m512i index = _mm512_add_epi8(  // of 8 channels, again and again
        _mm512_set1_epi64(0x7060504030201000), _mm512_set1_epi8(static_cast<char>(lane)));
    for (; c + 8 <= size_; c += 8) {
      const uint8_t* from = attempts_ + c * WIDTH;
      const __m512i found = _mm512_permutex2var_epi8(_mm512_loadu_si512(from), index, _mm512_loadu_si512(from + 64));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + c), _mm512_castsi512_si128(found));
    }
#endif
    for (; c < size_; ++c) codes[c] = attempts_[c * WIDTH + lane];
  }

  // Encodes all tokens at the radii from `first` on.
  void attempt(int64_t first) {
    for (int64_t lane = 0; lane < WIDTH; ++lane) {
      radius_[lane] = std::max(spread_[lane % tokens_] * layout_.radii[first + lane / tokens_], TINY);
    }
    for_tokens(tokens_, [this](auto tokens) { shape<tokens()>(); });
  }

  // codec._shape, and sums over the channels in the metric of the price.
  template <int TOKENS>
  [[gnu::noinline]] void shape() {
    constexpr int PARTS = 4;  // sums that do not wait for each other
    Floats errors[PARTS]{}, cross[PARTS]{}, norm[PARTS]{};
    const float* channels = channels_;
    const float *price = price_, share = 1.0f / static_cast<float>(order_);
    const auto wanted = [=](int64_t c) { return spread<TOKENS>(channels + c * TOKENS); };
    const auto add = [&, price, share](int part, int64_t c, Floats x) {
      const Floats reached = x * share, left = wanted(c) - reached, priced = left * price[c];
      errors[part] = fused(priced, left, errors[part]);
      cross[part] = fused(priced, reached, cross[part]);
      norm[part] = fused(reached * price[c], reached, norm[part]);
    };
    if (is_leaf(size_, order_)) {
      for (int64_t c = 0; c < size_; ++c) store(wanted_ + c * WIDTH, wanted(c));
      round(0, size_, order_, wanted_);
      for (int64_t c = 0; c < size_; ++c) add(0, c, load<Floats>(reached_ + c * WIDTH));
    } else {
      node(0, 0, size_, order_, wanted, wanted_, add);
    }
    store(errors_, errors[0] + errors[1] + (errors[2] + errors[3]));
    store(cross_, cross[0] + cross[1] + (cross[2] + cross[3]));
    store(norm_, norm[0] + norm[1] + (norm[2] + norm[3]));
  }

  // The node with `size` channels from `begin` on: `x` is what is wanted, `memory` has room for that of nodes below.
  // What is reached is kept times `order`.
  [[gnu::noinline]] void shape(int64_t level, int64_t begin, int64_t size, int64_t order, const float* x,
                               float* memory) const {
    if (is_leaf(size, order)) return round(begin, size, order, x);
    float* reached = reached_ + begin * WIDTH;
    node(
        level, begin, size, order, [=](int64_t i) { return load<Floats>(x + i * WIDTH); }, memory,
        [=](int, int64_t i, Floats y) { store(reached + i * WIDTH, y); });
  }

  void round(int64_t begin, int64_t size, int64_t order, const float* x) const {
    const Floats radius = load<Floats>(radius_) * std::sqrt(static_cast<float>(order_));
    const Leaf leaf{book_, radius, order, size / order, layout_.cosines, spare_};
    round_(leaf, x, reached_ + begin * WIDTH, attempts_ + begin * WIDTH);
  }

  // A node that is no leaf; wanted(channel) reads what is wanted, reach(part, channel, x) takes what is reached.
  template <class Wanted, class Reach>
  DECOQUANT_INLINE void node(int64_t level, int64_t begin, int64_t size, int64_t order, const Wanted& wanted,
                             float* memory, const Reach& reach) const {
    const int64_t half = size / 2;
    const float *ratio = ratios(level, begin), share = 2.0f / static_cast<float>(order);
    const auto at = [](const float* lanes, int64_t i) { return load<Floats>(lanes + i * WIDTH); };
    if (is_leaf(half, order / 2)) {
      const float *sum = reached_ + begin * WIDTH, *difference = sum + half * WIDTH;
      for (int64_t i = 0; i < half; ++i) store(memory + i * WIDTH, wanted(i) + wanted(half + i));
      round(begin, half, order / 2, memory);
      for (int64_t i = 0; i < half; ++i) {
        const Floats error = at(memory, i) - at(sum, i) * share;
        store(memory + i * WIDTH, wanted(i) - wanted(half + i) + error * ratio[i]);
      }
      round(begin + half, half, order / 2, memory);
      for (int64_t i = 0; i < half; ++i) {
        const Floats a = at(sum, i), b = at(difference, i);
        reach(0, i, a + b);
        reach(1, half + i, a - b);
      }
      return;
    }

    // Two levels at once: what is between them need not be kept.
    const int64_t part = half / 2;
    const float *first = ratios(level + 1, begin), *second = ratios(level + 1, begin + half), twice = 2 * share;
    const float *r0 = reached_ + begin * WIDTH, *r1 = r0 + part * WIDTH, *r2 = r1 + part * WIDTH, *r3 = r2 + part * WIDTH;
    float *next = memory, *later = next + part * WIDTH, *below = later + part * WIDTH;
    const auto child = [&](int64_t index) { shape(level + 2, begin + index * part, part, order / 4, next, below); };
    for (int64_t i = 0; i < part; ++i) {
      const Floats a = wanted(i) + wanted(half + i), b = wanted(part + i) + wanted(half + part + i);
      store(next + i * WIDTH, a + b);
    }
    child(0);
    for (int64_t i = 0; i < part; ++i) {
      const Floats a = wanted(i) + wanted(half + i), b = wanted(part + i) + wanted(half + part + i);
      store(next + i * WIDTH, a - b + (at(next, i) - at(r0, i) * twice) * first[i]);
    }
    child(1);
    for (int64_t i = 0; i < part; ++i) {
      const Floats w0 = wanted(i), w1 = wanted(part + i), w2 = wanted(half + i), w3 = wanted(half + part + i);
      const Floats sum = at(r0, i), difference = at(r1, i);
      const Floats a = w0 - w2 + (w0 + w2 - (sum + difference) * share) * ratio[i];
      const Floats b = w1 - w3 + (w1 + w3 - (sum - difference) * share) * ratio[part + i];
      store(next + i * WIDTH, a + b);
      store(later + i * WIDTH, a - b);
    }
    child(2);
    for (int64_t i = 0; i < part; ++i) {
      store(next + i * WIDTH, at(later, i) + (at(next, i) - at(r2, i) * twice) * second[i]);
    }
    child(3);
    for (int64_t i = 0; i < part; ++i) {
      const Floats a = at(r0, i), b = at(r1, i), c = at(r2, i), d = at(r3, i);
      const Floats s = a + b, t = a - b, u = c + d, v = c - d;
      reach(0, i, s + u);
      reach(1, part + i, t + v);
      reach(2, half + i, s - u);
      reach(3, half + part + i, t - v);
    }
  }

  uint16_t gain(int64_t token) const {
    const auto [error, cross, norm, radius] = kept_[token];
    const float power = power_[token], inner = cross + norm;
    if (!(inner > 0)) return 0;
    float gain = inner / std::max(norm, TINY);
    if (inner * gain >= LEAST_COSINE * LEAST_COSINE * power) {
      gain = layout_.key ? power / std::max(inner, TINY) : std::sqrt(power / std::max(norm, TINY));
    }
    return to_half(std::min(gain * radius, GAIN_MAX));
  }

  const Layout& layout_;
  const Codebook& book_;
  const Round round_;
  const int64_t size_, stride_, order_, leaf_, tokens_;
  Parameters parameters_{};
  float *rows_, *price_, *ratios_;                    // rows of channels
  float* channels_;                                   // [head_dim][tokens], of tokens that are balanced
  float *reached_, *wanted_, *spare_;            // [channels][WIDTH]
  uint8_t* attempts_;                                 // codes, the same
  float power_[WIDTH], spread_[WIDTH];                // of tokens; what radii are in units of
  float radius_[WIDTH], errors_[WIDTH], cross_[WIDTH], norm_[WIDTH];  // of attempts
  Kept kept_[WIDTH];                                  // of tokens
};

}  // namespace decoquant
