// Weighted sums of packed values, for every width and group.

#include "blocks.hpp"

namespace decoquant {

Mix mix_for(int group, int64_t bits) {
  return for_group(group, [&](auto rows) {
    return for_bits(bits, [&](auto width) -> Mix { return mix_of<width(), rows()>; });
  });
}

}  // namespace decoquant
