// Rows of logits, each processed by a team of adjacent threads: reductions, per-thread classes, and top-1 class.
#pragma once

#include "images.cuh"
#include "dtype.cuh"

namespace dfkd_fast {

constexpr int kThreads = 128;  // threads per block where teams process rows, and the largest team

// ---- All-reduce over a team, up to a warp or the block; must be called by all threads of the block unless the team is 1.

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return a > b ? a : b; }
};

template <int kBlock = kThreads, typename T, typename Combine>
__device__ T reduce(T value, int team, Combine combine) {
  for (int offset = min(team, 32) / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (team > 32) {
    __shared__ T warps[kBlock / 32];
    __syncthreads();  // `warps` of the previous reduction has been read
    if (threadIdx.x % 32 == 0) {
      warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = warps[0];
    for (int i = 1; i < kBlock / 32; ++i) {
      value = combine(value, warps[i]);
    }
  }
  return value;
}

// ---- Classes of a thread: first, first + team, first + 2 team, …

struct Row {
  int64_t n;
  int64_t p;
  int first;
  int count;
  int team;
};

// Calls `visit(i)` for each i < kCount such that the thread has a class `begin + i`.
template <int kCount, typename Visit>
__device__ __forceinline__ void for_each_class(const Row& row, int begin, Visit&& visit) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (begin + i < row.count) {
      visit(i);
    }
  }
}

// Loads the thread's classes `begin` to `begin + kCount`; values beyond its last class are left unchanged.
template <int kCount>
__device__ __forceinline__ void load_share(const View& view, const Row& row, int begin, float (&values)[kCount]) {
  dispatch_floating(view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t step = row.team * view.channel;
    const T* source = static_cast<const T*>(view.data) + view.offset(row.n, row.first + static_cast<int64_t>(begin) * row.team, row.p);
#pragma unroll
    for (int i = 0; i < kCount; ++i, source += step) {
      if (begin + i < row.count) {
        values[i] = widen(*source);
      }
    }
  });
}

template <typename T, int kCount>
__device__ __forceinline__ void store_share_as(const View& view, const Row& row, int begin, const float (&values)[kCount]) {
  const int64_t step = row.team * view.channel;
  T* target = static_cast<T*>(view.data) + view.offset(row.n, row.first + static_cast<int64_t>(begin) * row.team, row.p);
#pragma unroll
  for (int i = 0; i < kCount; ++i, target += step) {
    if (begin + i < row.count) {
      narrow(values[i], *target);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void store_share(const View& view, const Row& row, int begin, const float (&values)[kCount]) {
  dispatch_floating(view.dtype, [&](auto type) { store_share_as<typename decltype(type)::type>(view, row, begin, values); });
}

// ---- Top-1 agreement. Ranks order logits as torch.argmax does: NaN first, then the larger logit, then the lower class.

using Rank = unsigned long long;

__device__ __forceinline__ Rank rank_of(float logit, int class_index) {
  const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 equals 0
  const unsigned ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<Rank>(isnan(logit) ? 0xffffffffu : ascending) << 32 | (0xffffffffu - static_cast<unsigned>(class_index));
}

template <int kCount>
__device__ __forceinline__ void update_top(Rank& best, const Row& row, int begin, const float (&logits)[kCount]) {
  for_each_class<kCount>(row, begin, [&](int i) { best = Max()(best, rank_of(logits[i], row.first + (begin + i) * row.team)); });
}

// Returns 1 in the first thread of a team if student and teacher have the same top class, else 0.
__device__ __forceinline__ int top_classes_agree(Rank student, Rank teacher, const Row& row) {
  const auto student_class = static_cast<unsigned>(reduce(student, row.team, Max()));
  const auto teacher_class = static_cast<unsigned>(reduce(teacher, row.team, Max()));
  return row.count > 0 && row.first == 0 && student_class == teacher_class;
}

}  // namespace dfkd_fast
