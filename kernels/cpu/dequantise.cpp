// The dense cache of a state: `dequantise` of kernels/reference.py, which defines the result.

#include <algorithm>

#include "codec.hpp"
#include "parallel.hpp"

namespace decoquant {
namespace {

constexpr int64_t TASK_SLOTS = 256;

class HeadReader {
 public:
  // `out` takes the slots [first, first + length) of every head.
  HeadReader(const Layout& layout, const void* state, int64_t row, int64_t head, int64_t first, int64_t length,
             void* out)
      : layout_(layout),
        state_(state),
        row_(row),
        head_(head),
        origin_(at<int64_t>(state, layout.header)[ORIGIN]),
        written_(std::min(layout.slots, at<int64_t>(state, layout.header)[END] - origin_)),
        bytes_(layout.head_dim * item_size(layout.dtype)),
        first_(first),
        out_(static_cast<char*>(out) + number() * length * bytes_) {}

  // Writes slots [begin, end) to the output.
  void read(const Codebook& book, int64_t begin, int64_t end) const {
    const int64_t count = std::max<int64_t>(0, std::min(end, written_) - begin);
    memset(place(begin + count), 0, (end - begin - count) * bytes_);
    if (layout_.bits == 16) {
      read_raw(begin, begin + count);
      return;
    }
    read_codes_of(book, begin, begin + count);
    copy(at<char>(state_, layout_.window_tokens_at), layout_.window_positions, layout_.window, begin, end);
    copy(at<char>(state_, layout_.sink_tokens_at), layout_.sink_positions, layout_.sinks, begin, end);
  }

 private:
  int64_t number() const { return row_ * layout_.heads + head_; }

  char* place(int64_t slot) const { return out_ + (slot - first_) * bytes_; }

  void read_raw(int64_t begin, int64_t end) const {
    const char* raw = at<char>(state_, layout_.raw) + number() * layout_.slots * bytes_;
    for (int64_t slot = begin; slot < end; ++slot) {
      memcpy(place(slot), raw + (origin_ + slot) % layout_.slots * bytes_, bytes_);
    }
  }

  void read_codes_of(const Codebook& book, int64_t begin, int64_t end) const {
    const int64_t size = layout_.head_dim;
    float* memory = scratch_rows(3, size);
    float* x = memory + 2 * whole_registers(size);
    uint8_t* codes = scratch_codes(layout_, 1);
    const HeadPlanes planes(layout_, const_cast<void*>(state_), row_, head_);
    const uint16_t* gains = at<uint16_t>(state_, layout_.gains) + number() * layout_.capacity;
    const uint8_t* epochs = at<uint8_t>(state_, layout_.epochs) + row_ * layout_.capacity;
    const Decode decode = decode_for(layout_);
    const float large = largest_of(layout_.dtype);
    Parameters parameters{};
    int64_t current = UNSET;
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t ring = (origin_ + slot) % layout_.slots;
      char* to = place(slot);
      if (!is_written(gains[ring])) {
        memset(to, 0, bytes_);
        continue;
      }
      const int64_t set = epochs[ring] == NO_EPOCH ? 0 : epochs[ring];
      if (set != current) parameters = load_parameters(layout_, state_, row_, set, head_, memory);
      current = set;
      read_codes(layout_, planes, ring, codes);
      decode(layout_, book, parameters, codes, gains[ring], x);
      for (int64_t c = 0; c < size; ++c) x[c] = std::min(std::max(x[c], -large), large);
      store_row(layout_.dtype, x, size, to);
    }
  }

  // Exact copies of tokens in [begin, end) take precedence over codes.
  void copy(const char* tokens, int64_t labels_at, int64_t count, int64_t begin, int64_t end) const {
    const int64_t* labels = at<int64_t>(state_, labels_at) + row_ * count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = labels[i] - origin_;
      if (labels[i] >= origin_ && slot >= begin && slot < end) {
        memcpy(place(slot), tokens + (number() * count + i) * bytes_, bytes_);
      }
    }
  }

  const Layout& layout_;
  const void* state_;
  const int64_t row_, head_;
  const int64_t origin_, written_, bytes_, first_;
  char* const out_;
};

}  // namespace

// Writes the slots [first, first + length) of the dense cache to `out`, [batch, heads, length, head_dim] in its dtype;
// zeros where the cache has no such slot.
extern "C" void decoquant_dequantise(const Layout* layout, const void* state, int64_t first, int64_t length, void* out,
                                     void* gomp_parallel, int64_t threads) {
  const Codebook book(*layout);
  const int64_t parts = (length + TASK_SLOTS - 1) / TASK_SLOTS;
  parallel(gomp_parallel, threads, layout->batch * layout->heads * parts, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    const HeadReader reader(*layout, state, head / layout->heads, head % layout->heads, first, length, out);
    reader.read(book, first + part * TASK_SLOTS, first + std::min(length, (part + 1) * TASK_SLOTS));
  });
}

}  // namespace decoquant
