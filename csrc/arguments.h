// How both libraries see the tensors of a call, and what every op checks about them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <ostream>
#include <utility>
#include <vector>

#include "formulas.h"

namespace dst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

enum class Storage : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A tensor as a flat run of numbers. Without elements it is absent.
struct Array {
  void* data = nullptr;
  int64_t numel = 0;
  Storage storage = Storage::kFloat32;

  explicit operator bool() const { return numel != 0; }
};

// "weights[3]", for messages.
struct Name {
  const char* list;
  size_t index;
};

inline std::ostream& operator<<(std::ostream& stream, const Name& name) {
  return stream << name.list << '[' << name.index << ']';
}

inline std::ostream& operator<<(std::ostream& stream, Storage storage) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return stream << kNames[static_cast<int>(storage)];
}

// A weight is `rows` runs of `columns` numbers, one after the other in memory.
struct Rows {
  int64_t rows;
  int64_t columns;
};

enum class Granularity : int32_t { kRow, kLayer, kElement };

// Arithmetic is in float64 where the weight is, else in float32; thresholds are stored in it.
inline Storage arithmetic(const Array& weight) {
  return weight.storage == Storage::kFloat64 ? Storage::kFloat64 : Storage::kFloat32;
}

// New tensors with the layouts of others, and their dtypes unless one is given.
inline Tensors new_like(const Tensors& tensors, std::optional<ScalarType> dtype = {}) {
  Tensors made;
  made.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    int32_t code = 0, device = 0;
    if (dtype) {
      code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(tensor.dim(), tensor.sizes().data(),
                                                    tensor.strides().data(), code, device,
                                                    tensor.get_device_index(), &handle));
    made.emplace_back(handle);
  }
  return made;
}

// Reads the tensors of one call. All of them must be where the first weight is.
class Reader {
 public:
  // `doubles`: whether the device's kernels take float64.
  Reader(const char* op, const Tensors& weights, bool doubles)
      : op_(op), count_(weights.size()), doubles_(doubles) {
    if (count_ == 0) return;
    type_ = device_type(weights[0]);
    index_ = weights[0].get_device_index();
  }

  const char* op() const { return op_; }
  size_t count() const { return count_; }

  void check_length(const char* list, size_t given, size_t per_segment = 1) const {
    STD_TORCH_CHECK(given == per_segment * count_, op_, ": ", list, " has ", given,
                    " entries, expected ", per_segment * count_, " for ", count_, " weights");
  }

  // Any floating-point tensor that may be absent. It is walked as a flat run of memory.
  Array optional(const Tensor& tensor, Name name) const {
    check_device(tensor, name);
    check_dense(tensor, name);
    const Storage storage = storage_of(tensor, name);
    return {tensor.data_ptr(), tensor.numel(), storage};
  }

  // One that is absent or has `numel` elements.
  Array optional(const Tensor& tensor, Name name, int64_t numel) const {
    const Array array = optional(tensor, name);
    STD_TORCH_CHECK(!array || array.numel == numel, op_, ": ", name, " has ", array.numel,
                    " elements, expected ", numel, " (or none)");
    return array;
  }

  // One that must be there.
  Array required(const Tensor& tensor, Name name, int64_t numel) const {
    const Array array = optional(tensor, name);
    STD_TORCH_CHECK(array.numel == numel, op_, ": ", name, " has ", array.numel,
                    " elements, expected ", numel);
    return array;
  }

  // A number on the device: null where absent.
  const float* scalar(const Tensor& tensor, Name name) const {
    const Array array = optional(tensor, name, 1);
    check_storage(array, Storage::kFloat32, name);
    return static_cast<const float*>(array ? array.data : nullptr);
  }

  // `kept`: one int64 for each segment.
  int64_t* counts(const Tensor& tensor, const char* name) const {
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    STD_TORCH_CHECK(code == aoti_torch_dtype_int64(), op_, ": ", name, " must be int64");
    STD_TORCH_CHECK(tensor.numel() == static_cast<int64_t>(count_), op_, ": ", name, " has ",
                    tensor.numel(), " elements, expected ", count_);
    check_device(tensor, {name, 0});
    check_dense(tensor, {name, 0});
    return static_cast<int64_t*>(tensor.data_ptr());
  }

  // Rows of a weight, whose elements must lie as `Rows` says.
  Rows rows(const Tensor& tensor, Name name) const {
    STD_TORCH_CHECK(tensor.dim() > 0, op_, ": ", name, " must have at least 1 dimension");
    check_dense_rows(tensor, name);
    const int64_t rows = tensor.size(0);
    return {rows, rows == 0 ? 0 : tensor.numel() / rows};
  }

  Granularity granularity(const Array& threshold, const Array& weight, Rows shape,
                          Name name) const {
    if (threshold.numel == shape.rows) return Granularity::kRow;
    if (threshold.numel == 1) return Granularity::kLayer;
    STD_TORCH_CHECK(threshold.numel == weight.numel, op_, ": ", name, " has ", threshold.numel,
                    " elements, expected ", shape.rows, " (one per row), 1 (layer) or ",
                    weight.numel, " (element)");
    return Granularity::kElement;
  }

  // Elements fill a flat run of memory, each in a place of its own, in any order of dimensions:
  // tensors of equal strides can be walked side by side.
  void check_dense(const Tensor& tensor, Name name) const {
    if (tensor.is_contiguous()) return;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
    int64_t numel = 1, extent = 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
      numel *= sizes[i];
      extent += (sizes[i] - 1) * strides[i];
      if (sizes[i] != 1) steps.emplace_back(strides[i], sizes[i]);
    }
    std::sort(steps.begin(), steps.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : steps) {
      STD_TORCH_CHECK(numel == 0 || stride == expected, op_, ": ", name, " has ", numel,
                      " elements within ", extent,
                      "; they must be dense in memory, without gaps or overlaps");
      expected *= size;
    }
  }

  // The first dimension, too, goes from one flat run to the next.
  void check_dense_rows(const Tensor& tensor, Name name) const {
    if (tensor.is_contiguous()) return;
    if (tensor.dim() != 0 && tensor.size(0) > 1 && tensor.numel() != 0) {
      const int64_t columns = tensor.numel() / tensor.size(0);
      STD_TORCH_CHECK(tensor.stride(0) == columns, op_, ": ", name, " has stride ",
                      tensor.stride(0), " between rows of ", columns,
                      " elements; rows must be dense (contiguous or channels_last)");
    }
    check_dense(tensor, name);
  }

  void check_storage(const Array& array, Storage expected, Name name) const {
    STD_TORCH_CHECK(!array || array.storage == expected, op_, ": ", name, " is ", array.storage,
                    ", expected ", expected);
  }

  Surrogate surrogate(int64_t code, size_t index) const {
    STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Surrogate::kStraightThrough), op_,
                    ": surrogate of segment ", index, " is ", code, ", expected 0 to 3");
    return static_cast<Surrogate>(code);
  }

 private:
  static int32_t device_type(const Tensor& tensor) {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
  }

  void check_device(const Tensor& tensor, Name name) const {
    if (count_ == 0) return;
    STD_TORCH_CHECK(device_type(tensor) == type_ && tensor.get_device_index() == index_, op_, ": ",
                    name, " is not on the device of the first tensor");
  }

  Storage storage_of(const Tensor& tensor, Name name) const {
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    if (code == aoti_torch_dtype_float32()) return Storage::kFloat32;
    if (code == aoti_torch_dtype_bfloat16()) return Storage::kBFloat16;
    if (code == aoti_torch_dtype_float16()) return Storage::kFloat16;
    STD_TORCH_CHECK(doubles_ && code == aoti_torch_dtype_float64(), op_, ": ", name,
                    " has an unsupported dtype, expected float32, bfloat16, float16",
                    doubles_ ? " or float64" : "; float64 is for CPUs");
    return Storage::kFloat64;
  }

  const char* op_;
  size_t count_;
  bool doubles_;
  int32_t type_ = 0;
  int32_t index_ = 0;
};

}  // namespace dst
