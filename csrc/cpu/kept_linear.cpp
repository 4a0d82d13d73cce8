// Gradients of a linear layer whose weight is stored as kept rows.
#include <vector>

#include "grad_weight.h"
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

// dW = dY^T X where weights are kept: a row's block of dY, in registers, times eight blocks of X.
template <int width, typename Column>
DST_FUNCTION void weigh(const float* grads, const Column* columns, int64_t count, const float* x,
                        bool add, float* sums) {
  constexpr int vectors = width / kLanes;
  Vector grad[vectors];
  for (int v = 0; v < vectors; ++v) grad[v] = load(grads + v * kLanes);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t rest = count - j;
    Vector terms[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = rest >= kLanes ? j + i : std::min(j + i, count - 1);
      const float* operand = x + static_cast<int64_t>(columns[at]) * width;
      terms[i] = grad[0] * load(operand);
#pragma GCC unroll 8
      for (int v = 1; v < vectors; ++v) terms[i] += grad[v] * load(operand + v * kLanes);
    }
    put_sums(add_lanes(terms), rest, add, sums + j);
  }
}

template <int width, typename Column>
DST_FUNCTION void weigh_rows(const SparseRows& w, const Block& grads, const Block& inputs,
                             int64_t row, int64_t end, float* sums) {
  const Column* columns = static_cast<const Column*>(w.columns);
  for (int64_t r = row; r < end; ++r) {
    const int64_t at = w.begin(r);
    weigh<width>(grads.packed + (r - row) * width, columns + at, w.count(r), inputs.packed,
                 inputs.first != 0, sums + at);
  }
}

template <typename Column>
DST_FUNCTION void weigh_rows(const SparseRows& w, const Block& grads, const Block& inputs,
                             int64_t row, int64_t end, float* sums) {
  switch (inputs.width) {
    case 8:
      return weigh_rows<8, Column>(w, grads, inputs, row, end, sums);
    case 16:
      return weigh_rows<16, Column>(w, grads, inputs, row, end, sums);
    case 32:
      return weigh_rows<32, Column>(w, grads, inputs, row, end, sums);
    default:
      return weigh_rows<64, Column>(w, grads, inputs, row, end, sums);
  }
}

// Numbers of rows that a block has and the matrix has not.
DST_FUNCTION void clear_rest(const Block& block, int64_t rows, int64_t column, int64_t end) {
  for (int64_t k = column; k < end && rows - block.first < block.width; ++k) {
    for (int64_t i = rows - block.first; i < block.width; ++i) {
      block.packed[k * block.width + i] = 0;
    }
  }
}

DST_CLONES void pack_inputs(const Matrix& input, bool wide, const Block& block, int64_t column,
                            int64_t end) {
  wide ? pack_columns<float>(input, block, column, end)
       : pack_columns<BFloat16>(input, block, column, end);
  clear_rest(block, input.rows, column, end);
}

DST_CLONES void grad_weight_block(const SparseRows& w, const Matrix& grad, const Block& inputs,
                                  int64_t row, int64_t end, float* grads, float* sums) {
  // As if there were no more columns than these rows.
  const size_t size = w.dtype == ScalarType::Float ? 4 : 2;
  for (; row < end; row += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, end - row);
    const Block block{inputs.first, inputs.width, grads};
    const Matrix part{static_cast<const char*>(grad.data) + row * size, grad.rows, grad.columns};
    pack_inputs(part, size == 4, block, 0, rows);
    w.small ? weigh_rows<uint16_t>(w, block, inputs, row, row + rows, sums)
            : weigh_rows<int32_t>(w, block, inputs, row, row + rows, sums);
  }
}

}  // namespace

Tensor kept_linear_grad_input(const Tensor& grad, const Tensor& values, const Tensor& columns,
                              const Tensor& places) {
  SparseRows weight =
      SparseRows::scattered("kept_linear_grad_input", grad, values, columns, places, std::nullopt);
  std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
  STD_TORCH_CHECK(!shape.empty() && shape.back() == weight.rows,
                  "kept_linear_grad_input: grad must be [..., ", weight.rows, "]");
  int64_t inputs = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) inputs *= shape[i];
  const int64_t features = columns.size(1);
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

void kept_linear_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& columns,
                             const Tensor& places, const Tensor& values) {
  const char* op = "kept_linear_grad_weight";
  const SparseRows weight = SparseRows::scattered(op, grad, values, columns, places, std::nullopt);
  check_run(op, input, "input", weight.dtype, input.numel());
  STD_TORCH_CHECK(grad.dim() >= 1 && input.dim() >= 1 && grad.size(-1) == weight.rows, op,
                  ": grad must be [..., ", weight.rows, "], and input [..., columns]");
  if (weight.rows == 0) return;
  const int64_t features = columns.size(1), inputs = grad.numel() / weight.rows;
  STD_TORCH_CHECK(input.size(-1) == features && input.numel() == inputs * features, op,
                  ": input must be [..., ", features, "], with as many rows as grad");
  const bool wide = weight.dtype == ScalarType::Float;
  const WeightSums made(weight, values);
  float* sums = made.get();
  const Matrix from{grad.data_ptr(), inputs, weight.rows}, x{input.data_ptr(), inputs, features};
  // The order of a sum depends on the width, which therefore depends on the sizes alone.
  const int widest = features <= 2048 ? kWidest : kWidest / 2;
  constexpr int64_t kPacked = 1 << 20;  // numbers transposed at a time
  const int64_t most = std::max<int64_t>(kPacked / (features * widest + 1), 1) * widest;
  const Scratch<float> packed(Use::kPacked, std::min(most, inputs + kWidest) * features);
  for (int64_t begin = 0; begin < inputs; begin += most) {
    const int64_t end = std::min(begin + most, inputs);
    std::vector<Block> blocks;
    float* at = packed.get();
    for (int64_t first = begin; first < end; first += blocks.back().width) {
      blocks.push_back({first, block_width(end - first, widest), at});
      at += blocks.back().width * features;
    }
    const int64_t count = blocks.size();
    torch::stable::parallel_for(0, count * features, kTerms / widest, [&](int64_t f, int64_t to) {
      for (int64_t block = f / features; block * features < to; ++block) {
        pack_inputs(x, wide, blocks[block], std::max<int64_t>(f - block * features, 0),
                    std::min(to - block * features, features));
      }
    });
    weight.share(1, end - begin, [&](int64_t row, int64_t rows_end, int64_t) {
      const Scratch<float> grads(Use::kOffsets, kLanes * kWidest);
      for (const Block& block : blocks) {
        grad_weight_block(weight, from, block, row, rows_end, grads.get(), sums);
      }
    });
  }
  if (inputs == 0) made.clear();
  made.finish();
}

}  // namespace dst
