// The operators' schemas, once, and their CPU implementation. On the stable ABI of libtorch, so
// that one binary serves torch 2.10 and later; fake and autograd registrations are in Python
// (ds_align/kernels).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "logprob_cpu.h"

namespace ds_align {
namespace {

// Numbers that one thread should have to work on before another one is worth its start.
constexpr int64_t kGrain = 32768;

template <typename Tile, typename Kernel>
void in_parallel(const Tile& tile, Kernel kernel) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tile.num_columns));
  torch::stable::parallel_for(0, tile.num_rows, grain,
                              [&](int64_t begin, int64_t end) { kernel(tile, begin, end); });
}

[[noreturn]] void refuse_dtype(const char* op, const Tensor& logits) {
  fail(op, ": logits is ", text_of(logits), "; the CPU kernels take float32, bfloat16 and float64");
}

void tile_lse_cpu(const Tensor& logits, const Tensor& labels, int64_t first, const Tensor& state,
                  std::optional<Tensor> bias, double scale, double softcap,
                  std::optional<Tensor> weights, int64_t statistics) {
  constexpr const char* kOp = "tile_lse_";
  const ScalarType dtype = logits.scalar_type();
  check_tile(kOp, logits, labels, state, bias,
             dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_map(kOp, scale, softcap);
  if (weights.has_value()) {
    check_matrix(kOp, "weights", *weights, dtype, logits.size(0), logits.size(1), logits);
  }
  const auto run = [&](auto logit, auto acc) {
    using Logit = decltype(logit);
    using Acc = decltype(acc);
    in_parallel(lse_tile<Logit, Acc, Logit>(logits, labels, first, state,
                                            map_of<Acc>(bias, scale, softcap), weights, statistics),
                [](const auto& tile, int64_t begin, int64_t end) { lse_rows(tile, begin, end); });
  };
  switch (dtype) {
    case ScalarType::Float:
      return run(float{}, float{});
    case ScalarType::BFloat16:
      return run(BFloat16{}, float{});
    case ScalarType::Double:
      return run(double{}, double{});
    default:
      refuse_dtype(kOp, logits);
  }
}

void tile_grad_cpu(const Tensor& logits, const Tensor& labels, int64_t first, const Tensor& state,
                   std::optional<Tensor> bias, double scale, double softcap, const Tensor& grad,
                   const Tensor& out) {
  constexpr const char* kOp = "tile_grad_";
  const ScalarType dtype = logits.scalar_type();
  const ScalarType acc_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tile(kOp, logits, labels, state, bias, acc_dtype);
  check_map(kOp, scale, softcap);
  check_vector(kOp, "grad", grad, acc_dtype, logits.size(0), logits);
  check_matrix(kOp, "out", out, dtype, logits.size(0), logits.size(1), logits);
  const auto run = [&](auto logit, auto acc) {
    using Logit = decltype(logit);
    using Acc = decltype(acc);
    in_parallel(grad_tile<Logit, Acc, Logit>(logits, labels, first, state,
                                             map_of<Acc>(bias, scale, softcap), grad, out),
                [](const auto& tile, int64_t begin, int64_t end) { grad_rows(tile, begin, end); });
  };
  switch (dtype) {
    case ScalarType::Float:
      return run(float{}, float{});
    case ScalarType::BFloat16:
      return run(BFloat16{}, float{});
    case ScalarType::Double:
      return run(double{}, double{});
    default:
      refuse_dtype(kOp, logits);
  }
}

}  // namespace
}  // namespace ds_align

// tile_lse_ takes a tile of raw logits into the state (see logprob.h) and may write the
// unnormalised probabilities to `weights`; tile_grad_ writes the gradient of a tile to `out`.
// Either output may be the tile.
STABLE_TORCH_LIBRARY(ds_align, library) {
  library.def(
      "tile_lse_(Tensor logits, Tensor labels, int first, Tensor(a!) state, Tensor? bias, float "
      "scale, "
      "float softcap, Tensor(b!)? weights, int statistics) -> ()");
  library.def(
      "tile_grad_(Tensor logits, Tensor labels, int first, Tensor state, Tensor? bias, float "
      "scale, "
      "float softcap, Tensor grad, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ds_align, CPU, library) {
  library.impl("tile_lse_", TORCH_BOX(&ds_align::tile_lse_cpu));
  library.impl("tile_grad_", TORCH_BOX(&ds_align::tile_grad_cpu));
}
