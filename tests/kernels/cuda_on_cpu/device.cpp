#include "device.h"

#include <link.h>
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace device {
namespace {

[[noreturn]] void fail(const std::string& fault) {
  std::fprintf(stderr, "CUDA on a CPU: block (%u, %u): %s\n", blockIdx.x, blockIdx.y, fault.c_str());
  std::abort();
}

std::string text_of(const Location& location) {
  const std::string_view path = location.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(location.line());
}

// Execution context (fiber) with its own stack. Switches with longjmp, because swapcontext makes a system call.
class Context {
 public:
  Context() = default;

  explicit Context(void (*function)()) : stack_(new char[kStackSize]), bottom_(stack_.get()), size_(kStackSize) {
    getcontext(&beginning_);
    beginning_.uc_stack.ss_sp = stack_.get();
    beginning_.uc_stack.ss_size = kStackSize;
    makecontext(&beginning_, function, 0);
  }

  // Returns when another context switches to this one.
  void switch_to(Context& next) {
    left_ = this;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
    if (_setjmp(registers_) == 0) {
      begun_ = true;
      if (next.begun_) {
        _longjmp(next.registers_, 1);
      }
      setcontext(&next.beginning_);
    }
    arrive();
  }

  // Must be called first by the function of a context.
  void arrive() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, &left_->bottom_, &left_->size_);
#endif
  }

 private:
  static constexpr size_t kStackSize = 256 << 10;
  static inline Context* left_ = nullptr;

  std::unique_ptr<char[]> stack_;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  bool begun_ = false;
  ucontext_t beginning_{};
  jmp_buf registers_{};
};

void run_current_thread();

enum class State { kReady, kWaiting, kEnded };

struct Thread {
  Context context{run_current_thread};
  State state = State::kReady;
  unsigned group = 0;  // size of the group that the thread waits for, and the location
  Location location;
  unsigned exchanges = 0;
  uint64_t exchanged[2] = {};  // values of the last two exchanges; partners may not have read the older one yet
  std::vector<std::function<void()>> copies;  // begun and not finished
};

std::deque<Thread> threads;  // reused for all blocks
Thread* current = nullptr;
Context scheduler;
const std::function<void()>* current_kernel = nullptr;

void run_current_thread() {
  current->context.arrive();
  for (;;) {
    (*current_kernel)();
    current->state = State::kEnded;
    current->context.switch_to(scheduler);
  }
}

// Returns 0 … count − 1 in the order of DFKD_FAST_THREAD_ORDER.
std::vector<unsigned> ordered(unsigned count) {
  static const char* const variable = std::getenv("DFKD_FAST_THREAD_ORDER");
  static const std::string_view order = variable == nullptr ? "forward" : variable;
  static std::mt19937 generator;
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == "reverse") {
    std::reverse(numbers.begin(), numbers.end());
  } else if (order == "random") {
    std::shuffle(numbers.begin(), numbers.end(), generator);
  } else if (order != "forward") {
    fail("DFKD_FAST_THREAD_ORDER must be forward, reverse or random");
  }
  return numbers;
}

// Memory of all __shared__ variables: the thread-local storage of this library.
std::span<char> shared_memory() {
  static thread_local char marker = 0;
  std::span<char> memory(&marker, 1);  // thread-local storage is allocated at the first access
  const auto search = [](dl_phdr_info* library, size_t, void* data) {
    auto& memory = *static_cast<std::span<char>*>(data);
    for (const auto& segment : std::span(library->dlpi_phdr, library->dlpi_phnum)) {
      const std::span storage(static_cast<char*>(library->dlpi_tls_data), segment.p_memsz);
      if (segment.p_type == PT_TLS && storage.data() <= memory.data() && memory.data() < storage.data() + storage.size()) {
        memory = storage;
        return 1;
      }
    }
    return 0;
  };
  dl_iterate_phdr(search, &memory);
  return memory;
}

// If all threads of a group wait at the same location, makes them ready and returns true.
bool release_barrier(unsigned first, unsigned size) {
  const auto group = threads.begin() + first;
  const auto has_arrived = [&](const Thread& thread) {
    return thread.state == State::kWaiting && thread.group == size && thread.location.line() == group->location.line() &&
           std::strcmp(thread.location.file_name(), group->location.file_name()) == 0;
  };
  if (!std::all_of(group, group + size, has_arrived)) {
    return false;
  }
  std::for_each(group, group + size, [](Thread& thread) { thread.state = State::kReady; });
  return true;
}

[[noreturn]] void fail_of_deadlock() {
  std::map<std::string, int> counts;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    ++counts[threads[i].state == State::kEnded ? "have ended" : "wait at " + text_of(threads[i].location)];
  }
  std::string fault = "a deadlock";
  for (const auto& [what, count] : counts) {
    fault += ", " + std::to_string(count) + " threads " + what;
  }
  fail(fault);
}

// Runs a warp until every thread has ended or waits for the block.
void run_warp(unsigned first) {
  const unsigned size = std::min(kWarp, blockDim.x - first);
  do {
    for (const unsigned lane : ordered(size)) {
      if (threads[first + lane].state == State::kReady) {
        current = &threads[first + lane];
        threadIdx = {first + lane, 0, 0};
        scheduler.switch_to(current->context);
      }
    }
  } while (release_barrier(first, size));
}

void run_block() {
  const auto end = threads.begin() + blockDim.x;
  std::for_each(threads.begin(), end, [](Thread& thread) { thread.state = State::kReady; });
  do {
    for (const unsigned warp : ordered((blockDim.x + kWarp - 1) / kWarp)) {
      run_warp(warp * kWarp);
    }
  } while (release_barrier(0, blockDim.x));
  if (std::any_of(threads.begin(), end, [](const Thread& thread) { return thread.state == State::kWaiting; })) {
    fail_of_deadlock();
  }
}

}  // namespace

void launch(dim3 grid, unsigned block, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  current_kernel = &kernel;
  gridDim = grid;
  blockDim = dim3(block);
  while (threads.size() < block) {
    threads.emplace_back();
  }
  const std::span shared = shared_memory();
  for (const unsigned i : ordered(grid.x * grid.y)) {
    std::ranges::fill(shared, char(0xff));  // NaN, so that reads of uninitialized shared memory are detected
    blockIdx = {i % grid.x, i / grid.x, 0};
    run_block();
  }
}

void wait_for_group(unsigned size, const Location& location) {
  current->state = State::kWaiting;
  current->group = size;
  current->location = location;
  current->context.switch_to(scheduler);
}

uint64_t exchange(uint64_t value, unsigned partner, const Location& location) {
  const unsigned slot = current->exchanges++ % 2;
  current->exchanged[slot] = value;
  wait_for_group(kWarp, location);
  return threads[partner].exchanged[slot];
}

void copy_later(void* target, const void* source, size_t size, const Location& location) {
  if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) % size != 0) {
    fail("a misaligned copy", location);
  }
  current->copies.push_back([=] { std::memcpy(target, source, size); });
}

void finish_copies() {
  for (const auto& copy : std::exchange(current->copies, {})) {
    copy();
  }
}

void fail(const char* fault, const Location& location) {
  fail(std::string(fault) + ", thread " + std::to_string(threadIdx.x) + " at " + text_of(location));
}

}  // namespace device
