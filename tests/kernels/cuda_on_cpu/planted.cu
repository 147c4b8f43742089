// A kernel with a selectable fault, which the device or the sanitizers must detect.

#include <cstdio>
#include <memory>
#include <string_view>

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 2;

struct alignas(16) Pack {
  float values[4];
};

// Reverses the numbers of each block.
__global__ void reverse(std::string_view fault, const float* numbers, float* reversed) {
  __shared__ float copies[kThreads];
  const unsigned thread = threadIdx.x;
  const unsigned first = blockIdx.x * kThreads;
  if (fault != "memory of another block" || blockIdx.x == 0) {
    __pipeline_memcpy_async(copies + thread, numbers + first + thread + (fault == "out of bounds"), sizeof(float));
  }
  if (fault != "no wait for a copy") {
    __pipeline_wait_prior(0);
  }
  if (fault == "misaligned load") {
    const Pack pack = *reinterpret_cast<const Pack*>(numbers + first + thread / 4 * 4 + 1);
    copies[thread] = pack.values[thread % 4];
  }
  if (fault != "no barrier before reading" && (fault != "barrier of some" || thread < 32)) {
    __syncthreads();
  }
  if (fault == "misaligned store") {
    __stcg(reinterpret_cast<float2*>(reversed + first + thread / 2 * 2 + 1), make_float2(0, 0));
  }
  float number = copies[kThreads - 1 - thread + (fault == "out of bounds in shared memory")];
  if (thread < 32) {  // no fault: the other warp waits at the barrier meanwhile
    number = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, number, 31), 31);
  }
  if (fault != "no barrier before writing") {
    __syncthreads();
  }
  copies[thread] = -1;
  reversed[first + thread] = number;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void run(const char* fault) {
  constexpr int kCount = kBlocks * kThreads;
  const auto numbers = std::make_unique<float[]>(kCount);
  const auto reversed = std::make_unique<float[]>(kCount);
  for (int i = 0; i < kCount; ++i) {
    numbers[i] = static_cast<float>(i);
  }
  device::launch(kBlocks, kThreads, [&] { reverse(fault, numbers.get(), reversed.get()); });
  for (int i = 0; i < kCount; ++i) {
    std::printf("%g ", reversed[i]);
  }
}
