// Multi-tensor exponential moving average: one launch for up to 800 tensors.
//
// The list is passed as a kernel argument, so that no host-to-device copy is needed and a captured CUDA graph contains it.
// A block processes one chunk of one tensor, found by binary search. The kernel is memory-bound: 12 bytes per float32
// element, in 16-byte accesses with eight in flight per thread.

#include "operators.h"

#include "launch.cuh"
#include "dtype.cuh"

#include <algorithm>
#include <vector>

namespace dfkd_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kVector = 4;                            // float32 elements per 16 bytes
constexpr int kChunk = kThreads * kUnroll * kVector;  // elements per block; bytes for integer tensors, which are copied
static_assert(kChunk == kThreads * sizeof(uint4));

enum class Update : int8_t { kAverage, kAverageByElements, kCopy };

struct Pair {
  void* average;
  const void* source;
  void* shadow;         // null if there is none
  int64_t count;        // elements; bytes if copied
  int32_t first_block;
  Update update;
  Dtype source_dtype;
  Dtype shadow_dtype;
};

struct Decay {
  float weight;        // 1 - decay
  const void* device;  // pointer to the decay, which overrides `weight`, or null
  bool is_double;

  __device__ float read() const {
    if (device == nullptr) {
      return weight;
    }
    return is_double ? static_cast<float>(1.0 - *static_cast<const double*>(device)) : 1.0f - *static_cast<const float*>(device);
  }
};

template <int kCapacity>
struct Table {
  Pair pairs[kCapacity];
  int32_t size;
  Decay decay;
};

// Kernel arguments are limited to 32,764 bytes; up to 4 KB have no extra cost.
using SmallTable = Table<100>;
using LargeTable = Table<800>;
static_assert(sizeof(SmallTable) <= 4096 && sizeof(LargeTable) <= 32764);

// The formula of torch.lerp, exact for weights 0 and 1.
__device__ __forceinline__ float lerp(float average, float source, float weight) {
  const float difference = source - average;
  return weight < 0.5f ? average + weight * difference : source - difference * (1.0f - weight);
}

template <int kWidth>
__device__ __forceinline__ void average_elements(const Pair& pair, int64_t begin, int64_t end, float weight) {
  float* const averages = static_cast<float*>(pair.average);
  constexpr int kStride = kThreads * kWidth;
  for (int64_t first = begin + threadIdx.x * kWidth; first < end; first += kUnroll * kStride) {
    float average[kUnroll][kWidth];
    float source[kUnroll][kWidth];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kStride < end) {
        load(averages + first + u * kStride, average[u]);
      }
    }
    dispatch_floating(pair.source_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kStride < end) {
          load(static_cast<const T*>(pair.source) + first + u * kStride, source[u]);
        }
      }
    });
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kStride < end) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          average[u][i] = lerp(average[u][i], source[u][i], weight);
        }
        store(averages + first + u * kStride, average[u]);
      }
    }
    if (pair.shadow != nullptr) {
      dispatch_floating(pair.shadow_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (first + u * kStride < end) {
            store(static_cast<T*>(pair.shadow) + first + u * kStride, average[u]);
          }
        }
      });
    }
  }
}

// Sixteen bytes per thread.
__device__ __forceinline__ void copy_bytes(const Pair& pair, int64_t begin, int64_t end) {
  const int64_t first = begin + threadIdx.x * int64_t{sizeof(uint4)};
  const auto* const source = static_cast<const char*>(pair.source);
  for (char* target : {static_cast<char*>(pair.average), static_cast<char*>(pair.shadow)}) {
    if (target == nullptr) {
      continue;
    }
    const auto addresses = reinterpret_cast<uintptr_t>(source + first) | reinterpret_cast<uintptr_t>(target + first);
    if (addresses % sizeof(uint4) == 0 && first + int64_t{sizeof(uint4)} <= end) {
      *reinterpret_cast<uint4*>(target + first) = *reinterpret_cast<const uint4*>(source + first);
    } else {
      for (int64_t i = first; i < min(first + int64_t{sizeof(uint4)}, end); ++i) {
        target[i] = source[i];
      }
    }
  }
}

template <typename TableT>
__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ TableT table) {
  int low = 0;
  for (int high = table.size; high - low > 1;) {
    const int middle = (low + high) / 2;
    (table.pairs[middle].first_block <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  const Pair& pair = table.pairs[low];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - pair.first_block) * kChunk;
  const int64_t end = min(begin + kChunk, pair.count);
  if (pair.update == Update::kCopy) {
    return copy_bytes(pair, begin, end);
  }
  const float weight = table.decay.read();
  const int64_t vectors_end = pair.update == Update::kAverage ? end / kVector * kVector : begin;
  average_elements<kVector>(pair, begin, vectors_end, weight);
  average_elements<1>(pair, vectors_end, end, weight);
}

bool is_integral(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

Pair make_pair(const Tensor& average, const Tensor& source, const Tensor* shadow) {
  Pair pair{};
  pair.average = average.mutable_data_ptr();
  pair.source = source.const_data_ptr();
  pair.shadow = shadow == nullptr ? nullptr : shadow->mutable_data_ptr();
  pair.count = average.numel();
  STD_TORCH_CHECK(source.numel() == pair.count, "a source has ", source.numel(), " elements, its average ", pair.count);
  STD_TORCH_CHECK(shadow == nullptr || shadow->numel() == pair.count, "a shadow differs in size from its average");
  const ScalarType dtype = average.scalar_type();
  if (is_integral(dtype)) {
    STD_TORCH_CHECK(
        source.scalar_type() == dtype && (shadow == nullptr || shadow->scalar_type() == dtype),
        "integers are copied to their own dtype ",
        torch::headeronly::toString(dtype),
        ", not from ",
        torch::headeronly::toString(source.scalar_type()));
    pair.count *= static_cast<int64_t>(average.element_size());
    pair.update = Update::kCopy;
    return pair;
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float, "averages must be float32 or integers, not ", torch::headeronly::toString(dtype));
  pair.source_dtype = dtype_of(source.scalar_type(), "sources");
  pair.shadow_dtype = shadow == nullptr ? Dtype::kFloat : dtype_of(shadow->scalar_type(), "shadows");
  const bool vectors = is_aligned(pair.average, kVector * 4) && is_aligned(pair.source, kVector * element_size(pair.source_dtype)) &&
                       is_aligned(pair.shadow, kVector * element_size(pair.shadow_dtype));
  pair.update = vectors ? Update::kAverage : Update::kAverageByElements;
  return pair;
}

template <typename TableT>
void launch(const Launcher& launcher, const std::vector<Pair>& pairs, size_t first, size_t last, const Decay& decay) {
  TableT table{};
  table.decay = decay;
  int64_t blocks = 0;
  for (size_t i = first; i < last; ++i) {
    Pair& pair = table.pairs[table.size++] = pairs[i];
    pair.first_block = static_cast<int32_t>(blocks);
    blocks += (pair.count + kChunk - 1) / kChunk;
  }
  launcher(ema_kernel<TableT>, blocks, kThreads, table);
}

}  // namespace

void ema_update_(
    const std::vector<Tensor>& averages,
    const std::vector<Tensor>& sources,
    const std::vector<Tensor>& shadows,
    double decay,
    const std::optional<Tensor>& device_decay) {
  STD_TORCH_CHECK(averages.size() == sources.size(), "averages and sources differ in length");
  STD_TORCH_CHECK(shadows.empty() || shadows.size() == averages.size(), "averages and shadows differ in length");
  std::vector<Pair> pairs;
  pairs.reserve(averages.size());
  for (size_t i = 0; i < averages.size(); ++i) {
    const Pair pair = make_pair(averages[i], sources[i], shadows.empty() ? nullptr : &shadows[i]);
    if (pair.count > 0) {
      pairs.push_back(pair);
    }
  }
  if (pairs.empty()) {
    return;
  }
  Decay weight{static_cast<float>(1.0 - decay), nullptr, false};
  if (device_decay.has_value()) {
    weight.is_double = device_decay->scalar_type() == ScalarType::Double;
    weight.device = weight.is_double ? device_decay->const_data_ptr() : float_data(*device_decay, "device_decay");
  }
  const Launcher launcher(averages.front());
  constexpr size_t kSmall = std::size(SmallTable{}.pairs);
  constexpr size_t kLarge = std::size(LargeTable{}.pairs);
  for (size_t first = 0; first < pairs.size(); first += kLarge) {
    const size_t last = std::min(first + kLarge, pairs.size());
    if (last - first <= kSmall) {
      launch<SmallTable>(launcher, pairs, first, last, weight);
    } else {
      launch<LargeTable>(launcher, pairs, first, last, weight);
    }
  }
}

}  // namespace dfkd_fast
