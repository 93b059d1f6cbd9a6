// The CUDA implementation of the operators in ops.cpp: checks, device, stream, launch.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "logprob_kernels.cuh"

namespace ds_align {
namespace {

// Launches on the current stream of the logits' device; the tile is checked and not empty.
template <typename Tile, typename Kernel>
void launch_rows(const char* op, const Tensor& logits, const Tile& tile, Kernel kernel) {
  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    fail(op, ": no current stream on cuda device ", device);
  }
  kernel<<<static_cast<unsigned>(tile.num_rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tile);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    fail(op, ": launch for logits ", text_of(logits), " failed: ", cudaGetErrorString(status));
  }
}

void check_rows(const char* op, const Tensor& logits) {
  constexpr int64_t kMostBlocks = 2147483647;
  if (logits.size(0) > kMostBlocks) {
    fail(op, ": logits is ", text_of(logits), "; expected at most ", kMostBlocks, " rows");
  }
}

// Calls run(Logit{}, Out{}) for the dtypes of a tile and what is written from it.
template <typename Run>
void with_dtypes(const char* op, const Tensor& logits, ScalarType out, Run run) {
  const ScalarType dtype = logits.scalar_type();
  if (dtype == ScalarType::Float && out == ScalarType::Float) return run(float{}, float{});
  if (dtype == ScalarType::Float && out == ScalarType::BFloat16)
    return run(float{}, __nv_bfloat16{});
  if (dtype == ScalarType::Float && out == ScalarType::Half) return run(float{}, __half{});
  if (dtype == ScalarType::BFloat16 && out == dtype) return run(__nv_bfloat16{}, __nv_bfloat16{});
  if (dtype == ScalarType::Half && out == dtype) return run(__half{}, __half{});
  fail(op, ": logits is ", text_of(logits), " and what is written is ", name_of(out),
       "; the CUDA kernels take float32, bfloat16 and float16 and write the same dtype, and from "
       "float32 all three");
}

void tile_lse_cuda(const Tensor& logits, const Tensor& labels, int64_t first, const Tensor& state,
                   std::optional<Tensor> bias, double scale, double softcap,
                   std::optional<Tensor> weights, int64_t statistics) {
  constexpr const char* kOp = "tile_lse_";
  check_tile(kOp, logits, labels, state, bias, ScalarType::Float);
  check_map(kOp, scale, softcap);
  check_rows(kOp, logits);
  const ScalarType out = weights.has_value() ? weights->scalar_type() : logits.scalar_type();
  if (weights.has_value())
    check_matrix(kOp, "weights", *weights, out, logits.size(0), logits.size(1), logits);
  with_dtypes(kOp, logits, out, [&](auto logit, auto result) {
    using Logit = decltype(logit);
    using Out = decltype(result);
    const auto tile = lse_tile<Logit, float, Out>(
        logits, labels, first, state, map_of<float>(bias, scale, softcap), weights, statistics);
    if (tile.num_rows == 0 || tile.num_columns == 0) return;
    with_lse_kernel(tile, [&](auto kernel) { launch_rows(kOp, logits, tile, kernel); });
  });
}

void tile_grad_cuda(const Tensor& logits, const Tensor& labels, int64_t first, const Tensor& state,
                    std::optional<Tensor> bias, double scale, double softcap, const Tensor& grad,
                    const Tensor& out) {
  constexpr const char* kOp = "tile_grad_";
  check_tile(kOp, logits, labels, state, bias, ScalarType::Float);
  check_map(kOp, scale, softcap);
  check_rows(kOp, logits);
  check_vector(kOp, "grad", grad, ScalarType::Float, logits.size(0), logits);
  check_matrix(kOp, "out", out, out.scalar_type(), logits.size(0), logits.size(1), logits);
  with_dtypes(kOp, logits, out.scalar_type(), [&](auto logit, auto result) {
    using Logit = decltype(logit);
    using Out = decltype(result);
    const auto tile = grad_tile<Logit, float, Out>(logits, labels, first, state,
                                                   map_of<float>(bias, scale, softcap), grad, out);
    if (tile.num_rows == 0 || tile.num_columns == 0) return;
    with_grad_kernel(tile, [&](auto kernel) { launch_rows(kOp, logits, tile, kernel); });
  });
}

}  // namespace
}  // namespace ds_align

STABLE_TORCH_LIBRARY_IMPL(ds_align, CUDA, library) {
  library.impl("tile_lse_", TORCH_BOX(&ds_align::tile_lse_cuda));
  library.impl("tile_grad_", TORCH_BOX(&ds_align::tile_grad_cuda));
}
