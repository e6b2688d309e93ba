// The best K of a stream of elements, kept by one block in shared memory.
//
// An element is an item: its place in the order of the floats above, the lower id first among equals below. Items at or
// above the floor are appended, by warps, with one addition to a shared counter each. Before the list is full it is cut
// to its K best, and the floor rises to the K-th; what found no room is offered again. So the list is a cache, and the
// result exact for any stream: no size bounds it.
#pragma once

#include "device.cuh"

namespace topk_rkl::cuda {

using Item = uint64_t;  // 0 is none

constexpr uint32_t NAN_KEY = 0xffffffff, MINUS_INF_KEY = 0x007fffff;

// In the order of the floats: -0.0 equals +0.0, and a NaN of either sign is above everything.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return NAN_KEY;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // which makes +0.0 of -0.0
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
__device__ inline float float_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000 ? key & 0x7fffffff : ~key);
}

__device__ inline Item item_of(float x, int64_t id) { return Item(key_of(x)) << 32 | uint32_t(~uint32_t(id)); }
__device__ inline int64_t id_of(Item item) { return int64_t(uint32_t(~uint32_t(item))); }

class Candidates {
 public:
  static constexpr int THREADS = 256, CAPACITY = 4096, SAMPLE = CAPACITY / THREADS;

  __host__ __device__ Candidates(Shared& shared, int k)
      : items(shared.take<Item>(CAPACITY)), bins_(shared.take<int>(BINS)), found_(shared.take<Found>(1)),
        count_(shared.take<int>(1)), k_(k) {}

  // To be met by a barrier before an offer.
  __device__ void clear() {
    floor_ = Item(MINUS_INF_KEY + 1) << 32;
    if (threadIdx.x == 0) *count_ = 0;
  }

  // The least item that is still wanted, the same for all threads.
  __device__ Item floor() const { return floor_; }

  // How many elements of each thread are a sample: four times as many of all as are wanted.
  __device__ int sample_size() const { return k_ <= THREADS / 4 ? 1 : k_ <= THREADS ? 4 : SAMPLE; }

  // Raises the floor to what a sample of the stream tells; none of it is taken. The list must be empty. Met by barriers.
  __device__ void raise_floor(const float (&sample)[SAMPLE]) {
    const int each = sample_size();
#pragma unroll
    for (int i = 0; i < SAMPLE; ++i) {
      if (i < each) items[i * THREADS + threadIdx.x] = Item(key_of(sample[i])) << 32;
    }
    const Item found = least_of_best(each * THREADS, k_ / 4, SAMPLE_DIGIT);
    if (found > floor_) floor_ = found;
  }

  // Takes the items of the bits of the mask of each thread.
  template <class ItemOf>
  __device__ void offer(uint32_t mask, ItemOf item_of_bit) {
    int seen = append(mask, item_of_bit);
    // The last warp to append sees the count that all of them leave.
    while (__syncthreads_or(mask != 0 || seen >= 2 * k_ + ROOM)) {
      cut(SLACK);
      seen = append(mask, item_of_bit);
    }
  }

  // Leaves the K best in `items`, in order, and 0 where there are fewer.
  __device__ void finish() {
    cut(k_ <= THREADS ? SLACK : 0);  // sorting a few more costs less than telling them apart
    const int count = *count_;
    int padded = 1;
    while (padded < k_ || padded < count) padded *= 2;
    for (int i = count + threadIdx.x; i < padded; i += THREADS) items[i] = 0;
    __syncthreads();
    for (int size = 2; size <= padded; size *= 2) {
      for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int i = threadIdx.x; i < padded / 2; i += THREADS) {
          const int low = 2 * i - (i & (stride - 1)), high = low + stride;
          const Item a = items[low], b = items[high];
          if ((a < b) == ((low & size) == 0)) items[low] = b, items[high] = a;
        }
        // Strides of up to WARP keep to the 2 WARP items of a warp.
        if (stride > WARP || (stride == 1 && (size > WARP || size == padded))) __syncthreads();
        else __syncwarp();
      }
    }
  }

  Item* const items;  // (CAPACITY)

 private:
  static constexpr int BINS = 256, ROOM = 256;
  static constexpr int SLACK = 64;        // items beyond the K best that a cut may keep, to end sooner
  static constexpr int SAMPLE_DIGIT = 48;  // the last digit of the floor that a sample gives
  struct Found {
    int bin, inside, above;  // the bin in which the K-th is, and how many are in it and in those above it
  };

  // Clears the bits whose item is in the list or not wanted, and returns the count that this warp has seen last.
  template <class ItemOf>
  __device__ int append(uint32_t& mask, ItemOf item_of_bit) {
    const int lane = int(threadIdx.x) % WARP;
    int seen = 0;
    while (__any_sync(ALL, mask != 0)) {
      const Item item = mask ? item_of_bit(__ffs(mask) - 1) : 0;
      const unsigned wanted = __ballot_sync(ALL, item >= floor_);
      int at = 0;
      if (lane == 0) at = atomicAdd(count_, __popc(wanted));
      at = __shfl_sync(ALL, at, 0);
      seen = at + __popc(wanted);
      const int place = at + __popc(wanted & ((1u << lane) - 1));
      const bool left_over = item >= floor_ && place >= CAPACITY;
      if (item >= floor_ && !left_over) items[place] = item;
      if (!left_over) mask &= mask - 1;
      if (seen > CAPACITY) break;
    }
    return seen;
  }

  // Keeps the K best, and up to `slack` more, and raises the floor. Between barriers, as `offer` leaves them.
  __device__ void cut(int slack) {
    const int n = *count_ < CAPACITY ? *count_ : CAPACITY;
    if (n <= k_ + slack) return;
    floor_ = least_of_best(n, slack, 0);
    if (threadIdx.x == 0) *count_ = 0;
    for (int start = 0; start < n; start += THREADS) {
      const int i = start + threadIdx.x;
      const Item item = i < n ? items[i] : 0;
      __syncthreads();  // what is overwritten has been read
      uint32_t one = item >= floor_;
      append(one, [&](int) { return item; });
    }
    __syncthreads();
  }

  // Met by barriers: an item that at least k of the n first are at or above, n >= k: found a digit at a time from the top, until it is
  // no more than k + slack or the last digit is found.
  __device__ Item least_of_best(int n, int slack, int last) {
    Item prefix = 0;
    int wanted = k_;
    for (int shift = 56; shift >= last; shift -= 8) {
      for (int i = threadIdx.x; i < BINS; i += THREADS) bins_[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < n; i += THREADS) {
        const Item item = items[i];
        if ((item ^ prefix) >> shift >> 8 == 0) atomicAdd(&bins_[item >> shift & (BINS - 1)], 1);
      }
      __syncthreads();
      if (threadIdx.x < WARP) find_bin(wanted);
      __syncthreads();
      prefix |= Item(found_->bin) << shift;
      wanted -= found_->above;
      if (found_->inside - wanted <= slack) break;
    }
    return prefix;
  }

  // By one warp: the bin in which the wanted-th largest is.
  __device__ void find_bin(int wanted) {
    constexpr int EACH = BINS / WARP;
    const int lane = int(threadIdx.x), top = BINS - 1 - lane * EACH;
    int mine = 0;
    for (int i = 0; i < EACH; ++i) mine += bins_[top - i];
    int upto = mine;
    for (int distance = 1; distance < WARP; distance *= 2) {
      const int other = __shfl_up_sync(ALL, upto, distance);
      if (lane >= distance) upto += other;
    }
    int above = upto - mine;
    if (above >= wanted || upto < wanted) return;
    int bin = top;
    for (; above + bins_[bin] < wanted; --bin) above += bins_[bin];
    found_->bin = bin, found_->inside = bins_[bin], found_->above = above;
  }

  int* bins_;     // (BINS)
  Found* found_;  // (1)
  int* count_;    // (1) of the items offered since the last cut; not all need have found room
  int k_;
  Item floor_ = 0;
};

}  // namespace topk_rkl::cuda
