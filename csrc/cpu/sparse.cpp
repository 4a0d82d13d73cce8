// Reads and checks the parts of a sparse weight.
#include "sparse.h"

#include "storage.h"

namespace dst {
namespace {

void check_run(const char* op, const Tensor& tensor, const char* name, ScalarType dtype,
               int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), op, ": ", name,
                  " must be contiguous and on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, op, ": ", name, " has ", tensor.numel(),
                  " elements, expected ", numel);
}

}  // namespace

Tensor new_contiguous(const Tensor& like, const std::vector<int64_t>& shape) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

SparseRows::SparseRows(const char* op, const Tensor& input, const Tensor& values,
                       const Tensor& columns_, const Tensor& starts_,
                       const std::optional<Tensor>& bias_) {
  dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": input must be float32 or bfloat16");
  kept = values.numel();
  rows = starts_.numel() - 1;
  STD_TORCH_CHECK(rows >= 0, op, ": row_starts has no elements");
  small = columns_.scalar_type() == ScalarType::UInt16;
  check_run(op, input, "input", dtype, input.numel());
  check_run(op, values, "values", dtype, kept);
  check_run(op, columns_, "columns", small ? ScalarType::UInt16 : ScalarType::Int, kept);
  check_run(op, starts_, "row_starts", ScalarType::Int, rows + 1);
  columns = columns_.data_ptr();
  starts = static_cast<const int32_t*>(starts_.data_ptr());
  stored_ = values.data_ptr();

  bool ascends = starts[0] == 0 && starts[rows] == kept;
  for (int64_t i = 0; i < rows; ++i) ascends &= starts[i] <= starts[i + 1];
  STD_TORCH_CHECK(ascends, op, ": row_starts must ascend from 0 to the ", kept, " values");

  bias = nullptr;
  if (bias_ && rows != 0) {
    const Array array = Reader(op, {input}, true).required(*bias_, {"bias", 0}, rows);
    bias = static_cast<const float*>(array.data);
    if (array.storage != Storage::kFloat32) {
      wide_bias_ = Scratch<float>(Use::kBias, rows);
      widen(array, 0, static_cast<int>(rows), wide_bias_.get());
      bias = wide_bias_.get();
    }
  }
}

const float* SparseRows::values() {
  if (dtype == ScalarType::Float) return static_cast<const float*>(stored_);
  wide_values_ = Scratch<float>(Use::kValues, kept);
  widen({const_cast<void*>(stored_), kept, Storage::kBFloat16}, 0, static_cast<int>(kept),
        wide_values_.get());
  return wide_values_.get();
}

}  // namespace dst
