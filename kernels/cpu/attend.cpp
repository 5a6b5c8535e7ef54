// Attention over packed caches: one pass with an online softmax, for one query or for a chunk of them.
//
// A task is a group of query rows of one KV head over a run of blocks. Per block: scores of the packed keys (folded
// query, so nothing is decoded to floats), exact scores in place of them where a token has an exact copy or is new,
// softcap, mask, softmax, weighted sum of the values likewise. Sums over values stay in the rotated basis until the
// parameter set changes. `kernels/reference.py` defines the result.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exact.hpp"
#include "parallel.hpp"
#include "python.hpp"
#include "rotation.hpp"
#include "rows.hpp"

namespace decoquant {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int SPLITS_PER_THREAD = 4;
constexpr int64_t SPANS_PER_SPLIT = 8;

}  // namespace

// Arguments of `attend` in kernels/reference.py.
struct Attend {
  const Layout *key_layout, *value_layout;
  const void *key_state, *value_state;
  Array query;  // [batch, query_heads, queries, head_dim], last dimension contiguous
  int64_t batch, query_heads, queries;  // the first `batch` sequences of the caches
  Array key, value;  // [batch, heads, tokens, ...], last dimension contiguous
  int64_t tokens;
  const int64_t* positions;  // [tokens]
  Array mask;                // [batch, query_heads, queries, length], null data: none; stride 0 where broadcast
  double scale, softcap;     // softcap 0: none
  int64_t first, length;
  const float* sink;         // [query_heads], logits beside those of the keys, without values; null: none
  // The new tokens may have been attended elsewhere: their result [batch, query_heads, queries, value_dim] and the
  // logarithms of their sums float32 [batch, query_heads, queries], a sink included; null: they are attended here.
  Array dense;
  const float* dense_sums;
  void* out;  // [batch, query_heads, queries, value_dim] contiguous, dtype of the query
  void* gomp_parallel;
  int64_t threads;
};

namespace {

// ------------------------------------------------------------------------------------------------------------- kernels

// The kernels of one group size.
struct Kernels {
  int group;
  Scores scores;
  Softmax softmax;
  Weigh weigh;
  Mix mix;
  ExactScores exact_scores[3];  // by dtype
  ExactMix exact_mix[3];
};

Kernels choose(int64_t rows, const Layout& key, const Layout& value) {
  int group = 1;
  for (const int size : GROUPS) {
    if (size > MAX_GROUP) break;
    group = size;
    if (size >= rows) break;
  }
  return for_group(group, [&](auto size) {
    constexpr int GROUP = size();
    return Kernels{group,
                   scores_for(group, key.bits),
                   softmax_of<GROUP>,
                   weigh_of<GROUP>,
                   mix_for(group, value.bits),
                   {exact_scores<Float32, GROUP>, exact_scores<BFloat16, GROUP>, exact_scores<Float16, GROUP>},
                   {exact_mix<Float32, GROUP>, exact_mix<BFloat16, GROUP>, exact_mix<Float16, GROUP>}};
  });
}

// ------------------------------------------------------------------------------------------------------------ the axis

// A run of at most BLOCK columns of the axis.
struct Span {
  int64_t slot;   // ring index of token 0, a multiple of TILE; UNSET: nothing is written there
  int64_t axis;   // column of token 0, negative for one before the axis
  int64_t begin;  // the columns are tokens [begin, end) of the block
  int64_t end;
};

// A column whose token is known exactly.
struct Exact {
  int64_t column;
  enum Source : int64_t { SINK, WINDOW, NEW } source;  // later ones take precedence
  int64_t index;
};

// The written slots [low, high) of a ring and the unwritten rest of the axis, in spans.
void lay_out(const Layout& layout, int64_t origin, int64_t end, int64_t first, int64_t length, std::vector<Span>& spans) {
  const int64_t low = std::max<int64_t>(0, first);
  const int64_t high = std::max(low, std::min({layout.slots, first + length, end - origin}));
  const auto unwritten = [&](int64_t from, int64_t to) {
    for (int64_t column = from; column < to; column += BLOCK) {
      spans.push_back({UNSET, column, 0, std::min<int64_t>(BLOCK, to - column)});
    }
  };
  const auto written = [&](int64_t from, int64_t to) {  // slots with ascending ring indices
    if (from >= to) return;
    const int64_t begin = (origin + from) % layout.slots, stop = begin + to - from;
    for (int64_t slot = begin / TILE * TILE; slot < stop; slot += BLOCK) {
      spans.push_back({slot, from - first + slot - begin, std::max<int64_t>(0, begin - slot),
                       std::min<int64_t>(BLOCK, stop - slot)});
    }
  };
  const int64_t wrap = layout.slots - origin % layout.slots;
  unwritten(0, std::min(low - first, length));
  written(low, std::min(high, wrap));
  written(std::max(low, wrap), high);
  unwritten(std::max<int64_t>(0, high - first), length);
}

// The exact columns of a batch row, in ascending order.
void list_exact(const Attend& call, const Layout& layout, const void* state, int64_t origin, int64_t row,
                std::vector<Exact>& list) {
  const auto add = [&](int64_t offset, int64_t count, Exact::Source source) {
    const int64_t* labels = at<int64_t>(state, offset) + row * count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = labels[i] - (origin + call.first);
      if (labels[i] >= origin && column >= 0 && column < call.length) list.push_back({column, source, i});
    }
  };
  list.clear();
  add(layout.sink_positions, layout.sinks, Exact::SINK);
  add(layout.window_positions, layout.window, Exact::WINDOW);
  for (int64_t i = 0; i < call.tokens; ++i) {
    const int64_t column = call.positions[i] - call.first;
    if (call.positions[i] >= 0 && column >= 0 && column < call.length) list.push_back({column, Exact::NEW, i});
  }
  const auto before = [](const Exact& a, const Exact& b) {
    if (a.column != b.column) return a.column < b.column;
    return a.source != b.source ? a.source > b.source : a.index > b.index;
  };
  if (!std::is_sorted(list.begin(), list.end(), before)) std::sort(list.begin(), list.end(), before);
  const auto same = [](const Exact& a, const Exact& b) { return a.column == b.column; };
  list.erase(std::unique(list.begin(), list.end(), same), list.end());
}

// ---------------------------------------------------------------------------------------------------------------- masks

enum class Admits { ALL, SOME, NONE };

// The additive form of `count` columns of a mask; `bias` has room for whole registers.
Admits read_mask(const Attend& call, int64_t row, int64_t head, int64_t query, int64_t column, int64_t count, float* bias) {
  const Array& mask = call.mask;
  const int64_t index =
      row * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2] + column * mask.stride[3];
  bool all = true, none = true;
  if (mask.dtype == BOOL) {
    const auto* from = static_cast<const uint8_t*>(mask.data) + index;
    if (mask.stride[3] == 1) {
      const auto* zero = static_cast<const uint8_t*>(memchr(from, 0, count));
      if (zero == nullptr) return Admits::ALL;
      if (zero == from && (count == 1 || memcmp(from, from + 1, count - 1) == 0)) return Admits::NONE;
    }
    for (int64_t i = 0; i < count; ++i) {
      const bool admitted = from[i * mask.stride[3]];
      bias[i] = admitted ? 0.0f : -INFINITE;
      all &= admitted;
      none &= !admitted;
    }
  } else {
    const char* from = static_cast<const char*>(mask.data) + index * item_size(mask.dtype);
    load_row(mask.dtype, from, mask.stride[3], count, bias);
    for (int64_t i = 0; i < count; ++i) {
      all &= bias[i] == 0;
      none &= bias[i] == -INFINITE;
    }
  }
  return all ? Admits::ALL : none ? Admits::NONE : Admits::SOME;
}

// ---------------------------------------------------------------------------------------------------------------- tasks

// What all tasks of a call share.
struct Plan {
  const Attend& call;
  Kernels kernels;
  int64_t origin;
  std::vector<Span> spans;
  std::vector<std::vector<Exact>> exact_keys, exact_values;  // per batch row
  bool same_exact;                                           // the values' columns are those of the keys
  int64_t groups;                                            // query heads per KV head
  int64_t rows;                                              // query rows per KV head
  int64_t row_groups, splits;
  Table key_table, value_table;
  int64_t query_stride, out_stride;  // head sizes in whole registers

  explicit Plan(const Attend& call)
      : call(call),
        key_table(call.key_layout->entries, call.key_layout->bits),
        value_table(call.value_layout->entries, call.value_layout->bits) {}
};

// Partial result of a task: maxima [group], sums [group], out [group][out_stride].
int64_t partial_size(const Plan& plan) { return plan.kernels.group * (2 + plan.out_stride); }

// The query rows of a task; those that fill up the group repeat the last one.
struct Rows {
  int count;
  int64_t query[MAX_GROUP], head[MAX_GROUP];

  Rows(const Plan& plan, int64_t kv_head, int64_t row_group) {
    const int64_t begin = row_group * plan.kernels.group;
    count = static_cast<int>(std::min<int64_t>(plan.kernels.group, plan.rows - begin));
    for (int i = 0; i < plan.kernels.group; ++i) {
      const int64_t index = begin + std::min(i, count - 1);
      query[i] = index / plan.groups;
      head[i] = kv_head * plan.groups + index % plan.groups;
    }
  }
};

class Task {
 public:
  Task(const Plan& plan, int64_t row, int64_t head, const Rows& rows, float* partial)
      : plan_(plan),
        call_(plan.call),
        key_(*call_.key_layout),
        value_(*call_.value_layout),
        rows_(rows),
        row_(row),
        head_(head),
        group_(plan.kernels.group),
        layout_{group_, is_tiled(key_.bits, group_)},
        maxima_(partial),
        sums_(partial + group_),
        out_(partial + 2 * group_) {
    same_mask_ = true;
    for (int i = 1; i < group_; ++i) {
      same_mask_ &= (rows.query[i] == rows.query[0] || call_.mask.stride[2] == 0) &&
                    (rows.head[i] == rows.head[0] || call_.mask.stride[1] == 0);
    }
    std::fill(maxima_, maxima_ + group_, -INFINITE);
    std::fill(sums_, sums_ + group_, 0.0f);
    std::fill(out_, out_ + group_ * plan.out_stride, 0.0f);
    std::fill(out_decay_, out_decay_ + group_, 1.0f);
    std::fill(decay_, decay_ + group_, 1.0f);
    load_query();
    if (key_.bits != 16) {
      factors_.resize(key_.sets * layout_.size(key_.padded_dim));
      folds_.resize(key_.sets);
    }
    if (value_.bits != 16) rotated_.assign(group_ * value_.padded_dim, 0.0f);
  }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles(group_, is_tiled(key_.bits, group_) || is_tiled(value_.bits, group_));
    for (int64_t i = begin; i < end; ++i) span(plan_.spans[i]);
    flush();
    apply_out_decay();
    for (int i = 0; i < group_; ++i) {
      if (poisoned_[i]) sums_[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }

 private:
  struct Fold {
    bool ready = false;
    uint32_t shift[MAX_GROUP];
    float scale[MAX_GROUP], mean[MAX_GROUP];
  };

  void load_query() {
    queries_.assign(group_ * plan_.query_stride, 0.0f);
    for (int i = 0; i < group_; ++i) {
      float* to = queries_.data() + i * plan_.query_stride;
      load_row(call_.query.dtype, row_of(call_.query, row_, rows_.head[i], rows_.query[i]), 1, key_.head_dim, to);
      float check = 0;
      for (int64_t c = 0; c < key_.head_dim; ++c) {
        to[c] *= static_cast<float>(call_.scale);
        check += to[c] * 0.0f;
      }
      // The integer arithmetic knows no nan: a query with one, or with an infinity, gets nan as in a dense attention.
      poisoned_[i] = check != 0;
      if (poisoned_[i]) std::fill(to, to + key_.head_dim, 0.0f);
    }
  }

  // Folds the queries with a parameter set: once each.
  Folded fold(int64_t set) {
    Fold& fold = folds_[set];
    int32_t* factor = factors_.data() + set * layout_.size(key_.padded_dim);
    if (!fold.ready) {
      fold.ready = true;
      const int64_t at_set = set_offset(key_, row_, set, head_);
      const uint16_t* means = at<uint16_t>(call_.key_state, key_.means) + at_set;
      const uint16_t* scales = at<uint16_t>(call_.key_state, key_.scales) + at_set;
      const auto limit = static_cast<float>(
          std::min<int64_t>(FACTOR_LIMIT, std::numeric_limits<int32_t>::max() / (128 * key_.padded_dim)));
      scratch_.resize(key_.padded_dim);
      for (int i = 0; i < group_; ++i) {
        const float* query = queries_.data() + i * plan_.query_stride;
        Floats mean{}, peaks = splat(LEAST_PEAK);
        each_register(BFLOAT16, scales, 1, key_.head_dim, [&](int64_t c, Floats scale) {
          store(scratch_.data() + c, load<Floats>(query + c) / scale);
        });
        each_register(BFLOAT16, means, 1, key_.head_dim, [&](int64_t c, Floats x) {
          mean = fused(load<Floats>(query + c), x, mean);
        });
        std::fill(scratch_.begin() + key_.head_dim, scratch_.end(), 0.0f);
        rotate(key_, scratch_.data());
        for (int64_t c = 0; c < key_.padded_dim; c += WIDTH) {
          peaks = max(magnitude(load<Floats>(scratch_.data() + c)), peaks);
        }
        const float peak = largest(peaks), inverse = limit / peak;
        Words totals{};
        for (int64_t c = 0; c < key_.padded_dim; c += WIDTH) {
          const Ints value = to_ints(load<Floats>(scratch_.data() + c) * inverse);
          totals += (Words)value;
          int32_t limbs[2][WIDTH / QUAD];
          split_quads(value, limbs[0], limbs[1]);
          for (int quad = 0; quad < WIDTH / QUAD; ++quad) {
            int32_t* words = factor + layout_.at(c / QUAD + quad, i);
            words[0] = limbs[0][quad];
            words[layout_.limb_step()] = limbs[1][quad];
          }
        }
        fold.shift[i] = sum(totals) * 128;
        fold.scale[i] = peak / limit / static_cast<float>(key_.steps);
        fold.mean[i] = sum(mean);
      }
    }
    return {factor, fold.shift, fold.scale, fold.mean};
  }

  // Calls each(set, epochs) for the parameter sets that tokens [begin, end) of a block name; null: all have this one.
  template <class Each>
  void for_each_set(const uint8_t* epochs, int64_t begin, int64_t end, const Each& each) {
    if (memcmp(epochs + begin, epochs + begin + 1, end - begin - 1) == 0) {
      if (epochs[begin] != NO_EPOCH) each(epochs[begin], nullptr);
      return;
    }
    bool done[NO_EPOCH + 1] = {};
    done[NO_EPOCH] = true;
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t set = epochs[i];
      if (done[set]) continue;
      done[set] = true;
      each(set, epochs);
    }
  }

  // What is stored of the head from a slot on; gains and epochs of the next block are fetched, its codes later.
  struct Packed {
    const uint16_t* gains;
    const uint8_t* epochs;
    Planes planes;
  };

  Packed packed(const Layout& layout, const void* state, int64_t slot) const {
    constexpr int LINE = 64;
    const auto plane = [&](int p) -> const uint8_t* {
      if (p >= layout.planes) return nullptr;
      return plane_of(layout, state, p, row_, head_) + slot * layout.padded_dim * layout.widths[p] / 8;
    };
    const int64_t head = row_ * layout.heads + head_;
    const auto* gains = at<uint16_t>(state, layout.gains) + head * layout.capacity + slot;
    const auto* epochs = at<uint8_t>(state, layout.epochs) + row_ * layout.capacity + slot;
    for (int i = 0; i < BLOCK; i += LINE / 2) __builtin_prefetch(gains + BLOCK + i, 0, 2);
    for (int i = 0; i < BLOCK; i += LINE) __builtin_prefetch(epochs + BLOCK + i, 0, 2);
    return {gains, epochs, {plane(0), plane(1)}};
  }

  void packed_scores(const Span& span) {
    const Packed from = packed(key_, call_.key_state, span.slot);
    const int64_t first = span.begin / LANES, last = (span.end + LANES - 1) / LANES;
    bool any = false;
    for_each_set(from.epochs, span.begin, span.end, [&](int64_t set, const uint8_t* only) {
      float* to = only ? other_ : scores_;
      plan_.kernels.scores(plan_.key_table, from.planes, key_.padded_dim, from.gains, fold(set), first, last, to);
      if (only) {
        if (!any) std::fill(scores_, scores_ + group_ * BLOCK, 0.0f);
        for (int i = 0; i < group_; ++i) {
          for (int64_t token = span.begin; token < span.end; ++token) {
            if (only[token] == set) scores_[i * BLOCK + token] = other_[i * BLOCK + token];
          }
        }
      }
      any = true;
    });
    if (!any) std::fill(scores_, scores_ + group_ * BLOCK, 0.0f);
  }

  // Rows of a 16-bit cache, tokens [begin, end) of a span.
  int64_t raw_tokens(const Layout& layout, const void* state, const Span& span, const void** tokens) const {
    const int64_t size = layout.head_dim * item_size(layout.dtype);
    const char* from = at<char>(state, layout.raw) + ((row_ * layout.heads + head_) * layout.slots + span.slot) * size;
    for (int64_t i = span.begin; i < span.end; ++i) tokens[i - span.begin] = from + i * size;
    return span.end - span.begin;
  }

  const void* exact_token(const Layout& layout, const void* state, const Array& fresh, const Exact& exact) const {
    if (exact.source == Exact::NEW) return row_of(fresh, row_, head_, exact.index);
    const bool sink = exact.source == Exact::SINK;
    const int64_t slots = sink ? layout.sinks : layout.window;
    const int64_t index = ((row_ * layout.heads + head_) * slots + exact.index) * layout.head_dim;
    return at<char>(state, sink ? layout.sink_tokens_at : layout.window_tokens_at) + index * item_size(layout.dtype);
  }

  static const Exact* lower(const std::vector<Exact>& list, int64_t column) {
    const auto before = [](const Exact& a, int64_t b) { return a.column < b; };
    return list.data() + (std::lower_bound(list.begin(), list.end(), column, before) - list.begin());
  }

  // Calls use(tokens, dtype, entries, count) for the exact tokens [from, to), those of the cache's dtype and new ones apart.
  template <class Use>
  void with_exact(const Layout& layout, const void* state, const Array& fresh, const Exact* from, const Exact* to,
                  const Use& use) {
    const void* tokens[BLOCK];
    const Exact* entries[BLOCK];
    for (const bool is_new : {false, true}) {
      int64_t count = 0;
      for (const Exact* exact = from; exact < to; ++exact) {
        if ((exact->source == Exact::NEW) != is_new || (is_new && call_.dense_sums)) continue;
        entries[count] = exact;
        tokens[count++] = exact_token(layout, state, fresh, *exact);
      }
      if (count) use(tokens, is_new ? fresh.dtype : layout.dtype, entries, count);
    }
  }

  void span(const Span& span) {
    const int64_t count = span.end - span.begin, column = span.axis + span.begin;
    Admits admits[MAX_GROUP];
    const int masks = call_.mask.data == nullptr ? 0 : same_mask_ ? 1 : group_;
    bool none = masks > 0;
    for (int i = 0; i < masks; ++i) {
      admits[i] = read_mask(call_, row_, rows_.head[i], rows_.query[i], column, count, bias_ + i * BLOCK + span.begin);
      none &= admits[i] == Admits::NONE;
    }
    if (none) return;

    const std::vector<Exact>& keys = plan_.exact_keys[row_];
    const std::vector<Exact>& values = plan_.same_exact ? keys : plan_.exact_values[row_];
    const Exact *key_from = lower(keys, column), *key_to = lower(keys, column + count);
    const auto is_new = [](const Exact& exact) { return exact.source == Exact::NEW; };
    if (call_.dense_sums && key_to - key_from == count && std::all_of(key_from, key_to, is_new)) return;

    if (key_to - key_from == count) {
      // every token is exact
    } else if (span.slot == UNSET) {
      if (masks == 0 && key_from == key_to) return zeros(count);
      std::fill(scores_, scores_ + group_ * BLOCK, 0.0f);
    } else if (key_.bits == 16) {
      const void* tokens[BLOCK];
      const int64_t raw = raw_tokens(key_, call_.key_state, span, tokens);
      plan_.kernels.exact_scores[key_.dtype](tokens, raw, key_.head_dim, queries_.data(), plan_.query_stride,
                                             scores_ + span.begin);
    } else {
      packed_scores(span);
    }
    with_exact(key_, call_.key_state, call_.key, key_from, key_to,
               [&](const void** tokens, int64_t dtype, const Exact** entries, int64_t number) {
                 plan_.kernels.exact_scores[dtype](tokens, number, key_.head_dim, queries_.data(), plan_.query_stride, other_);
                 for (int i = 0; i < group_; ++i) {
                   for (int64_t n = 0; n < number; ++n) {
                     scores_[i * BLOCK + entries[n]->column - span.axis] = other_[i * BLOCK + n];
                   }
                 }
               });
    if (call_.softcap > 0) cap_scores(scores_, group_ * BLOCK, static_cast<float>(call_.softcap));
    for (int i = 0; i < group_; ++i) {
      float* scores = scores_ + i * BLOCK;
      const int m = masks == 1 ? 0 : i;
      if (masks && admits[m] == Admits::NONE) {
        std::fill(scores, scores + BLOCK, -INFINITE);
      } else if (masks && admits[m] == Admits::SOME) {
        for (int64_t t = span.begin; t < span.end; ++t) {
          const float bias = bias_[m * BLOCK + t];
          scores[t] = call_.mask.dtype == BOOL && bias != 0 ? bias : scores[t] + bias;
        }
      }
      std::fill(scores, scores + span.begin, -INFINITE);
      std::fill(scores + span.end, scores + BLOCK, -INFINITE);
    }
    if (call_.dense_sums) {  // new tokens were attended elsewhere
      for (const Exact* exact = key_from; exact < key_to; ++exact) {
        if (exact->source != Exact::NEW) continue;
        for (int i = 0; i < group_; ++i) scores_[i * BLOCK + exact->column - span.axis] = -INFINITE;
      }
    }
    softmax();

    const Exact *value_from = lower(values, column), *value_to = lower(values, column + count);
    with_exact(value_, call_.value_state, call_.value, value_from, value_to,
               [&](const void** tokens, int64_t dtype, const Exact** entries, int64_t number) {
                 for (int i = 0; i < group_; ++i) {
                   for (int64_t n = 0; n < number; ++n) {
                     float& weight = scores_[i * BLOCK + entries[n]->column - span.axis];
                     other_[i * BLOCK + n] = weight;
                     weight = 0;
                   }
                 }
                 apply_out_decay();
                 plan_.kernels.exact_mix[dtype](tokens, number, value_.head_dim, other_, out_, plan_.out_stride);
               });
    if (span.slot == UNSET || value_to - value_from == count) return;
    if (value_.bits == 16) {
      const void* tokens[BLOCK];
      const int64_t raw = raw_tokens(value_, call_.value_state, span, tokens);
      apply_out_decay();
      plan_.kernels.exact_mix[value_.dtype](tokens, raw, value_.head_dim, scores_ + span.begin, out_, plan_.out_stride);
    } else {
      packed_mix(span);
    }
  }

  // `count` columns without a mask whose keys and values are zeros.
  void zeros(int64_t count) {
    for (int i = 0; i < group_; ++i) {
      const float peak = std::max(maxima_[i], 0.0f);
      const float factor = maxima_[i] == -INFINITE ? 0.0f : std::exp(maxima_[i] - peak);
      decay(i, factor);
      maxima_[i] = peak;
      sums_[i] = sums_[i] * factor + static_cast<float>(count) * std::exp(-peak);
    }
  }

  // Scores become weights; the running sums are brought to the new maximum.
  void softmax() {
    float factor[MAX_GROUP];
    plan_.kernels.softmax(scores_, maxima_, sums_, factor);
    for (int i = 0; i < group_; ++i) decay(i, factor[i]);
  }

  // Scales a row's sums over values, when it is next convenient.
  void decay(int i, float factor) {
    decay_[i] *= factor;
    out_decay_[i] *= factor;
  }

  void apply_out_decay() {
    for (int i = 0; i < group_; ++i) {
      if (out_decay_[i] == 1.0f) continue;
      for (int64_t c = 0; c < value_.head_dim; ++c) out_[i * plan_.out_stride + c] *= out_decay_[i];
      out_decay_[i] = 1.0f;
    }
  }

  void packed_mix(const Span& span) {
    const Packed from = packed(value_, call_.value_state, span.slot);
    const int64_t tiles = (span.end + TILE - 1) / TILE;
    for_each_set(from.epochs, span.begin, span.end, [&](int64_t set, const uint8_t* only) {
      const auto steps = static_cast<float>(value_.steps);
      if (!plan_.kernels.weigh(scores_, from.gains, only, set, tiles, steps, other_, weights_)) return;
      if (set != set_) {
        flush();
        set_ = set;
      }
      plan_.kernels.mix(plan_.value_table, from.planes, value_.padded_dim, weights_, tiles, decay_, rotated_.data());
      std::fill(decay_, decay_ + group_, 1.0f);
    });
  }

  // Turns the sum over the values of one parameter set back to the cache's basis.
  void flush() {
    if (set_ == UNSET) return;
    apply_out_decay();
    const int64_t at_set = set_offset(value_, row_, set_, head_);
    const uint16_t* scales = at<uint16_t>(call_.value_state, value_.scales) + at_set;
    for (int i = 0; i < group_; ++i) {
      float* sums = rotated_.data() + i * value_.padded_dim;
      unrotate(value_, sums);
      for (int64_t c = 0; c < value_.head_dim; ++c) {
        out_[i * plan_.out_stride + c] += sums[c] * decay_[i] / from_bfloat16(scales[c]);
      }
      decay_[i] = 1.0f;
    }
    std::fill(rotated_.begin(), rotated_.end(), 0.0f);
    set_ = UNSET;
  }

  const Plan& plan_;
  const Attend& call_;
  const Layout &key_, &value_;
  const Rows& rows_;
  int64_t row_, head_;
  int group_;
  FactorLayout layout_;
  bool same_mask_;
  bool poisoned_[MAX_GROUP];
  float *maxima_, *sums_, *out_;
  float decay_[MAX_GROUP];      // still to be applied to rotated_
  float out_decay_[MAX_GROUP];  // still to be applied to out_
  int64_t set_ = UNSET;         // parameter set of rotated_
  std::vector<float> queries_, scratch_, rotated_;
  std::vector<int32_t> factors_;
  std::vector<Fold> folds_;
  Weights weights_;
  alignas(64) float scores_[MAX_GROUP * BLOCK], other_[MAX_GROUP * BLOCK];
  float bias_[MAX_GROUP * BLOCK + WIDTH];  // a row may run into the next one, which is read later
};

// Whether a column is admitted whose token is not new.
bool admits_history(const Plan& plan) {
  const Attend& call = plan.call;
  const bool masked = call.mask.data != nullptr;
  const int64_t rows = call.batch;
  const int64_t heads = masked && call.mask.stride[1] ? call.query_heads : 1;
  const int64_t queries = masked && call.mask.stride[2] ? call.queries : 1;
  float bias[BLOCK + WIDTH];
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<Exact>& exact = plan.exact_keys[row];
    size_t next = 0;
    for (const Span& span : plan.spans) {
      bool is_new[BLOCK] = {};
      int64_t others = span.end - span.begin;
      for (; next < exact.size() && exact[next].column < span.axis + span.end; ++next) {
        if (exact[next].source != Exact::NEW) continue;
        is_new[exact[next].column - span.axis] = true;
        --others;
      }
      if (others == 0) continue;
      if (!masked) return true;
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t query = 0; query < queries; ++query) {
          const Admits admits =
              read_mask(call, row, head, query, span.axis + span.begin, span.end - span.begin, bias + span.begin);
          if (admits == Admits::NONE) continue;
          if (admits == Admits::ALL) return true;
          for (int64_t t = span.begin; t < span.end; ++t) {
            if (!is_new[t] && bias[t] != -INFINITE) return true;
          }
        }
      }
    }
  }
  return false;
}

// Merges the partial results of one group of query rows.
void finish(const Plan& plan, const Rows& rows, int64_t batch_row, const float* partials, int64_t splits) {
  const Attend& call = plan.call;
  const int64_t group = plan.kernels.group, size = call.value_layout->head_dim, stride = partial_size(plan);
  std::vector<float> total(plan.out_stride);
  for (int i = 0; i < rows.count; ++i) {
    const int64_t index = (batch_row * call.query_heads + rows.head[i]) * call.queries + rows.query[i];
    // Where nothing was admitted the dense part may be anything: its sum is then -inf or nan.
    const bool dense = call.dense_sums && call.dense_sums[index] > -INFINITE;
    float peak = dense ? call.dense_sums[index] : -INFINITE;
    for (int64_t split = 0; split < splits; ++split) peak = std::max(peak, partials[split * stride + i]);
    float sum = 0;
    if (const float sink = call.sink ? call.sink[rows.head[i]] : -INFINITE; sink != -INFINITE) {
      peak = std::max(peak, sink);
      sum = std::exp(sink - peak);
    }
    std::fill(total.begin(), total.end(), 0.0f);
    if (dense) {
      const float weight = std::exp(call.dense_sums[index] - peak);
      const void* from = row_of(call.dense, batch_row, rows.head[i], rows.query[i]);
      load_row(call.dense.dtype, from, 1, size, total.data());
      for (int64_t c = 0; c < size; ++c) total[c] *= weight;
      sum += weight;
    }
    for (int64_t split = 0; split < splits; ++split) {
      const float* partial = partials + split * stride;
      if (partial[group + i] == 0) continue;
      const float weight = std::exp(partial[i] - peak);
      sum += weight * partial[group + i];
      const float* from = partial + 2 * group + i * plan.out_stride;
      for (int64_t c = 0; c < size; ++c) total[c] += weight * from[c];
    }
    const float inverse = sum == 0 ? 0.0f : 1 / sum;
    for (int64_t c = 0; c < size; ++c) total[c] *= inverse;
    const int64_t bytes = size * item_size(call.query.dtype);
    store_row(call.query.dtype, total.data(), size, static_cast<char*>(call.out) + index * bytes);
  }
}

bool same_labels(const Attend& call, int64_t Layout::*offset, int64_t Layout::*count) {
  const Layout &key = *call.key_layout, &value = *call.value_layout;
  return key.*count == value.*count && memcmp(at<char>(call.key_state, key.*offset), at<char>(call.value_state, value.*offset),
                                              call.batch * key.*count * sizeof(int64_t)) == 0;
}

enum Status : int64_t {
  DONE,
  CACHES_DIFFER,  // in what they hold; nothing was done
  DENSE_IS_ALL,   // no stored token is admitted, the result is `dense`
};

Status attend(const Attend& call) {
  const Layout &key = *call.key_layout, &value = *call.value_layout;
  const int64_t* header = at<int64_t>(call.key_state, key.header);
  if (memcmp(header, at<int64_t>(call.value_state, value.header), 2 * sizeof *header) != 0) return CACHES_DIFFER;

  Plan plan(call);
  plan.origin = header[ORIGIN];
  plan.groups = call.query_heads / key.heads;
  plan.rows = plan.groups * call.queries;
  plan.kernels = choose(plan.rows, key, value);
  plan.query_stride = whole_registers(key.head_dim);
  plan.out_stride = whole_registers(value.head_dim);
  lay_out(key, header[ORIGIN], header[END], call.first, call.length, plan.spans);
  plan.exact_keys.resize(call.batch);
  plan.same_exact = same_labels(call, &Layout::sink_positions, &Layout::sinks) &&
                    same_labels(call, &Layout::window_positions, &Layout::window);
  if (!plan.same_exact) plan.exact_values.resize(call.batch);
  for (int64_t row = 0; row < call.batch; ++row) {
    list_exact(call, key, call.key_state, plan.origin, row, plan.exact_keys[row]);
    if (!plan.same_exact) list_exact(call, value, call.value_state, plan.origin, row, plan.exact_values[row]);
  }
  if (call.dense_sums && !admits_history(plan)) return DENSE_IS_ALL;

  const auto spans = static_cast<int64_t>(plan.spans.size());
  plan.row_groups = (plan.rows + plan.kernels.group - 1) / plan.kernels.group;
  const int64_t groups = call.batch * key.heads * plan.row_groups;
  const int64_t wanted = call.threads > 1 ? (call.threads * SPLITS_PER_THREAD + groups - 1) / groups : 1;
  plan.splits = std::max<int64_t>(1, std::min(wanted, spans / SPANS_PER_SPLIT));

  const int64_t stride = partial_size(plan);
  std::vector<float> partials(groups * plan.splits * stride);
  const auto locate = [&](int64_t group, int64_t& row, int64_t& head, int64_t& row_group) {
    row_group = group % plan.row_groups;
    head = group / plan.row_groups % key.heads;
    row = group / plan.row_groups / key.heads;
  };
  parallel(call.gomp_parallel, call.threads, groups * plan.splits, [&](int64_t index) {
    const int64_t group = index / plan.splits, split = index % plan.splits;
    int64_t row, head, row_group;
    locate(group, row, head, row_group);
    const Rows rows(plan, head, row_group);
    Task task(plan, row, head, rows, partials.data() + index * stride);
    task.run(spans * split / plan.splits, spans * (split + 1) / plan.splits);
    if (plan.splits == 1) finish(plan, rows, row, partials.data() + index * stride, 1);
  });
  if (plan.splits > 1) {
    for (int64_t group = 0; group < groups; ++group) {
      int64_t row, head, row_group;
      locate(group, row, head, row_group);
      float* first = partials.data() + group * plan.splits * stride;
      finish(plan, Rows(plan, head, row_group), row, first, plan.splits);
    }
  }
  return DONE;
}

// Reads `Attend` field by field; counts are in the sizes. False: the kernels do not take a call as it is.
bool read(Arguments& from, Attend& call) {
  Sizes query, fresh, values, mask, dense;
  const Layout& key = *(call.key_layout = &from.layout());
  const Layout& value = *(call.value_layout = &from.layout());
  call.key_state = from.state(key);
  call.value_state = from.state(value);
  call.query = from.rows(query);
  call.batch = query[0];
  call.query_heads = query[1];
  call.queries = query[2];
  call.key = from.rows(fresh);
  call.value = from.rows(values);
  call.tokens = fresh[2];
  call.positions = from.positions(call.tokens);
  call.mask = from.optional_mask(mask);
  call.scale = from.number(std::pow(static_cast<double>(key.head_dim), -0.5));
  call.softcap = from.number(0);
  call.first = from.integer();
  call.length = from.integer();
  call.sink = from.optional_floats({call.query_heads});
  call.dense = from.optional_rows(dense);
  call.dense_sums = from.optional_floats({call.batch, call.query_heads, call.queries});
  call.out = from.out(call.query.dtype, {call.batch, call.query_heads, call.queries, value.head_dim});
  call.gomp_parallel = from.address();
  call.threads = from.integer();

  from.expect(key.key && !value.key && call.length > 0);
  from.expect(call.query_heads > 0 && call.query_heads % key.heads == 0 && call.queries > 0);
  from.expect(call.batch > 0 && call.batch <= key.batch);
  from.expect(query.are(call.batch, call.query_heads, call.queries, key.head_dim));
  from.expect(fresh.are(call.batch, key.heads, call.tokens, key.head_dim));
  from.expect(values.are(call.batch, key.heads, call.tokens, value.head_dim));
  if (mask.given) {
    const auto broadcasts = [&](int i, int64_t size) { return mask[i] == 1 || mask[i] == size; };
    from.expect(broadcasts(0, call.batch) && broadcasts(1, call.query_heads) && broadcasts(2, call.queries));
    from.expect(mask[3] == call.length);
  }
  if (dense.given) from.expect(dense.are(call.batch, call.query_heads, call.queries, value.head_dim));
  return from.good();
}

}  // namespace
}  // namespace decoquant

using namespace decoquant;

// A function of Python, called with the fields of `Attend` (METH_FASTCALL). Returns a `Status` or `REFUSED`.
extern "C" PyObject* decoquant_attend(PyObject* view, PyObject* const* arguments, int64_t) {
  return answer<Attend, Status>(view, arguments, read, attend);
}
