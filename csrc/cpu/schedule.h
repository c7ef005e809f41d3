// One parallel region over a list of work items, and the order in which reduce and apply visit the chunks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "segments.h"

namespace r2 {

// Calls work(i) once for each i in [0, count), on all threads, each taking the next i when it is free: an item may wait
// for an earlier one, which is finished or in another thread's hands. What an item computes must not depend on who
// computes it, so results are the same for any number of threads.
template <class Work>
void run_in_order(int64_t count, const Work& work) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  const auto take_items = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  if (threads <= 1) {
    take_items(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, take_items);
  }
}

// Consecutive chunks that one thread takes at a time: one full chunk, or many small segments.
struct ChunkRange {
  int64_t begin, end;
};

inline std::vector<ChunkRange> cut_into_ranges(const Segments& segments) {
  std::vector<ChunkRange> ranges;
  const auto& chunks = segments.chunks();
  const auto size_of = [&](int64_t i) {
    return std::min(kChunkSize, segments.all()[chunks[i].segment].size - chunks[i].index * kChunkSize);
  };
  const int64_t count = static_cast<int64_t>(chunks.size());
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin + 1;
    for (int64_t size = size_of(begin); end < count && (size += size_of(end)) <= kChunkSize;) ++end;
    ranges.push_back({begin, end});
    begin = end;
  }
  return ranges;
}

// A countdown per segment: the thread that brings it to zero merges the segment, then marks it ready.
class Countdown {
 public:
  explicit Countdown(const Segments& segments) : remaining_(segments.count()) {
    for (int64_t i = 0; i < segments.count(); ++i) {
      remaining_[i].store(static_cast<int32_t>(segments.all()[i].chunks()), std::memory_order_relaxed);
    }
  }
  bool is_last(int64_t segment) { return remaining_[segment].fetch_sub(1, std::memory_order_acq_rel) == 1; }
  void mark_ready(int64_t segment) { remaining_[segment].store(kReady, std::memory_order_release); }
  void wait_until_ready(int64_t segment) const {
    for (int spins = 0; remaining_[segment].load(std::memory_order_acquire) != kReady; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  }

 private:
  static constexpr int32_t kReady = -1;
  std::vector<std::atomic<int32_t>> remaining_;
};

// An item of a pass that both reduces and applies.
struct Step {
  int64_t range : 63;
  bool is_apply : 1;
};

// Reduces a cache-full of segments, then applies to them, last chunk first, as the last ones read are still in cache;
// then the next cache-full.
inline std::vector<Step> reduce_then_apply(const Segments& segments, const std::vector<ChunkRange>& ranges) {
  constexpr int64_t kCacheBytes = int64_t{4} << 20;
  std::vector<Step> steps;
  steps.reserve(2 * ranges.size());
  const auto segment_of = [&](int64_t chunk) { return segments.chunks()[chunk].segment; };
  const int64_t count = static_cast<int64_t>(ranges.size());
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin, bytes = 0;
    // Whole segments only: until the next one would not fit, and up to a range that ends with its segment.
    while (end < count) {
      int64_t stop = end, more = 0;
      do {
        for (int64_t i = ranges[stop].begin; i < ranges[stop].end; ++i) {
          more += kChunkSize * segments.all()[segment_of(i)].entry_bytes();
        }
        ++stop;
      } while (stop < count && segment_of(ranges[stop].begin) == segment_of(ranges[stop - 1].end - 1));
      if (end > begin && bytes + more > kCacheBytes) break;
      end = stop;
      bytes += more;
    }
    for (int64_t i = begin; i < end; ++i) steps.push_back({i, false});
    for (int64_t i = begin; i < end; ++i) steps.push_back({i, true});
    begin = end;
  }
  return steps;
}

}  // namespace r2
