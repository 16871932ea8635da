// Torch tensors to the kernel library's views: the checks that memory safety needs, and nothing
// else. The Python functions check first and with friendlier errors; these hold for direct calls of
// torch.ops.nsa_ext too.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "nsa/params.h"

namespace nsa::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using OptTensor = std::optional<Tensor>;

std::string shape_string(const Tensor& tensor);
inline int64_t last_size(const Tensor& tensor) {
  return tensor.dim() ? tensor.size(tensor.dim() - 1) : 0;
}

DType to_dtype(const Tensor& tensor, const char* name);

/// Fails unless `tensor` has this shape (-1: any), dtype and device of `like`, and a contiguous
/// last dim.
void check(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape,
           ScalarType dtype, const Tensor& like);
void check_contiguous(const Tensor& tensor, const char* name);

/// View of (batch, seq, heads, dim); packed tensors (seq, heads, dim) have no batch. The axes of
/// seq and heads count from behind the batch.
template <class T = const void>
View<T> view(const Tensor& tensor, bool packed, int seq_axis = 0, int head_axis = 1) {
  const int first = packed ? 0 : 1;
  View<T> v;
  v.ptr = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  v.batch = packed ? 0 : tensor.stride(0);
  v.seq = tensor.stride(first + seq_axis);
  v.head = tensor.stride(first + head_axis);
  return v;
}

/// View of lse (B, Hq, Sq) or packed (Hq, total_q).
template <class T = const void>
View<T> lse_view(const Tensor& tensor, bool packed) {
  return view<T>(tensor, packed, 1, 0);
}

inline const void* data_or_null(const OptTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

/// An output tensor on the device of `like`; the kernels write every element.
Tensor empty(const Tensor& like, IntArrayRef shape, ScalarType dtype);
/// The same of the shape and dtype of `like`.
inline Tensor empty_as(const Tensor& like) { return empty(like, like.sizes(), like.scalar_type()); }
/// What an absent optional result is: shape (0,).
inline Tensor absent(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

/// cu_seqlens of packed rows: int32, contiguous, on the device of `like`; on the CPU also its
/// values are checked: from 0 to a number of rows in [rows, rows + slack], no sequence longer than
/// max_seqlen. Null where absent.
const int32_t* cu_seqlens_ptr(const OptTensor& cu_seqlens, const char* name, int64_t rows,
                              int64_t max_seqlen, const Tensor& like, int64_t slack = 0);

}  // namespace nsa::binding
