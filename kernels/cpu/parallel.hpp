// Runs independent tasks on torch's own OpenMP threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace decoquant {

// GOMP_parallel of the runtime that torch has loaded: linking OpenMP here would bring in a second pool of threads that
// fights the first one for the cores. Null where torch has none: tasks then run one after the other.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Calls body(task) for each task in [0, tasks), on at most `threads` threads, in no particular order.
template <class Body>
void parallel(void* gomp_parallel, int64_t threads, int64_t tasks, const Body& body) {
  if (threads <= 1 || tasks <= 1 || gomp_parallel == nullptr) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  struct Work {
    const Body& body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } work{body, tasks};
  auto run = [](void* data) {
    auto& shared = *static_cast<Work*>(data);
    for (int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) shared.body(task);
  };
  const auto team = static_cast<unsigned>(threads < tasks ? threads : tasks);
  reinterpret_cast<GompParallel>(gomp_parallel)(run, &work, team, 0);
}

}  // namespace decoquant
