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

// Consecutive chunks that one thread takes at a time.
struct ChunkRange {
  int64_t begin, end;
};

// Long runs of memory, which the prefetchers follow, but several for each thread, so that all finish together.
inline std::vector<ChunkRange> cut_into_ranges(const Segments& segments) {
  constexpr int64_t kLongest = 32, kRangesPerThread = 8;
  const auto& chunks = segments.chunks();
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t total = 0;
  for (const Segment& segment : segments.all()) total += segment.size;
  const int64_t share = total / (kRangesPerThread * torch::stable::get_num_threads());
  const int64_t longest = std::clamp(share, kChunkSize, kLongest * kChunkSize);
  // Only segments of a chunk or less share a range: a longer one is then finished by few.
  const auto is_long = [&](int64_t i) { return segments.all()[chunks[i].segment].size > kChunkSize; };
  std::vector<ChunkRange> ranges;
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin + 1;
    for (int64_t size = segments.entries(chunks[begin]);
         end < count && (size += segments.entries(chunks[end])) <= longest;) {
      if (chunks[end].segment != chunks[begin].segment && (is_long(begin) || is_long(end))) break;
      ++end;
    }
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

// Reduces a cache-full of whole segments, or one that does not fit, then applies to them while they are in the cache.
inline std::vector<Step> reduce_then_apply(const Segments& segments, const std::vector<ChunkRange>& ranges) {
  constexpr int64_t kCacheBytes = int64_t{4} << 20;
  const auto segment_of = [&](int64_t chunk) { return segments.chunks()[chunk].segment; };
  const int64_t count = static_cast<int64_t>(ranges.size());
  std::vector<Step> steps;
  steps.reserve(2 * ranges.size());
  for (int64_t begin = 0, bytes = 0, end = 0; begin < count; begin = end, bytes = 0) {
    do {
      for (int64_t i = ranges[end].begin; i < ranges[end].end; ++i) {
        bytes += kChunkSize * segments.all()[segment_of(i)].entry_bytes();
      }
      ++end;
    } while (end < count &&
             (bytes < kCacheBytes || segment_of(ranges[end].begin) == segment_of(ranges[end - 1].end - 1)));
    for (int64_t i = begin; i < end; ++i) steps.push_back({i, false});
    for (int64_t i = begin; i < end; ++i) steps.push_back({i, true});
  }
  return steps;
}

}  // namespace r2
