// Numbers as they are stored, read and written as float.
//
// A kernel learns the storage types of its tensors at run time, and branches on them around a batch of loads or stores:
// all threads take the same branch, the loads of a batch are in flight together, and one kernel serves every
// combination of types.
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

enum class Storage : int8_t { kFloat, kBFloat16, kHalf, kInt8 };

template <typename T>
struct Type {
  using type = T;
};

// Calls a generic lambda with the Type of a floating storage type.
template <typename Function>
__device__ __forceinline__ void with_floating(Storage storage, Function&& function) {
  switch (storage) {
    case Storage::kFloat:
      return function(Type<float>{});
    case Storage::kBFloat16:
      return function(Type<__nv_bfloat16>{});
    default:
      return function(Type<__half>{});
  }
}

template <typename Function>
__device__ __forceinline__ void with_any(Storage storage, Function&& function) {
  if (storage == Storage::kInt8) {
    return function(Type<int8_t>{});
  }
  with_floating(storage, function);
}

// Of a tensor that must have one of the floating storage types; `name` is what an error calls it.
inline Storage storage_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, not ", torch::headeronly::toString(dtype));
  }
}

__host__ __device__ constexpr int bytes_of(Storage storage) {
  return storage == Storage::kFloat ? 4 : storage == Storage::kInt8 ? 1 : 2;
}

// As torch.empty_like(tensor, dtype=dtype); the stable interface has it without a dtype.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(tensor), from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The floating arguments that a kernel reads as they are, such as means and deviations.
inline const float* floats(const Tensor& tensor, const char* name) {
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

// What one instruction moves: at most 16 bytes.
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

// Consecutive numbers; the address is a multiple of the pack's size.
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

// The integer of as many bytes as a pack.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16,
    uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

// nvcc splits the assignment of a pack, even of a uint4, into stores of its elements; the intrinsic stays one instruction.
// It bypasses L1, where no one would find what is stored: no kernel reads what it has written, and L1 is not kept from one
// kernel to the next.
template <typename T, int kCount>
__device__ __forceinline__ void store(T* target, const float (&values)[kCount]) {
  constexpr int kWidth = pack_width<T, kCount>();
  using AnyWord = Word<sizeof(Pack<T, kWidth>)>;
  static_assert(sizeof(AnyWord) == sizeof(Pack<T, kWidth>));
#pragma unroll
  for (int i = 0; i < kCount / kWidth; ++i) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      narrow(values[i * kWidth + j], pack.values[j]);
    }
    AnyWord word;
    memcpy(&word, &pack, sizeof(word));
    __stcg(reinterpret_cast<AnyWord*>(target) + i, word);
  }
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace dfkd_fast
