// Host side of both back ends: checks of the operators' arguments, and their views as tiles. Every
// message names the operator, what it got and what it expects.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "logprob.h"

namespace ds_align {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
  }
}

// "float32 [3, 5]"
inline std::string text_of(const Tensor& tensor) {
  std::ostringstream text;
  text << name_of(tensor.scalar_type()) << " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "] on " << (tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda" : "another device");
  return text.str();
}

inline void check_vector(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         int64_t count, const Tensor& beside) {
  const bool same_place = tensor.is_cpu() == beside.is_cpu() &&
                          tensor.is_cuda() == beside.is_cuda() &&
                          tensor.get_device_index() == beside.get_device_index();
  if (tensor.dim() != 1 || tensor.size(0) != count || tensor.scalar_type() != dtype ||
      !same_place || (count > 1 && tensor.stride(0) != 1)) {
    fail(op, ": ", name, " is ", text_of(tensor), "; expected contiguous ", name_of(dtype), " [",
         count, "] beside logits ", text_of(beside));
  }
}

// A matrix whose columns are adjacent; rows may lie anywhere.
inline void check_matrix(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         int64_t rows, int64_t columns, const Tensor& beside) {
  const bool same_place = tensor.is_cpu() == beside.is_cpu() &&
                          tensor.is_cuda() == beside.is_cuda() &&
                          tensor.get_device_index() == beside.get_device_index();
  if (tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != columns ||
      tensor.scalar_type() != dtype || !same_place) {
    fail(op, ": ", name, " is ", text_of(tensor), "; expected ", name_of(dtype), " [", rows, ", ",
         columns, "] beside logits ", text_of(beside));
  }
  if (columns > 1 && tensor.stride(1) != 1) {
    fail(op, ": ", name, " has stride ", tensor.stride(1), " between columns; expected 1");
  }
}

inline void check_map(const char* op, double scale, double softcap) {
  if (!(softcap >= 0.0))
    fail(op, ": softcap is ", softcap, "; expected a positive number, or 0 for none");
  if (scale != scale) fail(op, ": scale is nan; expected a number, 1 for none");
}

// Shapes, dtypes and devices of what both operators take; acc: the dtype of the state.
inline void check_tile(const char* op, const Tensor& logits, const Tensor& labels,
                       const Tensor& state, const std::optional<Tensor>& bias, ScalarType acc) {
  if (logits.dim() != 2) fail(op, ": logits is ", text_of(logits), "; expected two dimensions");
  const int64_t rows = logits.size(0);
  check_matrix(op, "logits", logits, logits.scalar_type(), rows, logits.size(1), logits);
  check_vector(op, "labels", labels, ScalarType::Long, rows, logits);
  check_matrix(op, "state", state, acc, kStateRows, rows, logits);
  if (bias.has_value()) check_vector(op, "bias", *bias, acc, logits.size(1), logits);
}

template <typename Acc>
LogitMap<Acc> map_of(const std::optional<Tensor>& bias, double scale, double softcap) {
  return {bias.has_value() ? static_cast<const Acc*>(bias->const_data_ptr()) : nullptr,
          static_cast<Acc>(scale), static_cast<Acc>(softcap)};
}

template <typename Logit, typename Acc, typename Out>
LseTile<Logit, Acc, Out> lse_tile(const Tensor& logits, const Tensor& labels, int64_t first,
                                  const Tensor& state, const LogitMap<Acc>& map,
                                  const std::optional<Tensor>& weights, int64_t statistics) {
  LseTile<Logit, Acc, Out> tile{};
  tile.logits = static_cast<const Logit*>(logits.const_data_ptr());
  tile.logits_stride = logits.stride(0);
  tile.num_rows = logits.size(0);
  tile.num_columns = logits.size(1);
  tile.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  tile.first = first;
  tile.state = static_cast<Acc*>(state.mutable_data_ptr());
  tile.state_stride = state.stride(0);
  tile.map = map;
  if (weights.has_value()) {
    tile.weights = static_cast<Out*>(weights->mutable_data_ptr());
    tile.weights_stride = weights->stride(0);
  }
  tile.statistics = static_cast<int>(statistics);
  return tile;
}

template <typename Logit, typename Acc, typename Out>
GradTile<Logit, Acc, Out> grad_tile(const Tensor& logits, const Tensor& labels, int64_t first,
                                    const Tensor& state, const LogitMap<Acc>& map,
                                    const Tensor& grad, const Tensor& out) {
  GradTile<Logit, Acc, Out> tile{};
  tile.logits = static_cast<const Logit*>(logits.const_data_ptr());
  tile.logits_stride = logits.stride(0);
  tile.num_rows = logits.size(0);
  tile.num_columns = logits.size(1);
  tile.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  tile.first = first;
  tile.state = static_cast<const Acc*>(state.const_data_ptr());
  tile.state_stride = state.stride(0);
  tile.map = map;
  tile.grad = static_cast<const Acc*>(grad.const_data_ptr());
  tile.out = static_cast<Out*>(out.mutable_data_ptr());
  tile.out_stride = out.stride(0);
  return tile;
}

}  // namespace ds_align
