#include "torch/tensors.h"

namespace nsa::binding {

namespace {

std::string text_of(IntArrayRef sizes) {
  std::string text;
  for (const int64_t size : sizes) {
    text += (text.empty() ? "(" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  return text.empty() ? "()" : text + ")";
}

}  // namespace

std::string shape_string(const Tensor& tensor) { return text_of(tensor.sizes()); }

DType to_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

void check(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape,
           ScalarType dtype, const Tensor& like) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && (shape[i] < 0 || tensor.size(i) == shape[i]);
  }
  STD_TORCH_CHECK(same, name, " must have shape ", text_of(shape), ", got ", shape_string(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has an unexpected dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " is on another device than the rest");
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1, name,
                  " must be contiguous in its last dim, got stride ", tensor.stride(last));
}

void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

Tensor empty(const Tensor& like, IntArrayRef shape, ScalarType dtype) {
  // torch::stable::new_empty looks the operator up by name and boxes its arguments: 1 us more.
  auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      like.get(), shape.data(), static_cast<int64_t>(shape.size()), &type, /*layout=*/nullptr,
      /*device=*/nullptr, 0, /*pin_memory=*/nullptr, &tensor));
  return Tensor(tensor);
}

const int32_t* cu_seqlens_ptr(const OptTensor& cu_seqlens, const char* name, int64_t rows,
                              int64_t max_seqlen, const Tensor& like, int64_t slack) {
  if (!cu_seqlens) return nullptr;
  check(*cu_seqlens, name, {-1}, ScalarType::Int, like);
  STD_TORCH_CHECK(cu_seqlens->numel() >= 1, name, " must have at least one element");
  check_contiguous(*cu_seqlens, name);
  const int32_t* ptr = cu_seqlens->const_data_ptr<int32_t>();
  if (cu_seqlens->is_cpu()) {
    const int64_t batch = cu_seqlens->numel() - 1;
    STD_TORCH_CHECK(ptr[0] == 0 && ptr[batch] >= rows && ptr[batch] <= rows + slack, name,
                    " must start at 0 and end at the ", rows, " packed rows, got ", ptr[0], " and ",
                    ptr[batch]);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = static_cast<int64_t>(ptr[b + 1]) - ptr[b];
      STD_TORCH_CHECK(length >= 0 && length <= max_seqlen, name, ": sequence ", b, " has length ",
                      length, ", expected 0 to the maximum ", max_seqlen);
    }
  }
  return ptr;
}

}  // namespace nsa::binding
