// Declarations for compiling CUDA kernels as C++, and a device that emulates them in one CPU thread.
//
// Each CUDA thread of a block is a fiber, which runs until it waits for others: for its warp in a shuffle, for the block at a
// barrier. Each warp runs as far as possible before the next. DFKD_FAST_THREAD_ORDER sets the order of blocks, warps and
// threads: forward, reverse or random.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#define _CUDA_PIPELINE_PRIMITIVES_H_  // for nvcc only; the functions are below

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#undef __shared__
#define __shared__ static thread_local  // one block runs at a time; thread-local, so that device.cpp can locate it
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace device {

using Location = std::source_location;

constexpr unsigned kWarp = 32;

// Runs `kernel` in every thread of every block and returns when all have ended.
void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel);

// Waits for all threads of the current thread's group: `size` consecutive threads, aligned to `size`.
void wait_for_group(unsigned size, const Location& location);

// Exchanges values within the warp and returns the value of the thread `partner`.
uint64_t exchange(uint64_t value, unsigned partner, const Location& location);

// Copies memory when the current thread calls `finish_copies`.
void copy_later(void* target, const void* source, size_t size, const Location& location);
void finish_copies();

// Reports a fault of the kernel and aborts.
[[noreturn]] void fail(const char* fault, const Location& location);

}  // namespace device

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

using std::max;
using std::min;

inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

inline void __syncthreads(const device::Location& location = device::Location::current()) { device::wait_for_group(blockDim.x, location); }

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

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline void __pipeline_memcpy_async(
    void* target, const void* source, size_t size, const device::Location& location = device::Location::current()) {
  device::copy_later(target, source, size, location);
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(int) { device::finish_copies(); }
