// Kernels that read logits in 16-byte vectors although rows have few classes or an odd number of them.
//
// L1 does not depend on the rows: dense logits are one array. For the divergences, a block copies a tile of rows to shared
// memory, each thread compares one row, and the gradients replace the logits there before they are copied back.
#pragma once

#include "discrepancy.cuh"

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace dfkd_fast {

constexpr int kFlatThreads = 256;
constexpr int kFlatVector = 16;  // elements per thread, so that signs (int8) are stored 16 bytes at a time

// `count` elements at the same offsets in all tensors.
static __global__ void __launch_bounds__(kFlatThreads, 4) flat_l1_kernel(const __grid_constant__ Problem problem, int64_t count, bool aligned) {
  double loss = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kFlatThreads * kFlatVector;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x) * kFlatVector; first < count; first += step) {
    const bool vectorized = aligned && first + kFlatVector <= count;
    const auto load_side = [&](const View& view, float (&values)[kFlatVector]) {
      dispatch_floating(view.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const T* const source = static_cast<const T*>(view.data) + first;
        if (vectorized) {
          load(source, values);
          return;
        }
#pragma unroll
        for (int i = 0; i < kFlatVector; ++i) {
          values[i] = first + i < count ? widen(source[i]) : 0.0f;
        }
      });
    };
    float student[kFlatVector];
    float teacher[kFlatVector];
    load_side(problem.student, student);
    load_side(problem.teacher, teacher);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kFlatVector; ++i) {
      sum += L1::loss(student[i], teacher[i]);
      student[i] = L1::gradient(student[i], teacher[i]);
    }
    loss += sum;
    if (problem.student_grad_unscaled.data == nullptr) {
      continue;
    }
    auto* const signs = static_cast<int8_t*>(problem.student_grad_unscaled.data) + first;
    if (vectorized) {
      store(signs, student);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kFlatVector; ++i) {
      if (first + i < count) {
        narrow(student[i], signs[i]);
      }
    }
  }
  write_results<kFlatThreads>(problem, loss, 0);
}

// ---- Tiles of rows in shared memory

// A tensor of dense rows. Its tile has the same bytes in shared memory, except that a vector of padding follows each row of an
// even number of vectors. Threads that read the same class of adjacent rows then access each bank at most 4 times, which takes
// less time than the computation; without padding, 32 times for rows of 128 bytes.
struct DenseRows {
  char* data;  // null if not required
  uint32_t row_bytes;
  uint32_t pitch;             // row_bytes and padding
  uint32_t inverse_vectors;   // 2³² / vectors per row, rounded up, of padded rows; else 0
  Dtype dtype;
};

struct DenseProblem {
  DenseRows student;
  DenseRows teacher;
  DenseRows student_grad_unscaled;
  DenseRows teacher_grad_unscaled;
};

constexpr int kMaxDenseClasses = 32;

template <int kPerThread>
constexpr int kTileRows = kPerThread <= 16 ? 256 : 128;  // and threads

// Numbers of classes that are multiples of 8 may have padded rows.
template <int kPerThread>
constexpr int kTileVectors = kTileRows<kPerThread> * (kPerThread * 4 + (kPerThread % 8 == 0 ? 16 : 0)) / 16;

// Calls `copy_vector(shared, global)` for 16 bytes and `copy_byte` for what is left of the last tile.
template <int kRows, typename CopyVector, typename CopyByte>
__device__ __forceinline__ void for_each_vector(
    const DenseRows& side, int64_t first_row, int rows, uint4* tile, CopyVector&& copy_vector, CopyByte&& copy_byte) {
  char* const global = side.data + first_row * side.row_bytes;
  const uint32_t bytes = rows * side.row_bytes;
  const uint32_t vectors = bytes / 16;
  for (uint32_t i = threadIdx.x; i < vectors; i += kRows) {
    copy_vector(tile + i + __umulhi(i, side.inverse_vectors), reinterpret_cast<uint4*>(global) + i);
  }
  if (const uint32_t i = vectors * 16 + threadIdx.x; i < bytes) {  // rows are not padded here: a padded one is whole vectors
    copy_byte(reinterpret_cast<char*>(tile) + i, global + i);
  }
}

template <int kRows>
__device__ __forceinline__ void copy_to_shared(const DenseRows& side, int64_t first_row, int rows, uint4* tile) {
  for_each_vector<kRows>(
      side,
      first_row,
      rows,
      tile,
      [](uint4* shared, const uint4* global) { __pipeline_memcpy_async(shared, global, 16); },
      [](char* shared, const char* global) { *shared = *global; });
}

template <int kRows>
__device__ __forceinline__ void copy_to_global(const DenseRows& side, int64_t first_row, int rows, uint4* tile) {
  if (side.data == nullptr) {
    return;
  }
  for_each_vector<kRows>(
      side,
      first_row,
      rows,
      tile,
      [](const uint4* shared, uint4* global) { __stcg(global, *shared); },
      [](const char* shared, char* global) { *global = *shared; });
}

// Loads the thread's row; classes beyond the last are masked, so that the softmax needs no conditions.
template <int kPerThread>
__device__ __forceinline__ void load_row(const DenseRows& side, int classes, const uint4* tile, float (&values)[kPerThread]) {
  constexpr int kFewest = kPerThread == 8 ? 1 : kPerThread <= 16 ? kPerThread - 3 : kPerThread - 7;
  dispatch_floating(side.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const row = reinterpret_cast<const T*>(reinterpret_cast<const char*>(tile) + threadIdx.x * side.pitch);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      values[i] = i < kFewest || i < classes ? widen(row[i]) : -INFINITY;
    }
  });
}

template <int kPerThread>
__device__ __forceinline__ void store_row(const DenseRows& side, int classes, uint4* tile, const float (&values)[kPerThread]) {
  if (side.data == nullptr) {
    return;
  }
  dispatch_floating_or_int8(side.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* const row = reinterpret_cast<T*>(reinterpret_cast<char*>(tile) + threadIdx.x * side.pitch);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (i < classes) {
        narrow(values[i], row[i]);
      }
    }
  });
}

template <typename Loss, int kPerThread>
__global__ void __launch_bounds__(kTileRows<kPerThread>)
    dense_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DenseProblem dense) {
  constexpr int kRows = kTileRows<kPerThread>;
  constexpr bool kIsL1 = std::is_same_v<Loss, L1>;
  __shared__ uint4 student_tile[kTileVectors<kPerThread>];
  __shared__ uint4 teacher_tile[kTileVectors<kPerThread>];
  const int classes = problem.classes;
  double loss = 0;
  int agreements = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < problem.rows; first += static_cast<int64_t>(gridDim.x) * kRows) {
    const int rows = static_cast<int>(min(problem.rows - first, static_cast<int64_t>(kRows)));
    copy_to_shared<kRows>(dense.student, first, rows, student_tile);
    copy_to_shared<kRows>(dense.teacher, first, rows, teacher_tile);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    const bool active = static_cast<int>(threadIdx.x) < rows;
    float student[kPerThread];
    float teacher[kPerThread];
    if (active) {
      load_row(dense.student, classes, student_tile, student);
      load_row(dense.teacher, classes, teacher_tile, teacher);
      loss += compare_row<Loss>(problem, Row{0, 0, 0, kIsL1 ? classes : kPerThread, 1}, student, teacher, agreements);
    }
    if constexpr (kIsL1) {
      __syncthreads();  // signs are smaller than logits: they overwrite other rows
    }
    if (active) {
      store_row(dense.student_grad_unscaled, classes, student_tile, student);
      store_row(dense.teacher_grad_unscaled, classes, teacher_tile, teacher);
    }
    __syncthreads();
    copy_to_global<kRows>(dense.student_grad_unscaled, first, rows, student_tile);
    copy_to_global<kRows>(dense.teacher_grad_unscaled, first, rows, teacher_tile);
    __syncthreads();  // before the next tile
  }
  write_results<kRows>(problem, loss, agreements);
}

// ---- Host code

inline bool has_dense_rows(const View& view, const Shape& shape) {
  return (shape.channels == 1 || view.channel == 1) && (shape.pixels == 1 || (view.gap == 0 && view.pixel == shape.channels)) &&
         (shape.images == 1 || view.image == shape.channels * shape.pixels) && is_aligned(view.data, 16);
}

inline DenseRows dense_rows_of(const View& view, int32_t classes) {
  const auto row_bytes = static_cast<uint32_t>(classes * element_size(view.dtype));
  const bool padded = row_bytes % 32 == 0;
  const uint32_t vectors = row_bytes / 16;
  return {
      static_cast<char*>(view.data),
      row_bytes,
      row_bytes + (padded ? 16 : 0),
      padded ? static_cast<uint32_t>(((1ull << 32) + vectors - 1) / vectors) : 0,
      view.dtype};
}

// Whether the elements of a tensor fill its memory without gaps or overlaps, in any order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) {
      dimensions.emplace_back(tensor.stride(i), tensor.size(i));
    }
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  return std::all_of(dimensions.begin(), dimensions.end(), [&](const auto& dimension) {
    return std::exchange(expected, expected * dimension.second) == dimension.first;
  });
}

inline bool have_same_offsets(const View& one, const View& other) {
  return one.image == other.image && one.channel == other.channel && one.pixel == other.pixel && one.width == other.width &&
         one.gap == other.gap;
}

}  // namespace dfkd_fast
