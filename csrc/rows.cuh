// Rows of logits, each shared by a team of neighbouring threads: its reductions, a thread's share, and the top class.
#pragma once

#include "images.cuh"
#include "storage.cuh"

namespace dfkd_fast {

constexpr int kThreads = 128;  // a block, and the largest team

// ---- Reductions over a team, known to all of its threads; all threads of the block take part.

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

template <typename T, typename Combine>
__device__ T reduce(T value, int team, Combine combine) {
  for (int offset = min(team, 32) / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (team > 32) {
    __shared__ T warps[kThreads / 32];
    __syncthreads();  // the last reduction has been read
    if (threadIdx.x % 32 == 0) {
      warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = warps[0];
    for (int i = 1; i < kThreads / 32; ++i) {
      value = combine(value, warps[i]);
    }
  }
  return value;
}

// ---- A thread's share of a row: the classes first, first + team, first + 2 team, …

struct Row {
  int64_t n;
  int64_t p;
  int first;
  int count;
  int team;
};

// Calls `visit(i)` for those of kCount values, which begin at `begin` of the share, that are in it.
template <int kCount, typename Visit>
__device__ __forceinline__ void for_each_class(const Row& row, int begin, Visit&& visit) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (begin + i < row.count) {
      visit(i);
    }
  }
}

// Values `begin` to `begin + kCount` of the share; beyond its end they are left alone.
template <int kCount>
__device__ __forceinline__ void load_share(const View& view, const Row& row, int begin, float (&values)[kCount]) {
  with_floating(view.storage, [&](auto type) {
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
  with_floating(view.storage, [&](auto type) { store_share_as<typename decltype(type)::type>(view, row, begin, values); });
}

// ---- Top-1 agreement. A logit's rank orders as torch.argmax does: NaN first, then the greater, then the lower class.

using Rank = unsigned long long;

__device__ __forceinline__ Rank rank_of(float logit, int class_index) {
  const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 equals 0
  const unsigned ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<Rank>(isnan(logit) ? 0xffffffffu : ascending) << 32 | (0xffffffffu - static_cast<unsigned>(class_index));
}

template <int kCount>
__device__ __forceinline__ void raise(Rank& best, const Row& row, int begin, const float (&logits)[kCount]) {
  for_each_class<kCount>(row, begin, [&](int i) { best = Max()(best, rank_of(logits[i], row.first + (begin + i) * row.team)); });
}

// 1 in one thread of a team whose row has the same top class on both sides.
__device__ __forceinline__ int agreed(Rank student, Rank teacher, const Row& row) {
  const auto student_class = static_cast<unsigned>(reduce(student, row.team, Max()));
  const auto teacher_class = static_cast<unsigned>(reduce(teacher, row.team, Max()));
  return row.count > 0 && row.first == 0 && student_class == teacher_class;
}

}  // namespace dfkd_fast
