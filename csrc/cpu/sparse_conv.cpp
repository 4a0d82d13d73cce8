// A convolution with a sparse W, over height and width, without im2col.
//
// Each row of W is multiplied with blocks of output positions. What it takes for them from an image
// lies side by side if each phase of the stride is a plane of its own: plane (a, b) of a channel
// has the elements (y * stride + a, x * stride + b) of the padded image. So the column of a weight
// becomes an offset into the planes. Their lines are longer than the output's: blocks run through
// the lines, and what they compute between two lines of the output is not stored.
#include <numeric>

#include "sparse.h"

namespace dst {
namespace {

constexpr int64_t kPacked = 1 << 20;  // numbers laid out at a time

// Height or width.
struct Axis {
  int64_t size, kernel, stride, padding, dilation;
  int64_t output;
  int64_t phases;  // that are read: tap i reads phase i % phases
  int64_t line;    // elements of a plane

  Axis(int64_t size, const int64_t* geometry)
      : size(size),
        kernel(geometry[0]),
        stride(geometry[2]),
        padding(geometry[4]),
        dilation(geometry[6]) {
    STD_TORCH_CHECK(kernel >= 1 && stride >= 1 && padding >= 0 && dilation >= 1,
                    "sparse_conv: no such geometry");
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "sparse_conv: input is too small");
    output = room / stride + 1;
    phases = std::min(kernel, stride / std::gcd(stride, dilation));
    line = output + (kernel - 1) * dilation / stride;
  }

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  bool plain() const { return stride == 1 && padding == 0; }
};

// Outputs that are stored together: of one line.
struct Run {
  int at;  // in the block
  int count;
  int64_t output;
};

struct Block {
  int64_t first;  // position
  int width;
  std::vector<Run> runs;
};

struct Conv {
  SparseRows& weight;
  Axis height, width;
  int64_t channels, groups;
  const void* input;
  void* output;

  int64_t plane() const { return height.line * width.line; }
  int64_t planes() const { return channels * height.phases * width.phases * plane(); }
  int64_t positions() const { return (height.output - 1) * width.line + width.output; }
  // Whether an image serves as it is.
  bool direct() const {
    return weight.dtype == ScalarType::Float && height.plain() && width.plain() &&
           positions() >= kWidest;
  }
};

std::vector<Block> blocks_of(const Conv& call) {
  const int64_t positions = call.positions();
  std::vector<Block> blocks;
  for (int64_t done = 0; done < positions;) {
    Block block{done, block_width(positions - done, kWidest), {}};
    const int64_t end = std::min(done + block.width, positions);
    // Nothing may be read behind the last image.
    if (call.direct()) block.first = std::min(done, positions - block.width);
    while (done < end) {
      const int64_t y = done / call.width.line, x = done % call.width.line;
      const int64_t next = std::min((y + 1) * call.width.line, end);
      const int64_t stored = std::min(next - done, call.width.output - x);
      if (stored > 0) {
        block.runs.push_back({static_cast<int>(done - block.first), static_cast<int>(stored),
                              y * call.width.output + x});
      }
      done = next;
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// Where the operands of each weight begin in the planes.
Scratch<int32_t> offsets_of(const Conv& call) {
  const SparseRows& w = call.weight;
  const int64_t channels = call.channels / call.groups;
  const Axis &height = call.height, &width = call.width;
  std::vector<int32_t> table;
  table.reserve(channels * height.kernel * width.kernel);
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t i = 0; i < height.kernel; ++i) {
      for (int64_t j = 0; j < width.kernel; ++j) {
        const int64_t phase = (channel * height.phases + i % height.phases) * width.phases;
        table.push_back(static_cast<int32_t>((phase + j % width.phases) * call.plane() +
                                             height.shift(i) * width.line + width.shift(j)));
      }
    }
  }
  const int64_t group = call.planes() / call.groups, rows = w.rows / call.groups;
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

// All planes of one channel of an image.
template <typename Real>
DST_FUNCTION void lay_out(const Conv& call, const Real* channel, float* to) {
  const Axis &height = call.height, &width = call.width;
  for (int64_t i = 0; i < height.phases; ++i) {
    for (int64_t j = 0; j < width.phases; ++j) {
      const int64_t before = width.padding - width.phase(j);  // of the image's first element
      const int64_t first =
          std::clamp((before + width.stride - 1) / width.stride, int64_t(0), width.line);
      const int64_t end =
          std::clamp((width.size + before + width.stride - 1) / width.stride, first, width.line);
      for (int64_t q = 0; q < height.line; ++q, to += width.line) {
        const int64_t y = q * height.stride + height.phase(i) - height.padding;
        if (y < 0 || y >= height.size) {
          std::fill_n(to, width.line, 0.0f);
          continue;
        }
        std::fill_n(to, first, 0.0f);
        const Real* from = channel + y * width.size - before;
        if (width.stride == 1) {
          for (int64_t x = first; x < end; ++x) to[x] = number(from[x]);
        } else {
          for (int64_t x = first; x < end; ++x) to[x] = number(from[x * width.stride]);
        }
        std::fill_n(to + end, width.line - end, 0.0f);
      }
    }
  }
}

DST_CLONES void lay_out_channel(const Conv& call, int64_t channel, float* to) {
  const int64_t at = channel * call.height.size * call.width.size;
  if (call.weight.dtype == ScalarType::Float) {
    lay_out(call, static_cast<const float*>(call.input) + at, to);
  } else {
    lay_out(call, static_cast<const BFloat16*>(call.input) + at, to);
  }
}

struct Operands {
  const float* values;
  const int32_t* offsets;
  const float* planes;
};

template <int width, typename Real>
DST_FUNCTION void convolve(const Conv& call, const Operands& operands, const Block& block,
                           Real* output, int64_t row, int64_t end) {
  const SparseRows& w = call.weight;
  const int64_t outputs = call.height.output * call.width.output;
  const float* x = operands.planes + block.first;
  for (; row < end; ++row) {
    const int64_t at = w.begin(row), count = w.count(row);
    Vector sums[width / kLanes];
    row_times_block<width, 1>(operands.values + at, operands.offsets + at, count, x, sums);
    Real results[width];
    for (int v = 0; v < width / kLanes; ++v) {
      if (w.bias) sums[v] += w.bias[row];
      store(sums[v], results + v * kLanes);
    }
    for (const Run& run : block.runs) {
      std::copy_n(results + run.at, run.count, output + row * outputs + run.output);
    }
  }
}

template <typename Real>
DST_FUNCTION void convolve(const Conv& call, const Operands& operands, const Block& block,
                           int64_t image, int64_t row, int64_t end) {
  const int64_t outputs = call.weight.rows * call.height.output * call.width.output;
  Real* output = static_cast<Real*>(call.output) + image * outputs;
  switch (block.width) {
    case 8:
      return convolve<8>(call, operands, block, output, row, end);
    case 16:
      return convolve<16>(call, operands, block, output, row, end);
    case 32:
      return convolve<32>(call, operands, block, output, row, end);
    default:
      return convolve<64>(call, operands, block, output, row, end);
  }
}

DST_CLONES void convolve_block(const Conv& call, const Operands& operands, const Block& block,
                               int64_t image, int64_t row, int64_t end) {
  if (call.weight.dtype == ScalarType::Float) {
    convolve<float>(call, operands, block, image, row, end);
  } else {
    convolve<BFloat16>(call, operands, block, image, row, end);
  }
}

}  // namespace

Tensor sparse_conv(const Tensor& input, const Tensor& values, const Tensor& columns,
                   const Tensor& row_starts, const std::optional<Tensor>& bias,
                   const Integers& geometry) {
  SparseRows weight("sparse_conv", input, values, columns, row_starts, bias);
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 9,
                  "sparse_conv: input must have 4 dimensions, and geometry 9 integers");
  const int64_t images = input.size(0), channels = input.size(1), groups = geometry[8];
  STD_TORCH_CHECK(groups >= 1 && channels % groups == 0 && weight.rows % groups == 0,
                  "sparse_conv: groups must divide channels and rows");
  const Axis height(input.size(2), geometry.data()), width(input.size(3), geometry.data() + 1);
  Tensor output = new_contiguous(input, {images, weight.rows, height.output, width.output});
  const Conv call{weight, height, width, channels, groups, input.data_ptr(), output.data_ptr()};
  if (images == 0 || weight.rows == 0) return output;

  const std::vector<Block> blocks = blocks_of(call);
  const Scratch<int32_t> offsets = offsets_of(call);
  const float* operands = weight.values();
  const int64_t planes = call.planes(), count = blocks.size();
  const int64_t most = call.direct() ? images : std::max<int64_t>(kPacked / (planes + 1), 1);
  Scratch<float> laid_out;
  if (!call.direct()) {
    const int64_t size = std::min(most, images) * planes;
    laid_out = Scratch<float>(Use::kPacked, size + kWidest);
    std::fill_n(laid_out.get() + size, kWidest, 0.0f);  // read, but not stored
  }
  for (int64_t first = 0; first < images; first += most) {
    const int64_t together = std::min(most, images - first);
    if (!call.direct()) {
      const int64_t all = planes / std::max<int64_t>(channels, 1);
      torch::stable::parallel_for(
          0, together * channels, std::max<int64_t>(kTerms / kWidest / (all + 1), 1),
          [&](int64_t from, int64_t to) {
            for (int64_t channel = from; channel < to; ++channel) {
              lay_out_channel(call, first * channels + channel, laid_out.get() + channel * all);
            }
          });
    }
    weight.share(together * count, kWidest, [&](int64_t row, int64_t end, int64_t number) {
      const int64_t image = number / count;
      const float* from = laid_out.get() ? laid_out.get() + image * planes
                                         : static_cast<const float*>(call.input) + image * planes;
      convolve_block(call, {operands, offsets.get(), from}, blocks[number % count], first + image,
                     row, end);
    });
  }
  return output;
}

}  // namespace dst
