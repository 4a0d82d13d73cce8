// Reads and checks the parts of a sparse weight.
#include "sparse.h"

#include "storage.h"

namespace dst {
void check_run(const char* op, const Tensor& tensor, const char* name, ScalarType dtype,
               int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), op, ": ", name,
                  " must be contiguous and on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, op, ": ", name, " has ", tensor.numel(),
                  " elements, expected ", numel);
}

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
                       const Tensor& columns_, const Tensor& starts,
                       const std::optional<Tensor>& bias_) {
  stored_size_ = values.numel();
  rows = starts.numel() - 1;
  STD_TORCH_CHECK(rows >= 0, op, ": row_starts has no elements");
  set_arrays(op, input, values, columns_);
  check_run(op, starts, "row_starts", ScalarType::Int, rows + 1);
  starts_ = static_cast<const int32_t*>(starts.data_ptr());
  bool ascends = starts_[0] == 0 && starts_[rows] == stored_size_;
  for (int64_t i = 0; i < rows; ++i) ascends &= starts_[i] <= starts_[i + 1];
  STD_TORCH_CHECK(ascends, op, ": row_starts must ascend from 0 to the ", stored_size_, " values");
  set_bias(op, input, bias_);
}

SparseRows SparseRows::scattered(const char* op, const Tensor& input, const Tensor& values,
                                 const Tensor& columns, const Tensor& places,
                                 const std::optional<Tensor>& bias) {
  SparseRows made;
  made.stored_size_ = values.numel();
  made.rows = places.size(0);
  check_run(op, places, "places", ScalarType::Int, 2 * made.rows);
  made.places_ = static_cast<const int32_t*>(places.data_ptr());
  made.set_arrays(op, input, values, columns);
  STD_TORCH_CHECK(columns.dim() == 2 && columns.size(0) == made.rows, op, ": columns must have ",
                  made.rows, " rows, one for each of places");
  made.counted_.resize(made.rows + 1);
  for (int64_t i = 0; i < made.rows; ++i) {
    const int32_t begin = made.places_[2 * i], end = made.places_[2 * i + 1];
    STD_TORCH_CHECK(begin >= 0 && begin <= end && end <= made.stored_size_, op, ": places[", i,
                    "] are ", begin, " and ", end, ", but there are ", made.stored_size_,
                    " values");
    made.counted_[i + 1] = made.counted_[i] + (end - begin);
  }
  made.starts_ = made.counted_.data();  // which stay where they are when `made` is moved
  made.set_bias(op, input, bias);
  return made;
}

SparseRows::SparseRows(ScalarType dtype, const int32_t* starts, int64_t rows)
    : rows(rows), dtype(dtype), counted_(starts, starts + rows + 1) {
  for (int32_t& start : counted_) start -= *starts;
  starts_ = counted_.data();
  stored_size_ = counted_.back();
}

void SparseRows::set_arrays(const char* op, const Tensor& input, const Tensor& values,
                            const Tensor& columns_) {
  dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": input must be float32 or bfloat16");
  small = columns_.scalar_type() == ScalarType::UInt16;
  check_run(op, input, "input", dtype, input.numel());
  check_run(op, values, "values", dtype, stored_size_);
  // Under a fixed mask there are no more values than are kept.
  const int64_t all = places_ ? std::max(stored_size_, columns_.numel()) : stored_size_;
  check_run(op, columns_, "columns", small ? ScalarType::UInt16 : ScalarType::Int, all);
  columns = columns_.data_ptr();
  stored_ = values.data_ptr();
}

void SparseRows::set_bias(const char* op, const Tensor& input, const std::optional<Tensor>& bias_) {
  if (!bias_ || rows == 0) return;
  const Array array = Reader(op, {input}, true).required(*bias_, {"bias", 0}, rows);
  bias = static_cast<const float*>(array.data);
  if (array.storage == Storage::kFloat32) return;
  wide_bias_ = Scratch<float>(Use::kBias, rows);
  widen(array, 0, static_cast<int>(rows), wide_bias_.get());
  bias = wide_bias_.get();
}

const float* SparseRows::values() {
  if (dtype == ScalarType::Float) return static_cast<const float*>(stored_);
  wide_values_ = Scratch<float>(Use::kValues, stored_size_);
  const Array all{const_cast<void*>(stored_), stored_size_, Storage::kBFloat16};
  if (!places_) {
    widen(all, 0, static_cast<int>(stored_size_), wide_values_.get());
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = begin(row);
      widen(all, at, static_cast<int>(count(row)), wide_values_.get() + at);
    }
  }
  return wide_values_.get();
}

}  // namespace dst
