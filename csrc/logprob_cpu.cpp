// Row kernels for CPUs, compiled for several instruction sets, of which the best one that the
// machine has is taken when a kernel is called: the binary is portable.
#include "logprob_cpu.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#define DS_ALIGN_INLINE static inline __attribute__((always_inline))

namespace ds_align {
namespace {

template <typename Acc>
constexpr Acc infinity() {
  return std::numeric_limits<Acc>::infinity();
}

// SSE2, NEON and whatever else the compiler was told to assume.
#define DS_ALIGN_VECTOR_BYTES 16
namespace baseline {
#include "cpu_lanes.inl"
#include "cpu_rows.inl"
}  // namespace baseline
#undef DS_ALIGN_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DS_ALIGN_DISPATCH 1

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DS_ALIGN_VECTOR_BYTES 32
namespace avx2 {
#include "cpu_lanes.inl"
#include "cpu_rows.inl"
}  // namespace avx2
#undef DS_ALIGN_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define DS_ALIGN_VECTOR_BYTES 64
namespace avx512 {
#include "cpu_lanes.inl"
#include "cpu_rows.inl"
}  // namespace avx512
#undef DS_ALIGN_VECTOR_BYTES
#pragma GCC pop_options
#else
#define DS_ALIGN_DISPATCH 0
#endif

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

InstructionSet best_instruction_set() {
#if DS_ALIGN_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

template <typename Acc>
bool is_identity(const LogitMap<Acc>& map) {
  return map.bias == nullptr && map.scale == 1 && map.softcap == 0;
}

template <typename Logit, typename Acc, typename Out>
void lse_any(const LseTile<Logit, Acc, Out>& tile, int64_t begin, int64_t end) {
  std::vector<Acc> scratch(is_identity(tile.map) ? 0 : tile.num_columns);
  Acc* row = scratch.empty() ? nullptr : scratch.data();
#if DS_ALIGN_DISPATCH
  static const InstructionSet best = best_instruction_set();
  if (best == InstructionSet::kAvx512) return avx512::lse_rows(tile, begin, end, row);
  if (best == InstructionSet::kAvx2) return avx2::lse_rows(tile, begin, end, row);
#endif
  baseline::lse_rows(tile, begin, end, row);
}

template <typename Logit, typename Acc, typename Out>
void grad_any(const GradTile<Logit, Acc, Out>& tile, int64_t begin, int64_t end) {
  std::vector<Acc> scratch(is_identity(tile.map) ? 0 : tile.num_columns);
  Acc* row = scratch.empty() ? nullptr : scratch.data();
#if DS_ALIGN_DISPATCH
  static const InstructionSet best = best_instruction_set();
  if (best == InstructionSet::kAvx512) return avx512::grad_rows(tile, begin, end, row);
  if (best == InstructionSet::kAvx2) return avx2::grad_rows(tile, begin, end, row);
#endif
  baseline::grad_rows(tile, begin, end, row);
}

}  // namespace

void lse_rows(const LseTile<float, float, float>& tile, int64_t begin, int64_t end) {
  lse_any(tile, begin, end);
}
void lse_rows(const LseTile<BFloat16, float, BFloat16>& tile, int64_t begin, int64_t end) {
  lse_any(tile, begin, end);
}
void lse_rows(const LseTile<double, double, double>& tile, int64_t begin, int64_t end) {
  lse_any(tile, begin, end);
}
void grad_rows(const GradTile<float, float, float>& tile, int64_t begin, int64_t end) {
  grad_any(tile, begin, end);
}
void grad_rows(const GradTile<BFloat16, float, BFloat16>& tile, int64_t begin, int64_t end) {
  grad_any(tile, begin, end);
}
void grad_rows(const GradTile<double, double, double>& tile, int64_t begin, int64_t end) {
  grad_any(tile, begin, end);
}

}  // namespace ds_align
