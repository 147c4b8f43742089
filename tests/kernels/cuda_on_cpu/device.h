// What a C++ compiler needs to compile CUDA kernels, and a device that runs them in one thread of a CPU.
//
// Each thread of a block is a fiber, which runs until it has to wait for others: in a shuffle for its warp, at a barrier for
// the block. Both are exact. Of what may run, a warp is run as far as it gets, then the next: DFKD_FAST_THREAD_ORDER says
// in which order, forward, reverse or random, and so for the threads of a warp and for blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#undef __shared__
#define __shared__ static thread_local  // one block runs at a time; thread-local, so that device.cpp can find it all
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace device {

using Location = std::source_location;

constexpr unsigned kWarp = 32;

// Calls `kernel` in every thread of every block, and returns when all have ended.
void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel);

// Waits for the rest of the current thread's group: `size` neighbours, the first of them at a multiple of `size`.
void meet(unsigned size, const Location& location);

// Brings a value to a meeting of the warp, and returns what the thread `partner` of it has brought.
uint64_t exchange(uint64_t value, unsigned partner, const Location& location);

// Reports a fault of the kernel, and aborts.
[[noreturn]] void fail(const char* fault, const Location& location);

}  // namespace device

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

using std::max;
using std::min;

inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

inline void __syncthreads(const device::Location& location = device::Location::current()) { device::meet(blockDim.x, location); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const device::Location& location = device::Location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu || blockDim.x % device::kWarp != 0) {
    device::fail("a shuffle of less than a warp", location);
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = device::exchange(bits, threadIdx.x ^ static_cast<unsigned>(lanes), location);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
void __stcg(T* target, T value, const device::Location& location = device::Location::current()) {
  if (reinterpret_cast<uintptr_t>(target) % sizeof(T) != 0) {
    device::fail("a misaligned store", location);
  }
  *target = value;
}
