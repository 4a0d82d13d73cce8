// A convolution with a sparse W.
#include "conv.h"

namespace dst {
namespace {

// Where the operands of each weight begin in the planes.
Scratch<int32_t> offsets_of(const SparseRows& w, const Images& images, int64_t groups) {
  const Axis &height = images.height, &width = images.width;
  const int64_t channels = images.channels / groups;
  std::vector<int32_t> table;
  table.reserve(channels * height.kernel * width.kernel);
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t i = 0; i < height.kernel; ++i) {
      for (int64_t j = 0; j < width.kernel; ++j) {
        const int64_t phase = (channel * height.phases + i % height.phases) * width.phases;
        table.push_back(static_cast<int32_t>((phase + j % width.phases) * images.plane() +
                                             height.shift(i) * width.line + width.shift(j)));
      }
    }
  }
  const int64_t group = images.planes() / groups, rows = w.rows / groups;
  Scratch<int32_t> made(Use::kOffsets, w.stored());
  int32_t* offsets = made.get();
  const auto fill = [&](const auto* columns) {
    for (int64_t row = 0; row < w.rows; ++row) {
      const int32_t base = static_cast<int32_t>(row / rows * group);
      const int64_t at = w.begin(row), count = w.count(row);
      for (int64_t j = at; j < at + count; ++j) offsets[j] = base + table[columns[j]];
    }
  };
  w.small ? fill(static_cast<const uint16_t*>(w.columns))
          : fill(static_cast<const int32_t*>(w.columns));
  return made;
}

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
