// Row kernels for GPUs: one block a row, two passes over it, the second of which finds it in the
// cache. No torch headers; with DS_ALIGN_CPU_SHIM the same source compiles for a CPU, for tests of
// its logic. All sums are taken in a fixed order: the same input gives the same bits.
#pragma once

#ifdef DS_ALIGN_CPU_SHIM
#include "cpu_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "../logprob.h"

namespace ds_align {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kPack = 4;

// kCount neighbours that are loaded and stored at once.
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount) Pack {
  Element values[kCount];
};

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float as_float(__half value) { return __half2float(value); }

__device__ inline void put(float* out, float value) { *out = value; }
__device__ inline void put(__nv_bfloat16* out, float value) { *out = __float2bfloat16(value); }
__device__ inline void put(__half* out, float value) { *out = __float2half(value); }

struct Larger {
  __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The reduction over the block, in every thread.
template <typename Operation>
__device__ inline float over_block(float value, Operation operation) {
  __shared__ float partial[kThreads / kWarpSize];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) value = operation(value, partial[warp]);
  // Nobody may overwrite `partial` in a next reduction while others still read it.
  __syncthreads();
  return value;
}

__device__ inline float negative_infinity() { return -__int_as_float(0x7f800000); }

template <bool kMapped>
__device__ inline float logit_of(const LogitMap<float>& map, float raw, int64_t column) {
  if (!kMapped) return raw;
  raw = (raw + (map.bias ? map.bias[column] : 0.0f)) * map.scale;
  return map.softcap == 0.0f ? raw : tanhf(raw / map.softcap) * map.softcap;
}

// dL/draw, from L.
template <bool kMapped>
__device__ inline float slope_of(const LogitMap<float>& map, float logit) {
  if (!kMapped) return 1.0f;
  const float ratio = map.softcap == 0.0f ? 0.0f : logit / map.softcap;
  return (1.0f - ratio * ratio) * map.scale;
}

// Calls visit(column, pack or single) for this thread's share of a row: neighbours in packs of
// kCount, then the columns that are left over.
template <int kCount, typename Visit>
__device__ inline void for_my_columns(int64_t count, Visit visit) {
  const int64_t packed = count / kCount * kCount;
  for (int64_t j = int64_t{threadIdx.x} * kCount; j < packed; j += int64_t{kThreads} * kCount) {
    visit.template operator()<kCount>(j);
  }
  for (int64_t j = packed + threadIdx.x; j < count; j += kThreads) visit.template operator()<1>(j);
}

template <typename Logit, bool kMapped>
struct MaximumVisit {
  const Logit* row;
  const LogitMap<float>& map;
  float& maximum;

  template <int kCount>
  __device__ void operator()(int64_t j) {
    const Pack<Logit, kCount> pack = *reinterpret_cast<const Pack<Logit, kCount>*>(row + j);
    for (int k = 0; k < kCount; ++k) {
      maximum = Larger()(maximum, logit_of<kMapped>(map, as_float(pack.values[k]), j + k));
    }
  }
};

template <typename Logit, typename Out, bool kMapped>
struct SumVisit {
  const Logit* row;
  const LogitMap<float>& map;
  float shift;
  Out* weights;
  float& total;
  float& squares;
  float& logit_sum;

  template <int kCount>
  __device__ void operator()(int64_t j) {
    const Pack<Logit, kCount> pack = *reinterpret_cast<const Pack<Logit, kCount>*>(row + j);
    Pack<Out, kCount> result;
    for (int k = 0; k < kCount; ++k) {
      const float logit = logit_of<kMapped>(map, as_float(pack.values[k]), j + k);
      const float value = expf(logit - shift);
      total += value;
      squares += value * value;
      logit_sum += logit;
      put(&result.values[k], value * slope_of<kMapped>(map, logit));
    }
    if (weights != nullptr) *reinterpret_cast<Pack<Out, kCount>*>(weights + j) = result;
  }
};

template <typename Logit, typename Out, int kCount, bool kMapped>
__global__ void lse_kernel(LseTile<Logit, float, Out> tile) {
  const int64_t i = blockIdx.x;
  const Logit* row = tile.logits + i * tile.logits_stride;
  Out* weights = tile.weights == nullptr ? nullptr : tile.weights + i * tile.weights_stride;
  float* state = tile.state + i;
  const int64_t stride = tile.state_stride;
  const int64_t column = tile.labels[i] - tile.first;
  const bool has_label = column >= 0 && column < tile.num_columns;
  // Before the first barrier: the second pass may overwrite the row.
  const float label_logit =
      has_label ? logit_of<kMapped>(tile.map, as_float(row[column]), column) : 0.0f;

  float maximum = negative_infinity();
  for_my_columns<kCount>(tile.num_columns, MaximumVisit<Logit, kMapped>{row, tile.map, maximum});
  const float before = state[kMaximum * stride];
  maximum = Larger()(before, over_block(maximum, Larger()));
  // While all logits so far are -inf, (-inf) - (-inf) would be NaN; relative to 0 their
  // exponentials are 0.
  const float shift = maximum == negative_infinity() ? 0.0f : maximum;

  float total = 0.0f, squares = 0.0f, logit_sum = 0.0f;
  for_my_columns<kCount>(
      tile.num_columns,
      SumVisit<Logit, Out, kMapped>{row, tile.map, shift, weights, total, squares, logit_sum});
  total = over_block(total, Sum());
  if (tile.statistics & kWithSquares) squares = over_block(squares, Sum());
  if (tile.statistics & kWithLogitSum) logit_sum = over_block(logit_sum, Sum());
  if (threadIdx.x != 0) return;
  const float shrink = expf(before - shift);
  state[kMaximum * stride] = maximum;
  state[kTotal * stride] = state[kTotal * stride] * shrink + total;
  state[kShrink * stride] = shrink;
  if (tile.statistics & kWithSquares) {
    state[kSquares * stride] = state[kSquares * stride] * (shrink * shrink) + squares;
  }
  if (tile.statistics & kWithLogitSum) state[kLogitSum * stride] += logit_sum;
  if (has_label) {
    state[kLabelLogit * stride] = label_logit;
    state[kLabelSlope * stride] = slope_of<kMapped>(tile.map, label_logit);
  }
}

template <typename Logit, typename Out, bool kMapped>
struct GradVisit {
  const Logit* row;
  const LogitMap<float>& map;
  float maximum;
  float factor;
  float grad;
  int64_t column;
  bool is_ignored;
  Out* out;

  template <int kCount>
  __device__ void operator()(int64_t j) {
    const Pack<Logit, kCount> pack = *reinterpret_cast<const Pack<Logit, kCount>*>(row + j);
    Pack<Out, kCount> result;
    for (int k = 0; k < kCount; ++k) {
      const float logit = logit_of<kMapped>(map, as_float(pack.values[k]), j + k);
      const float value = expf(logit - maximum) * factor + (j + k == column ? grad : 0.0f);
      put(&result.values[k], is_ignored ? 0.0f : value * slope_of<kMapped>(map, logit));
    }
    *reinterpret_cast<Pack<Out, kCount>*>(out + j) = result;
  }
};

template <typename Logit, typename Out, int kCount, bool kMapped>
__global__ void grad_kernel(GradTile<Logit, float, Out> tile) {
  const int64_t i = blockIdx.x;
  const float grad = tile.grad[i];
  GradVisit<Logit, Out, kMapped> visit{
      tile.logits + i * tile.logits_stride,
      tile.map,
      tile.state[kMaximum * tile.state_stride + i],
      -grad / tile.state[kTotal * tile.state_stride + i],
      grad,
      tile.labels[i] - tile.first,
      tile.labels[i] < 0,
      tile.out + i * tile.out_stride,
  };
  for_my_columns<kCount>(tile.num_columns, visit);
}

inline bool is_mapped(const LogitMap<float>& map) {
  return map.bias != nullptr || map.scale != 1.0f || map.softcap != 0.0f;
}

// Whether every row begins at an address where packs may begin.
template <typename Element>
inline bool takes_packs(const Element* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % sizeof(Pack<Element, kPack>) == 0 &&
         stride % kPack == 0;
}

// Calls launch(kernel) with the instance that fits the tile: packs or single numbers, mapped or as
// they are.
template <typename Logit, typename Out, typename Launch>
void with_lse_kernel(const LseTile<Logit, float, Out>& tile, Launch launch) {
  const bool packs = takes_packs(tile.logits, tile.logits_stride) &&
                     (tile.weights == nullptr || takes_packs(tile.weights, tile.weights_stride));
  if (is_mapped(tile.map)) {
    launch(packs ? lse_kernel<Logit, Out, kPack, true> : lse_kernel<Logit, Out, 1, true>);
  } else {
    launch(packs ? lse_kernel<Logit, Out, kPack, false> : lse_kernel<Logit, Out, 1, false>);
  }
}

template <typename Logit, typename Out, typename Launch>
void with_grad_kernel(const GradTile<Logit, float, Out>& tile, Launch launch) {
  const bool packs =
      takes_packs(tile.logits, tile.logits_stride) && takes_packs(tile.out, tile.out_stride);
  if (is_mapped(tile.map)) {
    launch(packs ? grad_kernel<Logit, Out, kPack, true> : grad_kernel<Logit, Out, 1, true>);
  } else {
    launch(packs ? grad_kernel<Logit, Out, kPack, false> : grad_kernel<Logit, Out, 1, false>);
  }
}

}  // namespace ds_align
