// Kernels that read and write 16-byte vectors although rows have few classes or an odd number of them.
//
// L1 does not depend on the rows: dense logits are one array. For the divergences, a block copies a tile of rows to shared
// memory, each thread compares one row, and the gradients replace the logits there before they are copied back.
#pragma once

#include "discrepancy.cuh"

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <optional>
#include <utility>
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

// A tensor whose tiles are copied in vectors. Rows are interleaved, as in channels-last, or the planes of the classes are
// contiguous. A tile of planes consists of kTileRows elements of each class. A tile of interleaved rows has the same bytes as in
// global memory, except that a vector of padding follows each row of an even number of vectors. Threads that read the same class of
// adjacent rows then access each bank at most 4 times, which takes less time than the computation; without padding, 32 times for
// rows of 128 bytes.
struct Side {
  char* data;  // null if not required
  int64_t image_bytes;
  int64_t plane_bytes;
  uint32_t row_bytes;        // from a row to the next; the size of an element in planes
  uint32_t pitch;            // the same in shared memory
  uint32_t inverse_vectors;  // 2³² / vectors per row, rounded up, of padded rows; else 0
  uint32_t plane_shift;      // logarithm to base 2 of a plane's vectors in shared memory
  bool planar;
  Dtype dtype;
};

struct Sides {
  Side student;
  Side teacher;
  Side student_grad_unscaled;
  Side teacher_grad_unscaled;
  int64_t pixels;  // per image; interleaved rows of all sides are those of one image
  uint32_t tiles_per_image;
  uint32_t tiles;
};

constexpr int kMaxDenseClasses = 32;

template <int kPerThread>
constexpr int kTileRows = kPerThread <= 16 ? 256 : 128;  // and threads

// Numbers of classes that are multiples of 8 may have padded rows.
template <int kPerThread>
constexpr int kTileVectors = kTileRows<kPerThread> * (kPerThread * 4 + (kPerThread % 8 == 0 ? 16 : 0)) / 16;

// The rows of an image that a block processes at once.
struct RowTile {
  int64_t image;
  int64_t first;
  uint32_t rows;
};

// Calls `copy_vector(shared, global)` for 16 bytes and `copy_byte` for what is left of the last tile.
template <int kRows, typename CopyVector, typename CopyByte>
__device__ __forceinline__ void for_each_vector(
    const Side& side, int classes, const RowTile& tile, uint4* shared, CopyVector&& copy_vector, CopyByte&& copy_byte) {
  char* const global = side.data + tile.image * side.image_bytes + tile.first * side.row_bytes;
  const uint32_t bytes = tile.rows * side.row_bytes;
  const uint32_t vectors = bytes / 16;
  if (side.planar) {
    const uint32_t i = threadIdx.x & ((1u << side.plane_shift) - 1);  // of the class's vectors
#pragma unroll 1
    for (uint32_t c = threadIdx.x >> side.plane_shift; c < classes && i < vectors; c += kRows >> side.plane_shift) {
      copy_vector(shared + (c << side.plane_shift) + i, reinterpret_cast<uint4*>(global + c * side.plane_bytes) + i);
    }
    return;
  }
#pragma unroll 1  // a few iterations
  for (uint32_t i = threadIdx.x; i < vectors; i += kRows) {
    copy_vector(shared + i + __umulhi(i, side.inverse_vectors), reinterpret_cast<uint4*>(global) + i);
  }
  if (const uint32_t i = vectors * 16 + threadIdx.x; i < bytes) {  // rows are not padded here: a padded one is whole vectors
    copy_byte(reinterpret_cast<char*>(shared) + i, global + i);
  }
}

template <int kRows>
__device__ __forceinline__ void copy_to_shared(const Side& side, int classes, const RowTile& tile, uint4* shared) {
  for_each_vector<kRows>(
      side,
      classes,
      tile,
      shared,
      [](uint4* target, const uint4* source) { __pipeline_memcpy_async(target, source, 16); },
      [](char* target, const char* source) { *target = *source; });
}

template <int kRows>
__device__ __forceinline__ void copy_to_global(const Side& side, int classes, const RowTile& tile, uint4* shared) {
  if (side.data == nullptr) {
    return;
  }
  for_each_vector<kRows>(
      side,
      classes,
      tile,
      shared,
      [](const uint4* source, uint4* target) { __stcg(target, *source); },
      [](const char* source, char* target) { *target = *source; });
}

// Calls `visit(i, exists, element)` for i < kPerThread, where `element` is that of class i in the thread's row in shared memory.
template <typename T, int kPerThread, typename Visit>
__device__ __forceinline__ void for_each_element(const Side& side, int classes, uint4* shared, Visit&& visit) {
  constexpr int kFewest = kPerThread == 8 ? 1 : kPerThread <= 16 ? kPerThread - 3 : kPerThread - 7;
  T* const row = reinterpret_cast<T*>(reinterpret_cast<char*>(shared) + threadIdx.x * side.pitch);
  const auto visit_all = [&](auto step) {  // a constant, so that offsets are part of the instructions
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      visit(i, i < kFewest || i < classes, row + i * decltype(step)::value);
    }
  };
  if (side.planar) {
    visit_all(std::integral_constant<int, kTileRows<kPerThread>>());
  } else {
    visit_all(std::integral_constant<int, 1>());
  }
}

// Classes beyond the last are masked, so that the softmax needs no conditions.
template <int kPerThread>
__device__ __forceinline__ void load_row(const Side& side, int classes, uint4* shared, float (&values)[kPerThread]) {
  dispatch_floating(side.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_element<T, kPerThread>(
        side, classes, shared, [&](int i, bool exists, const T* element) { values[i] = exists ? widen(*element) : -INFINITY; });
  });
}

template <int kPerThread>
__device__ __forceinline__ void store_row(const Side& side, int classes, uint4* shared, const float (&values)[kPerThread]) {
  if (side.data == nullptr) {
    return;
  }
  dispatch_floating_or_int8(side.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_element<T, kPerThread>(side, classes, shared, [&](int i, bool exists, T* element) {
      if (exists) {
        narrow(values[i], *element);
      }
    });
  });
}

template <typename Loss, int kPerThread>
__global__ void __launch_bounds__(kTileRows<kPerThread>, kPerThread <= 12 ? 4 : kPerThread <= 24 ? 3 : 2)
    dense_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Sides sides) {
  constexpr int kRows = kTileRows<kPerThread>;
  constexpr bool kIsL1 = std::is_same_v<Loss, L1>;
  __shared__ uint4 student_tile[kTileVectors<kPerThread>];
  __shared__ uint4 teacher_tile[kTileVectors<kPerThread>];
  const int classes = problem.classes;
  double loss = 0;
  int agreements = 0;
  for (uint32_t index = blockIdx.x; index < sides.tiles; index += gridDim.x) {
    const uint32_t image = index / sides.tiles_per_image;
    const int64_t first = static_cast<int64_t>(index - image * sides.tiles_per_image) * kRows;
    const RowTile tile{image, first, static_cast<uint32_t>(min(sides.pixels - first, static_cast<int64_t>(kRows)))};
    copy_to_shared<kRows>(sides.student, classes, tile, student_tile);
    copy_to_shared<kRows>(sides.teacher, classes, tile, teacher_tile);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    const bool active = threadIdx.x < tile.rows;
    float student[kPerThread];
    float teacher[kPerThread];
    if (active) {
      load_row(sides.student, classes, student_tile, student);
      load_row(sides.teacher, classes, teacher_tile, teacher);
      loss += compare_row<Loss>(problem, Row{0, 0, 0, kIsL1 ? classes : kPerThread, 1}, student, teacher, agreements);
    }
    if constexpr (kIsL1) {
      __syncthreads();  // signs are smaller than logits: they overwrite other rows
    }
    if (active) {
      store_row(sides.student_grad_unscaled, classes, student_tile, student);
      store_row(sides.teacher_grad_unscaled, classes, teacher_tile, teacher);
    }
    __syncthreads();
    copy_to_global<kRows>(sides.student_grad_unscaled, classes, tile, student_tile);
    copy_to_global<kRows>(sides.teacher_grad_unscaled, classes, tile, teacher_tile);
    __syncthreads();  // before the next tile
  }
  write_results<kRows>(problem, loss, agreements);
}

// ---- Host code

// Whether 16-byte accesses are possible to planes, and to the interleaved rows of each image.
inline bool has_planes(const View& view, const Shape& shape) {
  const auto aligned = [&](int64_t stride) { return stride * element_size(view.dtype) % 16 == 0; };
  return view.pixel == 1 && view.gap == 0 && aligned(shape.pixels) && aligned(view.channel) && aligned(view.image) &&
         is_aligned(view.data, 16);
}

inline bool has_dense_rows(const View& view, const Shape& shape) {
  return (shape.channels == 1 || view.channel == 1) && (shape.pixels == 1 || (view.gap == 0 && view.pixel == shape.channels)) &&
         (shape.images == 1 || view.image == shape.channels * shape.pixels) && is_aligned(view.data, 16);
}

inline Side side_of(const View& view, const Shape& shape, int64_t tile_rows) {
  const auto size = static_cast<uint32_t>(element_size(view.dtype));
  const auto classes = static_cast<uint32_t>(shape.channels);
  const bool planar = !has_dense_rows(view, shape);
  const uint32_t row_bytes = planar ? size : classes * size;
  const bool padded = row_bytes % 32 == 0;
  const uint32_t vectors = row_bytes / 16;
  return {
      static_cast<char*>(view.data),
      view.image * size,
      view.channel * size,
      row_bytes,
      row_bytes + (padded ? 16 : 0),
      padded ? static_cast<uint32_t>(((1ull << 32) + vectors - 1) / vectors) : 0,
      static_cast<uint32_t>(std::countr_zero(static_cast<uint64_t>(tile_rows * size / 16))),
      planar,
      view.dtype};
}

// The sides of few classes that can be copied in vectors, or nothing.
inline std::optional<Sides> sides_of(const Problem& problem, const Shape& shape) {
  const View* const views[] = {&problem.student, &problem.teacher, &problem.student_grad_unscaled, &problem.teacher_grad_unscaled};
  const auto all = [&](auto permits) {
    return std::all_of(std::begin(views), std::end(views), [&](const View* view) { return view->data == nullptr || permits(*view); });
  };
  const auto interleaved = [&](const View& view) { return has_dense_rows(view, shape); };
  // Where planes and interleaved rows meet, each image starts with a whole vector, and its rows end with one.
  const auto either = [&](const View& view) {
    return has_planes(view, shape) || (interleaved(view) && shape.pixels * element_size(view.dtype) % 16 == 0);
  };
  if (shape.channels == 0 || shape.channels > kMaxDenseClasses || shape.count() == 0 || !(all(interleaved) || all(either))) {
    return std::nullopt;
  }
  const int64_t images = all(interleaved) ? 1 : shape.images;
  const int64_t pixels = shape.images * shape.pixels / images;
  const int64_t rows = shape.channels <= 16 ? kTileRows<16> : kTileRows<32>;
  const int64_t tiles_per_image = (pixels + rows - 1) / rows;
  STD_TORCH_CHECK(images * tiles_per_image <= INT32_MAX, "too many logits");
  const auto side = [&](const View& view) { return side_of(view, shape, rows); };
  return Sides{
      side(problem.student),
      side(problem.teacher),
      side(problem.student_grad_unscaled),
      side(problem.teacher_grad_unscaled),
      pixels,
      static_cast<uint32_t>(tiles_per_image),
      static_cast<uint32_t>(images * tiles_per_image)};
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
