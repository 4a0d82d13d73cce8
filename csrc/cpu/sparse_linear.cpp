// input W^T + bias for a sparse W.
//
// Inputs are transposed first, in blocks of 8 to 64, so that their numbers for one column lie side
// by side. One or two are left to sparse_linear_few.cpp.
#include "sparse_linear.h"

#include <vector>

#include "transposed.h"

namespace dst {
namespace {

constexpr int64_t kPacked = 1 << 20;  // numbers transposed at a time

DST_CLONES void pack_block(const Linear& call, const Block& block, int64_t column, int64_t end) {
  const Matrix input{call.input, call.inputs, call.features};
  if (call.weight.dtype == ScalarType::Float) {
    pack_columns<float>(input, block, column, end);
  } else {
    pack_columns<BFloat16>(input, block, column, end);
  }
}

// Eight rows at a time, as the output has them side by side.
template <int width, typename Real, typename Column>
DST_FUNCTION void multiply(const Linear& call, const float* values, const Block& block, int64_t row,
                           int64_t end) {
  constexpr int vectors = width / kLanes;
  const SparseRows& w = call.weight;
  const Column* columns = static_cast<const Column*>(w.columns);
  for (; row < end; row += kLanes) {
    const int rows = static_cast<int>(std::min<int64_t>(kLanes, end - row));
    Vector sums[kLanes][vectors] = {};
    for (int i = 0; i < rows; ++i) {
      const int64_t at = w.begin(row + i), count = w.count(row + i);
      row_times_block<width, width>(values + at, columns + at, count, block.packed, sums[i]);
      if (w.bias) {
        for (int v = 0; v < vectors; ++v) sums[i][v] += w.bias[row + i];
      }
    }
    for (int v = 0; v < vectors; ++v) {
      Vector tile[kLanes] = {};
      for (int i = 0; i < kLanes; ++i) tile[i] = sums[i][v];
      transpose(tile);
      const int64_t input = block.first + v * kLanes;
      Real* output = static_cast<Real*>(call.output) + input * w.rows + row;
      for (int i = 0; i < kLanes && input + i < call.inputs; ++i) {
        store(tile[i], rows, output + i * w.rows);
      }
    }
  }
}

template <typename Real, typename Column>
DST_FUNCTION void multiply(const Linear& call, const float* values, const Block& block, int64_t row,
                           int64_t end) {
  switch (block.width) {
    case 8:
      return multiply<8, Real, Column>(call, values, block, row, end);
    case 16:
      return multiply<16, Real, Column>(call, values, block, row, end);
    case 32:
      return multiply<32, Real, Column>(call, values, block, row, end);
    default:
      return multiply<64, Real, Column>(call, values, block, row, end);
  }
}

DST_CLONES void multiply_block(const Linear& call, const float* values, const Block& block,
                               int64_t row, int64_t end) {
  const bool small = call.weight.small;
  if (call.weight.dtype == ScalarType::Float) {
    small ? multiply<float, uint16_t>(call, values, block, row, end)
          : multiply<float, int32_t>(call, values, block, row, end);
  } else {
    small ? multiply<BFloat16, uint16_t>(call, values, block, row, end)
          : multiply<BFloat16, int32_t>(call, values, block, row, end);
  }
}

void several_inputs(const Linear& call) {
  // Blocks of more numbers leave the second-level cache.
  const int widest = call.features <= 2048 ? kWidest : kWidest / 2;
  const float* values = call.weight.values();
  const int64_t most = std::max<int64_t>(kPacked / (call.features * widest + 1), 1) * widest;
  const Scratch<float> packed(Use::kPacked, std::min(most, call.inputs + kWidest) * call.features);
  for (int64_t begin = 0; begin < call.inputs;) {
    std::vector<Block> blocks;
    const int64_t end = std::min(begin + most, call.inputs);
    float* at = packed.get();
    while (begin < end) {
      int width = block_width(end - begin, widest);
      // Less than this is sooner done as two blocks.
      if (width >= 32 && end - begin <= width / 8 * 5) width /= 2;
      blocks.push_back({begin, width, at});
      at += blocks.back().width * call.features;
      begin += blocks.back().width;
    }
    const int64_t count = blocks.size(), all = call.features;
    torch::stable::parallel_for(0, count * all, kTerms / widest, [&](int64_t from, int64_t to) {
      for (int64_t block = from / all; block * all < to; ++block) {
        pack_block(call, blocks[block], std::max<int64_t>(from - block * all, 0),
                   std::min(to - block * all, all));
      }
    });
    call.weight.share(count, widest, [&](int64_t row, int64_t rows_end, int64_t block) {
      multiply_block(call, values, blocks[block], row, rows_end);
    });
  }
}

}  // namespace

namespace {

Tensor linear(SparseRows& weight, const Tensor& input) {
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  STD_TORCH_CHECK(!shape.empty(), "input must have at least 1 dimension");
  const int64_t features = shape.back();
  int64_t inputs = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) inputs *= shape[i];
  shape.back() = weight.rows;
  Tensor output = new_contiguous(input, shape);
  const Linear call{weight, inputs, features, input.data_ptr(), output.data_ptr()};
  if (inputs > 2) {
    several_inputs(call);
  } else if (inputs == 2) {
    two_inputs(call);
  } else if (inputs == 1) {
    one_input(call);
  }
  return output;
}

}  // namespace

Tensor sparse_linear(const Tensor& given, const Tensor& values, const Tensor& columns,
                     const Tensor& row_starts, const std::optional<Tensor>& bias) {
  const Tensor input = given.is_contiguous() ? given : torch::stable::contiguous(given);
  SparseRows weight("sparse_linear", input, values, columns, row_starts, bias);
  return linear(weight, input);
}

Tensor kept_linear(const Tensor& input, const Tensor& values, const Tensor& columns,
                   const Tensor& places, const std::optional<Tensor>& bias) {
  SparseRows weight = SparseRows::scattered("kept_linear", input, values, columns, places, bias);
  STD_TORCH_CHECK(input.dim() >= 1 && input.size(-1) == columns.size(1),
                  "kept_linear: input must be [..., ", columns.size(1), "]");
  return linear(weight, input);
}

}  // namespace dst
