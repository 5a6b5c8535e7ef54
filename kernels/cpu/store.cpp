// Writes of tokens into a state: `store` of kernels/reference.py, which defines the result.
//
// Rows of the batch are independent of each other. A row is written in steps: which tokens stay, does a sequence begin,
// what is each token like, statistics, where exact copies go, fits, codes and copies. Nothing takes time in proportion
// to the slots unless a fit is due.

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

#include "encode.hpp"
#include "parallel.hpp"
#include "python.hpp"

namespace decoquant {
namespace {

constexpr float MASKED = -9000.0f;     // additive masks at most this large exclude a token from the statistics
constexpr int64_t BLOCK = 64;          // tokens of a partial sum of the statistics
constexpr int64_t TASK_TOKENS = 256;   // tokens of a task, where tokens are divided
constexpr int64_t SERIAL = 1 << 14;    // channels of a write that a second thread does not make faster
constexpr int64_t MASK_COLUMNS = 512;  // columns of a mask that are searched at once

}  // namespace

// Arguments of `store` in kernels/reference.py.
struct Store {
  const Layout* layout;
  void* state;
  Array fresh;  // [batch, heads, tokens, head_dim]
  int64_t tokens;
  const int64_t* positions;  // [tokens]
  Array query;               // [batch, query_heads, tokens, head_dim], null data: none
  int64_t query_heads;
  Array mask;  // [batch, mask_heads, mask_queries, mask_length], null data: none; stride 0 where broadcast
  int64_t mask_heads, mask_queries, mask_length;
  const uint8_t* rows;  // [batch, tokens], or null
  int64_t shift, first;
  void* gomp_parallel;
  int64_t threads;
};

namespace {

// A call and what all its rows share.
struct Write : Store {
  int64_t origin;  // after the shift
  Codebook book;
};

// --------------------------------------------------------------------------------------------------------------- mask

template <class T, class Admits>
void admit(const T* mask, int64_t stride, int64_t count, uint8_t* admitted, Admits admits) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) admitted[i] |= admits(mask[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) admitted[i] |= admits(mask[i * stride]);
  }
}

// admitted[column - begin] for columns [begin, end): whether some head and some query of the row admit it.
void find_admitted(const Write& write, int64_t row, int64_t begin, int64_t end, uint8_t* admitted) {
  const Array& mask = write.mask;
  std::fill(admitted, admitted + (end - begin), uint8_t{0});
  const int64_t heads = mask.stride[1] == 0 ? std::min<int64_t>(1, write.mask_heads) : write.mask_heads;
  const int64_t queries = mask.stride[2] == 0 ? std::min<int64_t>(1, write.mask_queries) : write.mask_queries;
  int64_t low = begin, high = end;  // what is not admitted yet lies in here
  const auto scan = [&](int64_t head, int64_t query) {
    const int64_t offset =
        row * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2] + low * mask.stride[3];
    uint8_t* to = admitted + (low - begin);
    if (mask.dtype == BOOL) {
      admit(static_cast<const uint8_t*>(mask.data) + offset, mask.stride[3], high - low, to,
            [](uint8_t x) -> uint8_t { return x != 0; });
    } else if (mask.dtype == FLOAT32) {
      admit(static_cast<const float*>(mask.data) + offset, mask.stride[3], high - low, to,
            [](float x) -> uint8_t { return x > MASKED; });
    } else {
      // Of a sign and a magnitude: the integers of negative numbers grow as the numbers fall.
      const uint16_t masked = mask.dtype == BFLOAT16 ? 0xc60d : 0xf065;  // at most MASKED; nan compares false
      const uint16_t infinite = mask.dtype == BFLOAT16 ? 0x7f80 : 0x7c00;
      admit(static_cast<const uint16_t*>(mask.data) + offset, mask.stride[3], high - low, to,
            [=](uint16_t x) -> uint8_t { return x < masked && (x & 0x7fff) <= infinite; });
    }
    while (low < high && admitted[low - begin]) ++low;
    while (low < high && admitted[high - 1 - begin]) --high;
  };
  // The last query of a causal mask admits the most. A sliding window leaves the columns before to queries far away:
  // halving the distances finds all of them early.
  int64_t top = 1;
  while (top < queries) top *= 2;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t step = top; step > 0; step /= 2) {
      for (int64_t back = step == top ? 0 : step; back < queries; back += step == top ? queries : 2 * step) {
        if (low == high) return;
        scan(head, queries - 1 - back);
      }
    }
  }
}

// The first admitted column from `begin` on, or UNSET.
int64_t first_admitted(const Write& write, int64_t row, int64_t begin) {
  uint8_t admitted[MASK_COLUMNS];
  for (; begin < write.mask_length; begin += MASK_COLUMNS) {
    const int64_t end = std::min(begin + MASK_COLUMNS, write.mask_length);
    find_admitted(write, row, begin, end, admitted);
    const auto* found = std::find(admitted, admitted + (end - begin), uint8_t{1});
    if (found != admitted + (end - begin)) return begin + (found - admitted);
  }
  return UNSET;
}

// --------------------------------------------------------------------------------------------------------------- codes

uint16_t* weights_of_head(const Layout& layout, void* state, int64_t row, int64_t head) {
  if (!layout.key) return nullptr;
  return at<uint16_t>(state, layout.weights) + (row * layout.heads + head) * layout.head_dim;
}

// Writes codes and gains of one head, with one parameter set. Tokens wait until there are enough to be encoded at once:
// each slot is put once, and `finish` comes last. Holds the scratch rows and codes of the thread.
class HeadWriter {
 public:
  HeadWriter(const Write& write, int64_t row, int64_t head, int64_t set)
      : layout_(*write.layout),
        gains_(at<uint16_t>(write.state, layout_.gains) + (row * layout_.heads + head) * layout_.capacity),
        planes_(layout_, write.state, row, head),
        encoder_(layout_, write.book, write.state, row, head, set, weights_of_head(layout_, write.state, row, head)),
        codes_(scratch_codes(layout_, encoder_.tokens())) {}

  // Room for the next token.
  float* token() const { return encoder_.token(waiting_); }

  // Writes it, which is finite and gets lost: encoded, or as written but not encoded.
  void put(int64_t slot, bool encoded) {
    if (!magnitudes(token(), layout_.head_dim, LIMIT).nonzero) {
      gains_[slot] = NEVER_WRITTEN;
    } else if (!encoded) {
      gains_[slot] = 0;
    } else {
      slots_[waiting_++] = slot;
      if (waiting_ == encoder_.tokens()) finish();
    }
  }

  void finish() {
    if (waiting_ == 0) return;
    uint16_t gains[WIDTH];
    encoder_.encode(waiting_, codes_, gains);
    for (int64_t i = 0; i < waiting_; ++i) {
      write_codes(layout_, planes_, slots_[i], codes_ + i * layout_.padded_dim);
      gains_[slots_[i]] = gains[i];
    }
    waiting_ = 0;
  }

 private:
  const Layout& layout_;
  uint16_t* gains_;
  HeadPlanes planes_;
  Encoder encoder_;
  uint8_t* codes_;
  int64_t slots_[WIDTH], waiting_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------- row

enum Flag : uint8_t {
  KEPT = 1,       // stored; the flags below are for kept tokens only
  PADDING = 2,    // before the start of the sequence
  NONZERO = 4,    // in some head; exact zeros are stored as never written
  COUNTED = 8,    // enters the statistics
  QUERIED = 16,   // and so do its queries; set only where not all do
  WINDOWED = 32,  // goes to the window
  SINK = 64,      // goes to the sinks
};

// Memory of a thread that every row it writes uses again.
struct Memory {
  std::vector<uint8_t> flags;     // [tokens]
  std::vector<int32_t> owner;     // [range], the token that is kept at a position
  std::vector<uint8_t> admitted;  // [range]
  std::vector<uint8_t> taken;     // [window] or [sets]
  std::vector<float> values;      // [heads][head_dim], up to two of them
  std::vector<int64_t> pending;
  std::vector<int64_t> cuts;
};

class RowWrite {
 public:
  RowWrite(const Write& write, int64_t row, int64_t threads, Memory& memory)
      : write_(write),
        layout_(*write.layout),
        row_(row),
        threads_(write.tokens * layout_.heads * layout_.head_dim < SERIAL ? 1 : threads),
        memory_(memory),
        fields_(at<int64_t>(write.state, layout_.rows) + row * ROW_FIELDS) {}

  void run() {
    choose_tokens();
    if (layout_.bits == 16) {
      put_raw();
      return;
    }
    begin_sequence();
    describe();
    accumulate();
    place_copies();
    const bool first = needs_first_fit();
    refit(first);
    if (first) put_pending();
    fit_padding();
    put();
    label();
  }

 private:
  // ----------------------------------------------------------------------------------------------- sections of the row

  uint16_t* gains(int64_t head) const {
    return at<uint16_t>(write_.state, layout_.gains) + (row_ * layout_.heads + head) * layout_.capacity;
  }
  uint8_t* epochs() const { return at<uint8_t>(write_.state, layout_.epochs) + row_ * layout_.capacity; }
  float* channels(int64_t section, int64_t head) const {
    return at<float>(write_.state, section) + (row_ * layout_.heads + head) * layout_.head_dim;
  }
  int64_t* window_labels() const {
    return at<int64_t>(write_.state, layout_.window_positions) + row_ * layout_.window;
  }
  int64_t* sink_labels() const { return at<int64_t>(write_.state, layout_.sink_positions) + row_ * layout_.sinks; }
  char* window_token(int64_t head, int64_t index) const {
    const int64_t token = (row_ * layout_.heads + head) * layout_.window + index;
    return at<char>(write_.state, layout_.window_tokens_at) + token * layout_.head_dim * item_size(layout_.dtype);
  }
  char* sink_token(int64_t head, int64_t index) const {
    const int64_t token = (row_ * layout_.heads + head) * layout_.sinks + index;
    return at<char>(write_.state, layout_.sink_tokens_at) + token * layout_.head_dim * item_size(layout_.dtype);
  }
  // Exact copies by one number, the window before the sinks.
  int64_t copies() const { return layout_.window + layout_.sinks; }
  int64_t copy_label(int64_t copy) const {
    return copy < layout_.window ? window_labels()[copy] : sink_labels()[copy - layout_.window];
  }
  const char* copy_token(int64_t head, int64_t copy) const {
    return copy < layout_.window ? window_token(head, copy) : sink_token(head, copy - layout_.window);
  }

  int64_t absolute(int64_t token) const { return write_.origin + write_.positions[token]; }
  int64_t slot(int64_t token) const { return absolute(token) % layout_.slots; }
  bool is(int64_t token, int flags) const { return (memory_.flags[token] & flags) == flags; }
  int64_t count(Flag flag) const {
    int64_t total = 0;
    for (const uint8_t flags : memory_.flags) total += (flags & flag) != 0;
    return total;
  }
  bool written(int64_t slot) const {
    for (int64_t head = 0; head < layout_.heads; ++head) {
      if (is_written(gains(head)[slot])) return true;
    }
    return false;
  }
  // Whether this write replaces the token at an absolute position.
  bool replaces(int64_t position) const {
    const int64_t i = position - write_.origin - lowest_;
    return position >= write_.origin && i >= 0 && i < range_ && memory_.owner[i] >= 0;
  }

  // A token of the write as the cache's dtype holds it.
  void load_token(int64_t token, int64_t head, float* x) const {
    const Array& fresh = write_.fresh;
    load_row(fresh.dtype, row_of(fresh, row_, head, token), fresh.stride[3], layout_.head_dim, x);
    if (fresh.dtype != layout_.dtype) round_row(layout_.dtype, layout_.head_dim, x);
  }

  template <class Body>
  void parallel_over(int64_t tasks, const Body& body) const {
    parallel(write_.gomp_parallel, threads_, tasks, body);
  }

  // ------------------------------------------------------------------------------------------------------------- steps

  // Which tokens are stored: the last writer of each position, unless negative or left out.
  void choose_tokens() {
    auto& flags = memory_.flags;
    flags.assign(write_.tokens, 0);
    lowest_ = std::numeric_limits<int64_t>::max();
    int64_t highest = UNSET;
    for (int64_t token = 0; token < write_.tokens; ++token) {
      const int64_t position = write_.positions[token];
      if (position < 0 || (write_.rows != nullptr && !write_.rows[row_ * write_.tokens + token])) continue;
      flags[token] = KEPT;
      ascending_ = ascending_ && position > highest;
      lowest_ = std::min(lowest_, position);
      highest = std::max(highest, position);
    }
    range_ = highest < 0 ? 0 : highest - lowest_ + 1;
    if (range_ == 0) lowest_ = 0;
    memory_.owner.assign(range_, -1);
    for (int64_t token = 0; token < write_.tokens; ++token) {
      if (!flags[token]) continue;
      int32_t& owner = memory_.owner[write_.positions[token] - lowest_];
      if (owner >= 0) flags[owner] = 0;
      owner = static_cast<int32_t>(token);
    }
  }

  void put_raw() const {
    const int64_t item = item_size(layout_.dtype), bytes = layout_.head_dim * item;
    const Array& fresh = write_.fresh;
    parallel_over(layout_.heads, [&](int64_t head) {
      char* raw = at<char>(write_.state, layout_.raw) + (row_ * layout_.heads + head) * layout_.slots * bytes;
      float* x = scratch_rows(1, layout_.head_dim);
      for (int64_t token = 0; token < write_.tokens; ++token) {
        if (!is(token, KEPT)) continue;
        char* to = raw + slot(token) * bytes;
        if (fresh.dtype != layout_.dtype) {
          load_token(token, head, x);
          store_row(layout_.dtype, x, layout_.head_dim, to);
          continue;
        }
        const auto* from = static_cast<const char*>(row_of(fresh, row_, head, token));
        if (fresh.stride[3] == 1) {
          memcpy(to, from, bytes);
        } else {
          for (int64_t c = 0; c < layout_.head_dim; ++c) memcpy(to + c * item, from + c * fresh.stride[3] * item, item);
        }
      }
    });
  }

  // A write that includes slot 0, or the first one ever, begins a new sequence.
  void begin_sequence() {
    if (range_ == 0) return;
    if (fields_[START] >= 0 && (write_.shift != 0 || lowest_ != 0)) return;
    fields_[START] = write_.origin + lowest_;
    if (write_.mask.data != nullptr) {
      const int64_t column = first_admitted(write_, row_, std::max<int64_t>(0, -write_.first));
      if (column >= 0) fields_[START] = write_.origin + write_.first + column;
    }
    fields_[TOTAL] = 0;
    fields_[FITTED] = UNSET;
    fields_[COUNT] = 0;
    const int64_t count = layout_.heads * layout_.head_dim;
    std::fill_n(channels(layout_.average, 0), count, 0.0f);
    std::fill_n(channels(layout_.deviation, 0), count, 0.0f);
    if (layout_.key) std::fill_n(channels(layout_.energy, 0), count, 0.0f);
  }

  // Fills in the flags up to COUNTED.
  void describe() {
    if (range_ == 0) return;
    // What the mask admits matters only where tokens could be counted.
    const int64_t begin = std::max(lowest_, fields_[START] + layout_.sink_tokens - write_.origin);
    const int64_t from = std::max(begin, write_.first);
    const int64_t to = std::min(lowest_ + range_, write_.first + write_.mask_length);
    const bool masked = write_.mask.data != nullptr && from < to;
    if (masked) {
      memory_.admitted.resize(to - from);
      find_admitted(write_, row_, from - write_.first, to - write_.first, memory_.admitted.data());
    }
    parallel_over((write_.tokens + BLOCK - 1) / BLOCK, [&](int64_t block) {
      const int64_t first = block * BLOCK, last = std::min(write_.tokens, first + BLOCK);
      for (int64_t token = first; token < last; ++token) {
        if (!is(token, KEPT)) continue;
        const int64_t position = write_.positions[token];
        if (absolute(token) < fields_[START]) memory_.flags[token] |= PADDING;
        const bool hidden = masked && position >= from && position < to && !memory_.admitted[position - from];
        if (position >= begin && !hidden) memory_.flags[token] |= COUNTED;
      }
      look_at_tokens(first, last);
    });
  }

  // Sets NONZERO, and takes COUNTED from tokens that are zero or have a channel that is no ordinary number. Heads come
  // one after the other: their distance in memory is often a power of two, which caches do not like.
  void look_at_tokens(int64_t first, int64_t last) {
    const float limit = std::min(LIMIT, largest_of(layout_.dtype));
    float* x = scratch_rows(1, layout_.head_dim);
    for (int64_t head = 0; head < layout_.heads; ++head) {
      for (int64_t token = first; token < last; ++token) {
        uint8_t& flags = memory_.flags[token];
        if (!(flags & KEPT)) continue;
        load_token(token, head, x);
        const Magnitudes found = magnitudes(x, layout_.head_dim, limit);
        if (found.nonzero) flags |= NONZERO;
        if (!found.within) flags &= ~COUNTED;
      }
    }
    for (int64_t token = first; token < last; ++token) {
      if (!is(token, NONZERO)) memory_.flags[token] &= ~COUNTED;
    }
  }

  // Adds the counted tokens to the running statistics (Chan, Golub and LeVeque's pairwise update).
  void accumulate() {
    const int64_t counted = count(COUNTED);
    if (counted == 0) return;
    const auto seen = static_cast<float>(fields_[COUNT]);
    parallel_over(layout_.heads, [&](int64_t head) { accumulate_tokens(head, seen); });
    fields_[TOTAL] += counted;
    fields_[COUNT] += counted;
    if (!layout_.key || write_.query.data == nullptr) return;

    // Queries count where all of a token's are ordinary numbers. That is so if no sum shows the square of another.
    const int64_t size = layout_.heads * layout_.head_dim;
    auto& sums = memory_.values;
    sums.resize(size);
    sum_queries(COUNTED);
    if (!std::all_of(sums.begin(), sums.end(), [](float sum) { return sum < LIMIT * LIMIT; })) {
      look_at_queries();
      sum_queries(QUERIED);
    }
    float* energy = channels(layout_.energy, 0);
    for (int64_t c = 0; c < size; ++c) energy[c] += sums[c];
  }

  void accumulate_tokens(int64_t head, float seen) const {
    const int64_t size = layout_.head_dim, stride = whole_registers(size);
    float* memory = scratch_rows(BLOCK + 2, size);
    float *mean = memory, *deviation = memory + stride, *tokens = memory + 2 * stride;
    float *average = channels(layout_.average, head), *spread = channels(layout_.deviation, head);
    for (int64_t token = 0; token < write_.tokens;) {
      int64_t count = 0;
      for (; token < write_.tokens && count < BLOCK; ++token) {
        if (is(token, COUNTED)) load_token(token, head, tokens + count++ * stride);
      }
      if (count == 0) break;
      const auto added = static_cast<float>(count);
      std::fill_n(mean, stride, 0.0f);
      std::fill_n(deviation, stride, 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < stride; ++c) mean[c] += tokens[i * stride + c];
      }
      for (int64_t c = 0; c < stride; ++c) mean[c] /= added;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < stride; ++c) {
          const float distance = tokens[i * stride + c] - mean[c];
          deviation[c] += distance * distance;
        }
      }
      const float total = seen + added;
      for (int64_t c = 0; c < size; ++c) {
        const float shift = mean[c] - average[c];
        average[c] += shift * added / total;
        spread[c] += deviation[c] + shift * shift * (seen * added) / total;
      }
      seen = total;
    }
  }

  // Sums the squared queries of tokens with `flag`, per KV head, into `values`.
  void sum_queries(Flag flag) {
    const int64_t size = layout_.head_dim, groups = write_.query_heads / layout_.heads;
    const Array& query = write_.query;
    parallel_over(layout_.heads, [&](int64_t head) {
      float *sums = scratch_rows(2, size), *block_sums = sums + whole_registers(size);
      std::fill_n(sums, whole_registers(size), 0.0f);
      for (int64_t begin = 0; begin < write_.tokens; begin += BLOCK) {
        const int64_t end = std::min(write_.tokens, begin + BLOCK);
        std::fill_n(block_sums, whole_registers(size), 0.0f);
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t token = begin; token < end; ++token) {
            if (!is(token, flag)) continue;
            const void* from = row_of(query, row_, head * groups + group, token);
            each_register(query.dtype, from, query.stride[3], size, [block_sums](int64_t c, Floats x) {
              store(block_sums + c, load<Floats>(block_sums + c) + x * x);
            });
          }
        }
        for (int64_t c = 0; c < size; ++c) sums[c] += block_sums[c];
      }
      std::copy_n(sums, size, memory_.values.data() + head * size);
    });
  }

  // Sets QUERIED where all queries of a counted token are ordinary numbers.
  void look_at_queries() {
    const Array& query = write_.query;
    float* x = scratch_rows(1, layout_.head_dim);
    for (int64_t token = 0; token < write_.tokens; ++token) {
      bool within = is(token, COUNTED);
      for (int64_t head = 0; within && head < write_.query_heads; ++head) {
        load_row(query.dtype, row_of(query, row_, head, token), query.stride[3], layout_.head_dim, x);
        within = magnitudes(x, layout_.head_dim, LIMIT).within;
      }
      if (within) memory_.flags[token] |= QUERIED;
    }
  }

  // Where exact copies go: nonzero tokens to the window, where the last writer stays, and the first ones to the sinks.
  void place_copies() {
    auto& taken = memory_.taken;
    taken.assign(layout_.window, 0);
    int64_t left = layout_.window;
    for (int64_t token = write_.tokens - 1; token >= 0; --token) {
      if (!is(token, KEPT | NONZERO)) continue;
      if (left > 0 && !taken[absolute(token) % layout_.window]) {
        taken[absolute(token) % layout_.window] = 1;
        memory_.flags[token] |= WINDOWED;
        --left;
      }
      const int64_t sink = absolute(token) - fields_[START];
      if (sink >= 0 && sink < layout_.sinks) memory_.flags[token] |= SINK;
    }
  }

  // Whether a token would be left with neither a code nor a copy. If so, `pending` becomes the copies without a code.
  bool needs_first_fit() {
    memory_.pending.clear();
    if (fields_[FITTED] >= 0 || range_ == 0) return false;
    const auto pending = [this](int64_t copy) {
      const int64_t label = copy_label(copy);
      if (label < write_.origin || replaces(label)) return false;
      const int64_t slot = label % layout_.slots;
      return epochs()[slot] == NO_EPOCH && written(slot);
    };
    // What leaves the window may still be a sink. Sinks lose their place only when a sequence begins elsewhere, which
    // is rare: they count as lost even if they are in the window as well.
    const auto stays = [this](int64_t label) {
      for (int64_t sink = 0; sink < layout_.sinks; ++sink) {
        if (sink_labels()[sink] == label && !receives(sink)) return true;
      }
      return false;
    };
    bool needed = false;
    for (int64_t token = 0; token < write_.tokens && !needed; ++token) {
      if (!is(token, KEPT | NONZERO)) continue;
      if (is(token, WINDOWED)) {
        const int64_t copy = absolute(token) % layout_.window;
        needed = pending(copy) && !stays(copy_label(copy));
      }
      if (is(token, SINK)) needed = needed || pending(layout_.window + absolute(token) - fields_[START]);
      if (!(memory_.flags[token] & (PADDING | WINDOWED | SINK))) needed = true;
    }
    if (needed) {
      for (int64_t copy = 0; copy < copies(); ++copy) {
        if (pending(copy)) memory_.pending.push_back(copy);
      }
    }
    return needed;
  }

  // Whether this write puts a token into a sink.
  bool receives(int64_t sink) const {
    const int64_t position = fields_[START] + sink;
    return replaces(position) && is(memory_.owner[position - write_.origin - lowest_], SINK);
  }

  // Fits if the row has no parameters and needs them, or if its tokens have grown enough since the last fit.
  void refit(bool first) {
    const int64_t total = fields_[TOTAL], fitted = fields_[FITTED];
    if (!first && (fitted < 0 || total < std::max(1.0, REFIT_GROWTH * static_cast<double>(fitted)))) return;
    const auto count = static_cast<float>(std::max<int64_t>(1, fields_[COUNT]));
    const int64_t size = layout_.heads * layout_.head_dim;
    memory_.values.resize(size);
    float *average = channels(layout_.average, 0), *deviation = channels(layout_.deviation, 0);
    for (int64_t c = 0; c < size; ++c) memory_.values[c] = deviation[c] / count;
    const float* energy = layout_.key ? channels(layout_.energy, 0) : nullptr;
    if (!adopt(average, memory_.values.data(), energy)) {
      if (first) fields_[FITTED] = 0;
      return;
    }
    fields_[FITTED] = total;
    // What follows may be of another kind: the past counts half as much with each fit.
    fields_[COUNT] -= fields_[COUNT] / 2;
    for (int64_t c = 0; c < size; ++c) deviation[c] *= 0.5f;
    if (layout_.key) {
      for (int64_t c = 0; c < size; ++c) channels(layout_.energy, 0)[c] *= 0.5f;
    }
  }

  // Fits into a free set and makes it the row's own; statistics are [heads][head_dim], the energy may be null. A set is
  // free if no token names it, those about to be overwritten aside. Without one the row keeps the set it has: what it
  // writes is encoded less well, not wrongly.
  bool adopt(const float* mean, const float* variance, const float* energy) {
    const int64_t set = free_set();
    if (set == layout_.sets) return false;
    const int64_t size = layout_.head_dim;
    float* memory = scratch_rows(2, size);
    for (int64_t head = 0; head < layout_.heads; ++head) {
      const int64_t offset = set_offset(layout_, row_, set, head), c = head * size;
      uint16_t* means = layout_.key ? at<uint16_t>(write_.state, layout_.means) + offset : nullptr;
      uint16_t* scales = at<uint16_t>(write_.state, layout_.scales) + offset;
      uint16_t* weights = weights_of_head(layout_, write_.state, row_, head);
      if (energy != nullptr) {
        weights_of(energy + c, size, weights);
      } else if (weights != nullptr) {
        std::fill_n(weights, size, uint16_t{0x3f80});  // 1
      }
      fit(layout_, mean + c, variance + c, weights, means, scales, memory);
    }
    fields_[SET] = set;
    return true;
  }

  int64_t free_set() {
    auto& used = memory_.taken;
    used.assign(layout_.sets, 0);
    const uint8_t* epoch = epochs();
    int64_t position = (layout_.slots - write_.origin % layout_.slots) % layout_.slots;  // of index 0, from the origin
    for (int64_t slot = 0; slot < layout_.slots; ++slot) {
      const bool open = epoch[slot] < layout_.sets && !used[epoch[slot]];
      if (open && written(slot) && !replaces(write_.origin + position)) used[epoch[slot]] = 1;
      if (++position == layout_.slots) position = 0;
    }
    return std::find(used.begin(), used.end(), uint8_t{0}) - used.begin();
  }

  // Gives a row that writes padding before its first fit a set fitted on that padding alone. So padding takes neither
  // copies nor statistics from the sequence, and can still be read.
  void fit_padding() {
    if (fields_[SET] >= 0) return;
    const auto tokens = static_cast<float>(count(PADDING));
    if (tokens == 0) return;
    const int64_t size = layout_.head_dim, all = layout_.heads * size;
    memory_.values.assign(2 * all, 0.0f);
    float *mean = memory_.values.data(), *power = mean + all;
    parallel_over(layout_.heads, [&](int64_t head) {
      float *x = scratch_rows(1, size), *sums = mean + head * size, *squares = power + head * size;
      for (int64_t token = 0; token < write_.tokens; ++token) {
        if (!is(token, PADDING)) continue;
        load_token(token, head, x);
        make_finite(layout_.dtype, size, x);
        for (int64_t c = 0; c < size; ++c) {
          const float share = std::min(std::max(x[c], -LIMIT), LIMIT) / tokens;
          sums[c] += share;
          squares[c] += share * share * tokens;
        }
      }
    });
    for (int64_t c = 0; c < all; ++c) power[c] = std::max(power[c] - mean[c] * mean[c], 0.0f);
    adopt(mean, power, nullptr);
  }

  int64_t set() const { return std::max<int64_t>(0, fields_[SET]); }

  // Encodes copies that have no code yet.
  void put_pending() {
    parallel_over(layout_.heads, [&](int64_t head) {
      HeadWriter writer(write_, row_, head, set());
      for (const int64_t copy : memory_.pending) {
        load_row(layout_.dtype, copy_token(head, copy), 1, layout_.head_dim, writer.token());
        writer.put(copy_label(copy) % layout_.slots, true);
      }
      writer.finish();
    });
    for (const int64_t copy : memory_.pending) {
      epochs()[copy_label(copy) % layout_.slots] = static_cast<uint8_t>(set());
    }
  }

  // Writes tokens to their slots and exact copies to theirs.
  void put() {
    divide();
    const int64_t parts = static_cast<int64_t>(memory_.cuts.size()) - 1;
    parallel_over(layout_.heads * parts, [&](int64_t task) {
      const int64_t head = task / parts, part = task % parts;
      HeadWriter writer(write_, row_, head, set());
      for (int64_t token = memory_.cuts[part]; token < memory_.cuts[part + 1]; ++token) {
        if (!is(token, KEPT)) continue;
        float* x = writer.token();
        load_token(token, head, x);
        make_finite(layout_.dtype, layout_.head_dim, x);
        if (is(token, WINDOWED)) {
          store_row(layout_.dtype, x, layout_.head_dim, window_token(head, absolute(token) % layout_.window));
        }
        if (is(token, SINK)) {
          store_row(layout_.dtype, x, layout_.head_dim, sink_token(head, absolute(token) - fields_[START]));
        }
        writer.put(slot(token), encoded(token));
      }
      writer.finish();
    });
  }

  bool encoded(int64_t token) const { return fields_[FITTED] >= 0 || is(token, PADDING); }

  // Cuts the tokens into runs that write to different tiles, so that threads share no byte.
  void divide() {
    auto& cuts = memory_.cuts;
    cuts.assign(1, 0);
    const auto tile = [this](int64_t token) { return slot(token) / TILE; };
    if (threads_ > 1 && ascending_ && range_ == write_.tokens && tile(0) != tile(write_.tokens - 1)) {
      for (int64_t token = TASK_TOKENS; token < write_.tokens; ++token) {
        if (token - cuts.back() >= TASK_TOKENS && tile(token) != tile(token - 1)) cuts.push_back(token);
      }
    }
    cuts.push_back(write_.tokens);
  }

  // Says where each token is: its set, and the positions of the copies.
  void label() {
    int64_t *window = window_labels(), *sinks = sink_labels();
    for (int64_t i = 0; i < layout_.window; ++i) {
      if (replaces(window[i])) window[i] = UNSET;
    }
    for (int64_t i = 0; i < layout_.sinks; ++i) {
      if (replaces(sinks[i])) sinks[i] = UNSET;
    }
    for (int64_t token = 0; token < write_.tokens; ++token) {
      if (!is(token, KEPT)) continue;
      epochs()[slot(token)] = encoded(token) ? static_cast<uint8_t>(set()) : NO_EPOCH;
      if (is(token, WINDOWED)) window[absolute(token) % layout_.window] = absolute(token);
      if (is(token, SINK)) sinks[absolute(token) - fields_[START]] = absolute(token);
    }
  }

  const Write& write_;
  const Layout& layout_;
  const int64_t row_;
  const int64_t threads_;
  Memory& memory_;
  int64_t* const fields_;             // START, SET, ...
  int64_t lowest_ = 0, range_ = 0;    // of the positions of kept tokens
  bool ascending_ = true;             // positions of kept tokens
};

// ------------------------------------------------------------------------------------------------------------- entry

// Slots that leave the cache as it moves: never written.
void free_slots(const Write& write, int64_t begin, int64_t count) {
  const Layout& layout = *write.layout;
  const int64_t first = begin % layout.slots, before_end = std::min(count, layout.slots - first);
  for (int64_t head = 0; head < layout.batch * layout.heads; ++head) {
    if (layout.bits == 16) {
      const int64_t bytes = layout.head_dim * item_size(layout.dtype);
      char* raw = at<char>(write.state, layout.raw) + head * layout.slots * bytes;
      memset(raw + first * bytes, 0, before_end * bytes);
      memset(raw, 0, (count - before_end) * bytes);
    } else {
      uint16_t* gains = at<uint16_t>(write.state, layout.gains) + head * layout.capacity;
      std::fill_n(gains + first, before_end, NEVER_WRITTEN);
      std::fill_n(gains, count - before_end, NEVER_WRITTEN);
    }
  }
}

// Returns 0, or the highest position if the cache has no such slot; then nothing has changed.
int64_t store(const Store& call) {
  const Layout& layout = *call.layout;
  const int64_t highest = call.tokens > 0 ? *std::max_element(call.positions, call.positions + call.tokens) : UNSET;
  if (highest >= layout.slots) return highest;
  int64_t* header = at<int64_t>(call.state, layout.header);
  const Write write{call, header[ORIGIN] + call.shift, Codebook(layout)};
  if (call.shift > 0) {
    free_slots(write, header[ORIGIN], std::min(call.shift, layout.slots));
    header[ORIGIN] = write.origin;
  }
  if (highest < 0) return 0;
  header[END] = std::max(header[END], write.origin + highest + 1);

  const auto write_row = [&write](int64_t row, int64_t threads) {
    static thread_local Memory memory;
    RowWrite(write, row, threads, memory).run();
  };
  const int64_t channels = layout.batch * layout.heads * call.tokens * layout.head_dim;
  if (layout.batch >= call.threads && channels >= SERIAL) {
    parallel(call.gomp_parallel, call.threads, layout.batch, [&](int64_t row) { write_row(row, 1); });
  } else {
    for (int64_t row = 0; row < layout.batch; ++row) write_row(row, call.threads);
  }
  return 0;
}

// Reads `Store` field by field; counts are in the sizes. False: the kernels do not take a call as it is.
bool read(Arguments& from, Store& call) {
  Sizes fresh, query, mask;
  const Layout& layout = *(call.layout = &from.layout());
  call.state = from.state(layout);
  call.fresh = from.rows(fresh);
  call.tokens = fresh[2];
  call.positions = from.positions(call.tokens);
  call.query = from.optional_rows(query);
  call.query_heads = query[1];
  call.mask = from.optional_mask(mask);
  call.mask_heads = mask[1];
  call.mask_queries = mask[2];
  call.mask_length = mask[3];
  call.rows = from.optional_flags(layout.batch, call.tokens);
  call.shift = from.integer();
  call.first = from.integer();
  call.gomp_parallel = from.address();
  call.threads = from.integer();

  from.expect(fresh.are(layout.batch, layout.heads, call.tokens, layout.head_dim) && call.tokens > 0 && call.shift >= 0);
  if (query.given) {
    from.expect(query[1] % layout.heads == 0 && query.are(layout.batch, query[1], call.tokens, layout.head_dim));
  }
  if (mask.given) from.expect(mask[0] == 1 || mask[0] == layout.batch);
  return from.good();
}

}  // namespace

// A function of Python, called with the fields of `Store` (METH_FASTCALL). Returns what `store` does, or `REFUSED`.
extern "C" PyObject* decoquant_store(PyObject* view, PyObject* const* arguments, int64_t) {
  return answer<Store, int64_t>(view, arguments, read, store);
}

}  // namespace decoquant
