// Loads and stores of tensors of several dtypes, computed in float.
//
// Dtypes are kernel arguments, and a kernel branches on them around a batch of loads or stores: the branch is uniform, the
// loads of a batch are in flight together, and one kernel supports every combination of dtypes.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

namespace dfkd_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Dtype : int8_t { kFloat, kBFloat16, kHalf, kInt8 };

template <typename T>
struct Type {
  using type = T;
};

// Calls a generic lambda with the Type of a floating-point dtype.
template <typename Function>
__device__ __forceinline__ void dispatch_floating(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat:
      return function(Type<float>{});
    case Dtype::kBFloat16:
      return function(Type<__nv_bfloat16>{});
    default:
      return function(Type<__half>{});
  }
}

template <typename Function>
__device__ __forceinline__ void dispatch_floating_or_int8(Dtype dtype, Function&& function) {
  if (dtype == Dtype::kInt8) {
    return function(Type<int8_t>{});
  }
  dispatch_floating(dtype, function);
}

// Checks that a dtype is a supported floating-point dtype; `name` is used in the error message.
inline Dtype dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, not ", torch::headeronly::toString(dtype));
  }
}

__host__ __device__ constexpr int element_size(Dtype dtype) {
  return dtype == Dtype::kFloat ? 4 : dtype == Dtype::kInt8 ? 1 : 2;
}

// torch.empty_like(tensor, dtype=dtype); the stable ABI provides it without a dtype.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(tensor), from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Data pointer of a tensor that must be float32, such as per-channel constants.
inline const float* float_data(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float, name, " must be float32, not ", torch::headeronly::toString(tensor.scalar_type()));
  return static_cast<const float*>(tensor.const_data_ptr());
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(int8_t value) { return static_cast<float>(value); }

__device__ __forceinline__ void narrow(float value, float& stored) { stored = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& stored) { stored = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, __half& stored) { stored = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, int8_t& stored) { stored = static_cast<int8_t>(value); }

// Vector of at most 16 bytes, loaded and stored by one instruction.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <typename T, int kCount>
__host__ __device__ constexpr int pack_width() {
  int width = 16 / sizeof(T);
  while (kCount % width != 0) {
    width /= 2;
  }
  return width;
}

// Loads consecutive elements; the address must be aligned to the size of a Pack.
template <typename T, int kCount>
__device__ __forceinline__ void load(const T* source, float (&values)[kCount]) {
  constexpr int kWidth = pack_width<T, kCount>();
  Pack<T, kWidth> packs[kCount / kWidth];
#pragma unroll
  for (int i = 0; i < kCount / kWidth; ++i) {
    packs[i] = reinterpret_cast<const Pack<T, kWidth>*>(source)[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = widen(packs[i / kWidth].values[i % kWidth]);
  }
}

// Integer type of kBytes bytes.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16,
    uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

// nvcc splits the assignment of a Pack, even of a uint4, into stores of its elements; the intrinsic compiles to one instruction.
// It bypasses L1, which would not help: no kernel reads what it has written, and L1 is not preserved between kernels.
template <typename T, int kCount>
__device__ __forceinline__ void store(T* target, const float (&values)[kCount]) {
  constexpr int kWidth = pack_width<T, kCount>();
  using WordT = Word<sizeof(Pack<T, kWidth>)>;
  static_assert(sizeof(WordT) == sizeof(Pack<T, kWidth>));
#pragma unroll
  for (int i = 0; i < kCount / kWidth; ++i) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      narrow(values[i * kWidth + j], pack.values[j]);
    }
    WordT word;
    memcpy(&word, &pack, sizeof(word));
    __stcg(reinterpret_cast<WordT*>(target) + i, word);
  }
}

inline bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace dfkd_fast
