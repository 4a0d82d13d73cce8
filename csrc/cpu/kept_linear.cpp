// Gradients of a linear layer whose weight is stored as kept rows.
#include <vector>

#include "sparse.h"
#include "transposed.h"

namespace dst {
namespace {

// dX = dY W: each weight adds a block of dY, times itself, to a block of dX.
template <int width, typename Column>
DST_FUNCTION void scatter(const SparseRows& w, const float* values, const float* grads,
                          float* sums) {
  constexpr int vectors = width / kLanes;
  const Column* columns = static_cast<const Column*>(w.columns);
  for (int64_t row = 0; row < w.rows; ++row, grads += width) {
    const int64_t at = w.begin(row), end = at + w.count(row);
    Vector grad[vectors];
    for (int v = 0; v < vectors; ++v) grad[v] = load(grads + v * kLanes);
    for (int64_t j = at; j < end; ++j) {
      float* sum = sums + static_cast<int64_t>(columns[j]) * width;
      const float value = values[j];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        store(load(sum + v * kLanes) + value * grad[v], sum + v * kLanes);
      }
    }
  }
}

template <typename Column>
DST_FUNCTION void scatter(const SparseRows& w, const float* values, int width, const float* grads,
                          float* sums) {
  switch (width) {
    case 8:
      return scatter<8, Column>(w, values, grads, sums);
    case 16:
      return scatter<16, Column>(w, values, grads, sums);
    case 32:
      return scatter<32, Column>(w, values, grads, sums);
    default:
      return scatter<64, Column>(w, values, grads, sums);
  }
}

DST_CLONES void grad_input_block(const SparseRows& w, const float* values, const Matrix& grad,
                                 const Matrix& result, const Block& grads, const Block& sums) {
  const bool wide = w.dtype == ScalarType::Float;
  wide ? pack_columns<float>(grad, grads, 0, grad.columns)
       : pack_columns<BFloat16>(grad, grads, 0, grad.columns);
  std::fill_n(sums.packed, result.columns * sums.width, 0.0f);
  w.small ? scatter<uint16_t>(w, values, sums.width, grads.packed, sums.packed)
          : scatter<int32_t>(w, values, sums.width, grads.packed, sums.packed);
  wide ? unpack_columns<float>(sums, result, 0, result.columns)
       : unpack_columns<BFloat16>(sums, result, 0, result.columns);
}

}  // namespace

Tensor kept_linear_grad_input(const Tensor& grad, const Tensor& values, const Tensor& columns,
                              const Tensor& places) {
  SparseRows weight =
      SparseRows::scattered("kept_linear_grad_input", grad, values, columns, places, std::nullopt);
  std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
  STD_TORCH_CHECK(!shape.empty() && shape.back() == weight.rows && values.dim() == 2,
                  "kept_linear_grad_input: grad must be [..., rows] for values [rows, columns]");
  int64_t inputs = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) inputs *= shape[i];
  const int64_t features = values.size(1);
  shape.back() = features;
  Tensor result = new_contiguous(grad, shape);
  if (inputs == 0 || features == 0) return result;
  const Matrix from{grad.data_ptr(), inputs, weight.rows}, to{result.data_ptr(), inputs, features};
  const float* operands = weight.values();
  // Each sum has one order, whatever the width: narrow blocks where threads would have none.
  const int64_t threads = torch::stable::get_num_threads();
  int widest = features <= 2048 ? kWidest : kWidest / 2;
  while (widest > kLanes && inputs < threads * widest) widest /= 2;
  const int64_t blocks = (inputs + widest - 1) / widest;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> grads(Use::kPacked, weight.rows * widest);
    const Scratch<float> sums(Use::kSums, features * widest);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * widest;
      const int width = block_width(inputs - first, widest);
      grad_input_block(weight, operands, from, to, {first, width, grads.get()},
                       {first, width, sums.get()});
    }
  });
  return result;
}

}  // namespace dst
