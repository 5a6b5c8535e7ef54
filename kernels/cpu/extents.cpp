// Where the rows of a mask admit tokens: a prompt attends to itself in blocks, without the columns that no row admits.

#include "python.hpp"
#include "simd.hpp"

namespace decoquant {
namespace {

struct Extents {
  Array mask;  // truth values [batch, heads, queries, tokens]
  Sizes size;
  int64_t* out;  // [batch, heads, queries, 2], begin and end of each row; tokens and 0 where it admits nothing
};

enum Status : int64_t {
  BROKEN,  // some row leaves out a token between its first and its last one
  UNBROKEN,
};

// The first column from `at` on whose truth is not `value`, or `end`.
int64_t skip(const uint8_t* row, int64_t at, int64_t end, bool value) {
  const uint64_t run = value ? 0x0101010101010101u : 0;
  while (at + 8 <= end && load<uint64_t>(row + at) == run) at += 8;
  while (at < end && (row[at] != 0) == value) ++at;
  return at;
}

Status extents(const Extents& call) {
  const Array& mask = call.mask;
  const int64_t tokens = call.size[3];
  Status status = UNBROKEN;
  int64_t* out = call.out;
  for (int64_t i = 0; i < call.size[0]; ++i) {
    for (int64_t j = 0; j < call.size[1]; ++j) {
      for (int64_t k = 0; k < call.size[2]; ++k, out += 2) {
        const auto* row = static_cast<const uint8_t*>(mask.data) + i * mask.stride[0] + j * mask.stride[1] + k * mask.stride[2];
        const int64_t begin = skip(row, 0, tokens, false);
        int64_t end = skip(row, begin, tokens, true);
        for (int64_t next = end; (next = skip(row, next, tokens, false)) < tokens;) {
          next = end = skip(row, next, tokens, true);
          status = BROKEN;
        }
        out[0] = begin;
        out[1] = begin < tokens ? end : 0;
      }
    }
  }
  return status;
}

bool read(Arguments& from, Extents& call) {
  call.mask = from.optional_mask(call.size);
  from.expect(call.size.given && call.mask.dtype == BOOL && (call.mask.stride[3] == 1 || call.size[3] < 2));
  call.out = from.integers({call.size[0], call.size[1], call.size[2], 2});
  return from.good();
}

}  // namespace

// A function of Python, called with a mask and the tensor that takes its extents. Returns a `Status` or `REFUSED`.
extern "C" PyObject* decoquant_extents(PyObject* view, PyObject* const* arguments, int64_t) {
  return answer<Extents, Status>(view, arguments, read, extents);
}

}  // namespace decoquant
