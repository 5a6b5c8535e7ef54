// Scores of packed keys, for every width and group.

#include "blocks.hpp"

namespace decoquant {

Scores scores_for(int group, int64_t bits) {
  return for_group(group, [&](auto rows) {
    return for_bits(bits, [&](auto width) -> Scores { return scores_of<width(), rows()>; });
  });
}

}  // namespace decoquant
