// Just enough of CUDA for logprob_kernels.cuh on a CPU. The threads of a block are fibers of one OS
// thread, which change at barriers and shuffles; blocks run one after the other. It shows wrong
// indices, edges, labels and merges and barriers that not every thread reaches; it shows neither
// races between barriers nor speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct ShimIndex {
  unsigned x;
};
inline ShimIndex threadIdx{0};
inline ShimIndex blockIdx{0};

namespace cuda_shim {

constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool is_done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber>* fibers = nullptr;
inline const std::function<void()>* body = nullptr;
inline float slots[kMostThreads];

// Gives the other threads of the block their turn; a barrier, as all of them yield equally often.
inline void yield() {
  const unsigned self = threadIdx.x;
  swapcontext(&(*fibers)[self].context, &scheduler);
  threadIdx.x = self;
}

inline void run_fiber() {
  const unsigned self = threadIdx.x;
  (*body)();
  (*fibers)[self].is_done = true;
  swapcontext(&(*fibers)[self].context, &scheduler);
}

inline void run_block(unsigned num_threads) {
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    Fiber& fiber = (*fibers)[thread];
    fiber.is_done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (unsigned num_done = 0; num_done < num_threads;) {
    num_done = 0;
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      threadIdx.x = thread;
      swapcontext(&scheduler, &(*fibers)[thread].context);
      num_done += (*fibers)[thread].is_done;
    }
    if (num_done != 0 && num_done != num_threads) {
      std::fprintf(stderr, "%u of %u threads left while others wait at a barrier\n", num_done,
                   num_threads);
      std::abort();
    }
  }
}

inline void launch(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel) {
  std::vector<Fiber> all(num_threads);
  for (Fiber& fiber : all) fiber.stack.resize(kStackBytes);
  fibers = &all;
  body = &kernel;
  for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) run_block(num_threads);
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::yield(); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  cuda_shim::slots[threadIdx.x] = value;
  cuda_shim::yield();
  const float other = cuda_shim::slots[threadIdx.x ^ static_cast<unsigned>(distance)];
  // Nobody may fill the slots again before all have read them.
  cuda_shim::yield();
  return other;
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return __int_as_float(static_cast<int>(uint32_t{value.bits} << 16));
}
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

using __half = _Float16;
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half(float value) { return static_cast<__half>(value); }
