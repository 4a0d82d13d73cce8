// The gradient of a convolution's input, whose weight is stored as kept rows.
//
// dX is a convolution of dY with the transposed weight. One phase of the stride of dX reads taps of
// its own: its elements, as a plane, are a convolution of dY with stride 1. So a row of the
// transposed weight has the weights of one input channel and one phase.
#include <cstring>

#include "conv.h"

namespace dst {
namespace {

// Elements of one phase, as of a plane, that belong to the image.
struct Range {
  int64_t first, end;
};

Range range_of(const Axis& axis, int64_t phase) {
  const auto place = [&](int64_t element) {  // of the first one from an element on
    return std::max<int64_t>((element + axis.padding - phase + axis.stride - 1) / axis.stride, 0);
  };
  return {place(0), place(axis.size)};
}

// dY along an axis of dX. Its planes begin with what the first element of dX needs for the longest
// shift, where dX's position 0 is.
Axis axis_of_grad(const Axis& axis) {
  int64_t first = axis.size + axis.padding, end = 0;
  for (int64_t tap = 0; tap < axis.phases; ++tap) {
    const Range range = range_of(axis, axis.phase(tap));
    first = std::min(first, range.first);
    end = std::max(end, range.end);
  }
  Axis made = axis;
  made.size = axis.output;
  made.stride = made.kernel = made.dilation = made.phases = 1;
  made.padding = axis.longest_shift() - first;
  made.line = std::max(end, first) + made.padding;
  return made;
}

// The weights of each (phase, input channel), one after the other.
struct Transposed {
  std::vector<int32_t> starts;
  Scratch<float> values;
  Scratch<int32_t> offsets;
};

struct Inputs {
  Axis height, width;  // of dX
  int64_t channels, groups;
  int64_t plane, line;  // of dY

  int64_t phases() const { return height.phases * width.phases; }
};

template <typename Column>
Transposed transpose(const SparseRows& w, const float* values, const Column* columns,
                     const Inputs& call) {
  struct Place {
    int32_t row, offset;
  };
  const Axis &height = call.height, &width = call.width;
  const int64_t channels = call.channels / call.groups, rows = w.rows / call.groups;
  std::vector<Place> table;
  table.reserve(channels * height.kernel * width.kernel);
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t i = 0; i < height.kernel; ++i) {
      for (int64_t j = 0; j < width.kernel; ++j) {
        const int64_t phase = i % height.phases * width.phases + j % width.phases;
        const int64_t y = height.longest_shift() - height.shift(i);
        const int64_t x = width.longest_shift() - width.shift(j);
        table.push_back({static_cast<int32_t>(phase * call.channels + channel),
                         static_cast<int32_t>(y * call.line + x)});
      }
    }
  }
  int64_t kept = 0;
  Transposed made;
  made.starts.resize(call.phases() * call.channels + 2);
  int32_t* counts = made.starts.data() + 2;  // filling moves each start to the next row's
  for (int64_t row = 0; row < w.rows; ++row) {
    int32_t* of_group = counts + row / rows * channels;
    const int64_t at = w.begin(row), end = at + w.count(row);
    for (int64_t j = at; j < end; ++j) ++of_group[table[columns[j]].row];
    kept += end - at;
  }
  made.starts.pop_back();
  std::partial_sum(made.starts.begin(), made.starts.end(), made.starts.begin());
  made.values = Scratch<float>(Use::kSums, kept);
  made.offsets = Scratch<int32_t>(Use::kOffsets, kept);
  for (int64_t row = 0; row < w.rows; ++row) {
    int32_t* next = made.starts.data() + 1 + row / rows * channels;
    const int64_t at = w.begin(row), end = at + w.count(row);
    const int32_t base = static_cast<int32_t>(row * call.plane);
    for (int64_t j = at; j < end; ++j) {
      const Place place = table[columns[j]];
      const int32_t to = next[place.row]++;
      made.values.get()[to] = values[j];
      made.offsets.get()[to] = base + place.offset;
    }
  }
  return made;
}

}  // namespace

Tensor kept_conv_grad_input(const Tensor& grad, const Tensor& values, const Tensor& columns,
                            const Tensor& places, const Integers& geometry, const Integers& shape) {
  constexpr const char* op = "kept_conv_grad_input";
  SparseRows weight = SparseRows::scattered(op, grad, values, columns, places, std::nullopt);
  STD_TORCH_CHECK(grad.dim() == 4 && geometry.size() == 9 && shape.size() == 3, op,
                  ": grad must have 4 dimensions, geometry 9 integers, and shape 3");
  const int64_t channels = shape[0], groups = geometry[8], count = grad.size(0);
  const Axis height(op, shape[1], geometry.data()), width(op, shape[2], geometry.data() + 1);
  check_rows(op, weight, columns, channels, geometry);
  STD_TORCH_CHECK(
      grad.size(1) == weight.rows && grad.size(2) == height.output && grad.size(3) == width.output,
      op, ": grad must be [N, ", weight.rows, ", ", height.output, ", ", width.output, "]");
  Tensor result = new_contiguous(grad, {count, channels, height.size, width.size});
  if (result.numel() == 0) return result;
  const Images grads{axis_of_grad(height), axis_of_grad(width), weight.dtype, weight.rows, count,
                     grad.data_ptr()};
  const Inputs call{height, width, channels, groups, grads.plane(), grads.width.line};
  const float* wide = weight.values();
  const Transposed made =
      weight.small ? transpose(weight, wide, static_cast<const uint16_t*>(weight.columns), call)
                   : transpose(weight, wide, static_cast<const int32_t*>(weight.columns), call);
  if (call.phases() < height.stride * width.stride) {
    std::memset(result.data_ptr(), 0, result.numel() * result.element_size());
  }
  std::vector<SparseRows> rows;
  rows.reserve(call.phases());
  std::vector<Filters> parts;
  for (int64_t phase = 0; phase < call.phases(); ++phase) {
    const int64_t a = height.phase(phase / width.phases), b = width.phase(phase % width.phases);
    const Range lines = range_of(height, a), elements = range_of(width, b);
    if (lines.first >= lines.end || elements.first >= elements.end) continue;
    const int32_t* starts = made.starts.data() + phase * channels;
    rows.push_back(SparseRows(weight.dtype, starts, channels));
    const int64_t y = lines.first * height.stride + a - height.padding;
    const int64_t x = elements.first * width.stride + b - width.padding;
    const Window window{lines.first + grads.height.padding - height.longest_shift(),
                        elements.first + grads.width.padding - width.longest_shift(),
                        lines.end - lines.first,
                        elements.end - elements.first,
                        y * width.size + x,
                        height.stride * width.size,
                        width.stride};
    parts.push_back(
        {rows.back(), made.values.get() + *starts, made.offsets.get() + *starts, window});
  }
  convolve(grads, parts, result.data_ptr(), height.size * width.size);
  return result;
}

}  // namespace dst
