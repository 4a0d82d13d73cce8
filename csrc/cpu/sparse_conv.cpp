// A convolution with a sparse W.
#include "conv.h"

namespace dst {
namespace {

Tensor conv(const char* op, SparseRows& weight, const Tensor& input, const Integers& geometry) {
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 9, op,
                  ": input must have 4 dimensions, and geometry 9 integers");
  const int64_t channels = input.size(1), groups = geometry[8];
  STD_TORCH_CHECK(groups >= 1 && channels % groups == 0 && weight.rows % groups == 0, op,
                  ": groups must divide channels and rows");
  const Axis height(op, input.size(2), geometry.data());
  const Axis width(op, input.size(3), geometry.data() + 1);
  const Images images{height, width, weight.dtype, channels, input.size(0), input.data_ptr()};
  Tensor output = new_contiguous(input, {images.count, weight.rows, height.output, width.output});
  if (images.count == 0 || weight.rows == 0) return output;
  const Scratch<int32_t> offsets = offsets_of(weight, images, groups);
  const Window all{0, 0, height.output, width.output, 0, width.output, 1};
  convolve(images, {{weight, weight.values(), offsets.get(), all}}, output.data_ptr(),
           height.output * width.output);
  return output;
}

}  // namespace

Tensor sparse_conv(const Tensor& input, const Tensor& values, const Tensor& columns,
                   const Tensor& row_starts, const std::optional<Tensor>& bias,
                   const Integers& geometry) {
  SparseRows weight("sparse_conv", input, values, columns, row_starts, bias);
  return conv("sparse_conv", weight, input, geometry);
}

Tensor kept_conv(const Tensor& input, const Tensor& values, const Tensor& columns,
                 const Tensor& places, const std::optional<Tensor>& bias,
                 const Integers& geometry) {
  SparseRows weight = SparseRows::scattered("kept_conv", input, values, columns, places, bias);
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 9,
                  "kept_conv: input must have 4 dimensions, and geometry 9 integers");
  check_rows("kept_conv", weight, columns, input.size(1), geometry);
  return conv("kept_conv", weight, input, geometry);
}

}  // namespace dst
