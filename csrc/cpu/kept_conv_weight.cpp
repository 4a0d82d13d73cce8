// The gradient of a convolution's weight, where it is kept.
//
// That of one weight is the sum of all dY of its filter, each times what the weight was multiplied
// with: elements of X's planes, from the weight's offset on. Vectors are kLanes images side by side
// or, where there are fewer images, neighbours in a line.
#include "conv.h"
#include "grad_weight.h"

namespace dst {
namespace {

constexpr int64_t kPacked = 1 << 20;  // numbers laid out at a time
constexpr int kVectors = kWidest / kLanes;

// Vectors that are multiplied together.
struct Block {
  int64_t grads;  // where they begin in dY's planes
  int count;
  int64_t inputs[kVectors];  // where each begins in X's planes, behind a weight's offset
  Mask inside[kVectors];     // numbers that belong to the line
};

std::vector<Block> blocks_of(const Images& inputs, int side) {
  const int64_t width = inputs.width.output, step = kLanes / side;  // positions of a vector
  const int64_t of_line = (width + step - 1) / step, all = inputs.height.output * of_line;
  std::vector<Block> blocks;
  for (int64_t done = 0; done < all; done += blocks.back().count) {
    Block block{done * kLanes, kVectors, {}, {}};
    while (block.count > all - done) block.count /= 2;
    for (int v = 0; v < block.count; ++v) {
      const int64_t y = (done + v) / of_line, x = (done + v) % of_line * step;
      block.inputs[v] = (y * inputs.width.line + x) * side;
      for (int i = 0; i < kLanes; ++i) block.inside[v][i] = x + i / side < width ? -1 : 0;
    }
    blocks.push_back(block);
  }
  return blocks;
}

// dY, as planes whose lines are whole vectors.
Images planes_of_grad(const Images& inputs, int64_t rows, int side, const void* data) {
  const auto axis = [](const Axis& of, int64_t line) {
    Axis made = of;
    made.size = made.output = of.output;
    made.kernel = made.stride = made.dilation = made.phases = 1;
    made.padding = 0;
    made.line = line;
    return made;
  };
  const int64_t width = inputs.width.output, step = kLanes / side;
  return {axis(inputs.height, inputs.height.output),
          axis(inputs.width, (width + step - 1) / step * step),
          inputs.dtype,
          rows,
          inputs.count,
          data};
}

// Adds a filter's block of dY, in registers, times the blocks of X of its weights, to the sums of
// these; `add`: else the sums begin with it.
template <int vectors, int side>
DST_FUNCTION void weigh(const Block& block, const float* grads, const int32_t* offsets,
                        int64_t count, const float* x, bool add, float* sums) {
  Vector grad[vectors];
  for (int v = 0; v < vectors; ++v) grad[v] = load(grads + v * kLanes);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t rest = count - j;
    Vector terms[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = rest >= kLanes ? j + i : std::min(j + i, count - 1);
      const float* operand = x + static_cast<int64_t>(offsets[at]) * side;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        Vector input = load(operand + block.inputs[v]);
        // What lies between two lines may be infinite, and so must not be multiplied with 0.
        if constexpr (side == 1) input = (Vector)((Mask)input & block.inside[v]);
        terms[i] = v == 0 ? grad[v] * input : terms[i] + grad[v] * input;
      }
    }
    put_sums(add_lanes(terms), rest, add, sums + j);
  }
}

struct Call {
  const SparseRows& weight;
  const int32_t* offsets;
  int64_t plane;  // numbers of dY for a row
};

template <int vectors, int side>
DST_FUNCTION void weigh_rows(const Call& call, const Block& block, const float* x,
                             const float* grads, bool add, int64_t row, int64_t end, float* sums) {
  for (; row < end; ++row) {
    const int64_t at = call.weight.begin(row);
    weigh<vectors, side>(block, grads + row * call.plane + block.grads, call.offsets + at,
                         call.weight.count(row), x, add, sums + at);
  }
}

template <int side>
DST_FUNCTION void weigh_rows(const Call& call, const Block& block, const float* x,
                             const float* grads, bool add, int64_t row, int64_t end, float* sums) {
  switch (block.count) {
    case 1:
      return weigh_rows<1, side>(call, block, x, grads, add, row, end, sums);
    case 2:
      return weigh_rows<2, side>(call, block, x, grads, add, row, end, sums);
    case 4:
      return weigh_rows<4, side>(call, block, x, grads, add, row, end, sums);
    default:
      return weigh_rows<8, side>(call, block, x, grads, add, row, end, sums);
  }
}

// The sums over the images of one group.
DST_CLONES void weigh_group(const Call& call, const std::vector<Block>& blocks, int side,
                            const float* x, const float* grads, int64_t row, int64_t end,
                            float* sums) {
  for (const Block& block : blocks) {
    const bool add = &block != blocks.data();
    side == 1 ? weigh_rows<1>(call, block, x, grads, add, row, end, sums)
              : weigh_rows<kLanes>(call, block, x, grads, add, row, end, sums);
  }
}

DST_CLONES void add_group(const SparseRows& w, const float* of_group, int64_t row, int64_t end,
                          float* sums) {
  for (; row < end; ++row) {
    const int64_t at = w.begin(row), count = w.count(row);
    DST_VECTORIZE for (int64_t j = at; j < at + count; ++j) sums[j] += of_group[j];
  }
}

// Adds what images from `first` to `last` give, group by group: errors stay small however many
// there are.
void add_images(const SparseRows& weight, const int32_t* offsets, const Images& inputs,
                const void* grad, int side, int64_t first, int64_t last, float* of_group,
                float* sums) {
  const Images grads = planes_of_grad(inputs, weight.rows, side, grad);
  const std::vector<Block> blocks = blocks_of(inputs, side);
  const int64_t of_inputs = inputs.planes() * side, of_grads = grads.planes() * side;
  const int64_t groups = (last - first) / side;
  const int64_t most = std::max<int64_t>(kPacked / (of_inputs + of_grads + 1), 1);
  const int64_t together = std::min(most, groups);
  const Scratch<float> packed(Use::kPacked, together * (of_inputs + of_grads) + kLanes);
  float* const x = packed.get() + together * of_grads;
  std::fill_n(x + together * of_inputs, kLanes, 0.0f);  // read, but not used
  const Call call{weight, offsets, grads.plane() * side};
  for (int64_t begin = 0; begin < groups; begin += most) {
    const int64_t now = std::min(most, groups - begin);
    lay_out(grads, side, first + begin * side, now, packed.get());
    lay_out(inputs, side, first + begin * side, now, x);
    weight.share(1, now * call.plane, [&](int64_t row, int64_t end, int64_t) {
      for (int64_t group = 0; group < now; ++group) {
        weigh_group(call, blocks, side, x + group * of_inputs, packed.get() + group * of_grads, row,
                    end, of_group);
        add_group(weight, of_group, row, end, sums);
      }
    });
  }
}

}  // namespace

void kept_conv_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& columns,
                           const Tensor& places, const Tensor& values, const Integers& geometry) {
  constexpr const char* op = "kept_conv_grad_weight";
  const SparseRows weight = SparseRows::scattered(op, grad, values, columns, places, std::nullopt);
  check_run(op, input, "input", weight.dtype, input.numel());
  STD_TORCH_CHECK(grad.dim() == 4 && input.dim() == 4 && geometry.size() == 9, op,
                  ": grad and input must have 4 dimensions, and geometry 9 integers");
  const int64_t channels = input.size(1), count = input.size(0);
  const Axis height(op, input.size(2), geometry.data());
  const Axis width(op, input.size(3), geometry.data() + 1);
  check_rows(op, weight, columns, channels, geometry);
  STD_TORCH_CHECK(grad.size(0) == count && grad.size(1) == weight.rows &&
                      grad.size(2) == height.output && grad.size(3) == width.output,
                  op, ": grad must be [", count, ", ", weight.rows, ", ", height.output, ", ",
                  width.output, "]");
  if (weight.rows == 0) return;
  const Images inputs{height, width, weight.dtype, channels, count, input.data_ptr()};
  const Scratch<int32_t> offsets = offsets_of(weight, inputs, geometry[8]);
  const WeightSums made(weight, values);
  made.clear();
  const Scratch<float> of_group(Use::kSums, weight.stored());
  const int64_t several = count / kLanes * kLanes;
  const auto add = [&](int side, int64_t first, int64_t last) {
    if (first == last) return;
    add_images(weight, offsets.get(), inputs, grad.data_ptr(), side, first, last, of_group.get(),
               made.get());
  };
  add(kLanes, 0, several);
  add(1, several, count);
  made.finish();
}

}  // namespace dst
