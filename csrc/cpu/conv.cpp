// Lays images out as planes, and multiplies blocks of positions with rows.
//
// Where lines are short, much of a block would lie between lines: there, kLanes images are laid out
// side by side, so that each position has that many numbers.
#include "conv.h"

namespace dst {
namespace {

constexpr int64_t kPacked = 1 << 20;  // numbers laid out at a time

// Outputs that are stored together: of one line.
struct Run {
  int at;  // positions behind the block's first
  int count;
  int64_t output;
};

struct Block {
  int64_t first;  // position
  int width;      // numbers, `side` for each position
  std::vector<Run> runs;
};

// Blocks that run through lines, or each within one. `direct`: nothing may be read behind the last
// image.
std::vector<Block> blocks_of(const Window& window, int64_t line, int side, bool through_lines,
                             bool direct) {
  const int64_t first = window.first_line * line + window.first;
  const int64_t positions = (window.lines - 1) * line + window.count;
  std::vector<Block> blocks;
  for (int64_t done = 0; done < positions;) {
    const int64_t in_line = done / line * line + window.count;
    const int64_t rest = (through_lines ? positions : in_line) - done;
    Block block{done, block_width(rest * side, kWidest), {}};
    const int64_t end = done + std::min<int64_t>(block.width / side, rest);
    if (direct) block.first = std::min(done, positions - block.width);
    while (done < end) {
      const int64_t y = done / line, x = done % line;
      const int64_t next = std::min((y + 1) * line, end);
      const int64_t stored = std::min(next - done, window.count - x);
      if (stored > 0) {
        block.runs.push_back({static_cast<int>(done - block.first), static_cast<int>(stored),
                              window.output + y * window.line_step + x * window.step});
      }
      done = next;
    }
    if (!through_lines && end == in_line) done = (done + line - 1) / line * line;
    block.first += first;
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// About what a weight costs.
int64_t cost(const std::vector<Block>& blocks) {
  int64_t vectors = 0;
  for (const Block& block : blocks) vectors += block.width / kLanes + 1;
  return vectors;
}

std::vector<Block> cheaper_blocks(const Window& window, int64_t line, int side, bool direct) {
  std::vector<Block> through = blocks_of(window, line, side, true, direct);
  if (direct) return through;
  std::vector<Block> within = blocks_of(window, line, side, false, direct);
  return cost(within) < cost(through) ? within : through;
}

template <int side>
DST_FUNCTION void zeros(float* to, int64_t begin, int64_t end) {
  for (int64_t x = begin; x < end; ++x) to[x * side] = 0.0f;
}

// All planes of one channel of an image, with room for those of other images between its elements.
template <int side, typename Real>
DST_FUNCTION void lay_out(const Images& images, const Real* channel, float* to) {
  const Axis &height = images.height, &width = images.width;
  for (int64_t i = 0; i < height.phases; ++i) {
    for (int64_t j = 0; j < width.phases; ++j) {
      const int64_t before = width.padding - width.phase(j);  // of the image's first element
      const int64_t first =
          std::clamp((before + width.stride - 1) / width.stride, int64_t(0), width.line);
      const int64_t end =
          std::clamp((width.size + before + width.stride - 1) / width.stride, first, width.line);
      for (int64_t q = 0; q < height.line; ++q, to += width.line * side) {
        const int64_t y = q * height.stride + height.phase(i) - height.padding;
        if (y < 0 || y >= height.size) {
          zeros<side>(to, 0, width.line);
          continue;
        }
        zeros<side>(to, 0, first);
        const Real* from = channel + y * width.size - before;
        if (width.stride == 1) {
          for (int64_t x = first; x < end; ++x) to[x * side] = number(from[x]);
        } else {
          for (int64_t x = first; x < end; ++x) to[x * side] = number(from[x * width.stride]);
        }
        zeros<side>(to, end, width.line);
      }
    }
  }
}

template <int side, typename Real>
DST_FUNCTION void lay_out(const Images& images, int64_t image, int64_t channel, float* to) {
  const int64_t size = images.height.size * images.width.size;
  const Real* from = static_cast<const Real*>(images.data) + channel * size;
  for (int i = 0; i < side; ++i) {
    lay_out<side>(images, from + (image + i) * images.channels * size, to + i);
  }
}

DST_CLONES void lay_out_channel(const Images& images, int side, int64_t image, int64_t channel,
                                float* to) {
  if (images.dtype == ScalarType::Float) {
    side == 1 ? lay_out<1, float>(images, image, channel, to)
              : lay_out<kLanes, float>(images, image, channel, to);
  } else {
    side == 1 ? lay_out<1, BFloat16>(images, image, channel, to)
              : lay_out<kLanes, BFloat16>(images, image, channel, to);
  }
}

// Where results of a row go.
struct Target {
  void* image;   // the first of those side by side
  int64_t size;  // of a row
  int64_t image_size;
};

template <int width, int side, typename Real>
DST_FUNCTION void convolve(const Filters& part, const float* planes, const Block& block,
                           const Target& target, int64_t row, int64_t end) {
  const SparseRows& w = part.weight;
  const float* x = planes + block.first * side;
  const int64_t step = part.window.step;
  for (; row < end; ++row) {
    const int64_t at = w.begin(row), count = w.count(row);
    Vector sums[width / kLanes];
    row_times_block<width, side>(part.values + at, part.offsets + at, count, x, sums);
    Real results[width];
    for (int v = 0; v < width / kLanes; ++v) {
      if (w.bias) sums[v] += w.bias[row];
      store(sums[v], results + v * kLanes);
    }
    Real* output = static_cast<Real*>(target.image) + row * target.size;
    for (const Run& run : block.runs) {
      const Real* from = results + run.at * side;
      for (int i = 0; i < side; ++i, ++from) {
        Real* to = output + i * target.image_size + run.output;
        if (side == 1 && step == 1) {
          std::copy_n(from, run.count, to);
        } else {
          for (int j = 0; j < run.count; ++j) to[j * step] = from[j * side];
        }
      }
    }
  }
}

template <int side, typename Real>
DST_FUNCTION void convolve(const Filters& part, const float* planes, const Block& block,
                           const Target& target, int64_t row, int64_t end) {
  switch (block.width) {
    case 8:
      return convolve<8, side, Real>(part, planes, block, target, row, end);
    case 16:
      return convolve<16, side, Real>(part, planes, block, target, row, end);
    case 32:
      return convolve<32, side, Real>(part, planes, block, target, row, end);
    default:
      return convolve<64, side, Real>(part, planes, block, target, row, end);
  }
}

DST_CLONES void convolve_block(const Filters& part, int side, const float* planes,
                               const Block& block, const Target& target, int64_t row, int64_t end) {
  if (part.weight.dtype == ScalarType::Float) {
    side == 1 ? convolve<1, float>(part, planes, block, target, row, end)
              : convolve<kLanes, float>(part, planes, block, target, row, end);
  } else {
    side == 1 ? convolve<1, BFloat16>(part, planes, block, target, row, end)
              : convolve<kLanes, BFloat16>(part, planes, block, target, row, end);
  }
}

// How the blocks of all parts are laid.
struct Plan {
  int side;  // images side by side: `side` numbers for each position
  bool direct;
  std::vector<std::vector<Block>> blocks;

  Plan(const Images& images, const std::vector<Filters>& parts, int side, bool direct)
      : side(side), direct(direct) {
    for (const Filters& part : parts) {
      blocks.push_back(cheaper_blocks(part.window, images.width.line, side, direct));
    }
  }

  // About what a weight costs for kLanes images.
  int64_t cost() const {
    int64_t sum = 0;
    for (const std::vector<Block>& each : blocks) sum += dst::cost(each) * kLanes / side;
    return sum;
  }
};

void run(const Images& images, const std::vector<Filters>& parts, const Plan& plan, int64_t first,
         int64_t last, void* output, int64_t size) {
  const int side = plan.side;
  const int64_t planes = images.planes() * side;
  const int64_t bytes = images.dtype == ScalarType::Float ? sizeof(float) : sizeof(BFloat16);
  // Of images side by side, how many are laid out at a time.
  const int64_t groups = (last - first) / side;
  const int64_t most = plan.direct ? groups : std::max<int64_t>(kPacked / (planes + 1), 1);
  Scratch<float> laid_out;
  if (!plan.direct) {
    const int64_t all = std::min(most, groups) * planes;
    laid_out = Scratch<float>(Use::kPacked, all + kWidest);
    std::fill_n(laid_out.get() + all, kWidest, 0.0f);  // read, but not stored
  }
  for (int64_t begin = 0; begin < groups; begin += most) {
    const int64_t together = std::min(most, groups - begin);
    const float* from = laid_out.get();
    if (plan.direct) {
      from = static_cast<const float*>(images.data) + first * planes;
    } else {
      lay_out(images, side, first + begin * side, together, laid_out.get());
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      const Filters& part = parts[i];
      const int64_t count = plan.blocks[i].size(), image_size = part.weight.rows * size;
      part.weight.share(together * count, kWidest, [&](int64_t row, int64_t end, int64_t number) {
        const int64_t group = number / count, image = first + (begin + group) * side;
        char* to = static_cast<char*>(output) + image * image_size * bytes;
        convolve_block(part, side, from + group * planes, plan.blocks[i][number % count],
                       {to, size, image_size}, row, end);
      });
    }
  }
}

}  // namespace

Axis::Axis(const char* op, int64_t size, const int64_t* geometry)
    : size(size),
      kernel(geometry[0]),
      stride(geometry[2]),
      padding(geometry[4]),
      dilation(geometry[6]) {
  STD_TORCH_CHECK(kernel >= 1 && stride >= 1 && padding >= 0 && dilation >= 1, op,
                  ": no such geometry");
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0, op, ": input is too small");
  output = room / stride + 1;
  phases = std::min(kernel, stride / std::gcd(stride, dilation));
  line = output + longest_shift();
}

void check_rows(const char* op, const SparseRows& weight, const Tensor& columns, int64_t channels,
                const Integers& geometry) {
  const int64_t groups = geometry[8];
  STD_TORCH_CHECK(groups >= 1 && channels % groups == 0 && weight.rows % groups == 0, op,
                  ": groups must divide channels and rows");
  const int64_t of_row = channels / groups * geometry[0] * geometry[1];
  STD_TORCH_CHECK(columns.dim() == 2 && columns.size(0) == weight.rows && columns.size(1) == of_row,
                  op, ": for ", channels, " channels, columns must be [", weight.rows, ", ", of_row,
                  "]");
}

Scratch<int32_t> offsets_of(const SparseRows& weight, const Images& images, int64_t groups) {
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
  const int64_t group = images.planes() / groups, rows = weight.rows / groups;
  Scratch<int32_t> made(Use::kOffsets, weight.stored());
  int32_t* offsets = made.get();
  const auto fill = [&](const auto* columns) {
    for (int64_t row = 0; row < weight.rows; ++row) {
      const int32_t base = static_cast<int32_t>(row / rows * group);
      const int64_t at = weight.begin(row), count = weight.count(row);
      for (int64_t j = at; j < at + count; ++j) offsets[j] = base + table[columns[j]];
    }
  };
  weight.small ? fill(static_cast<const uint16_t*>(weight.columns))
               : fill(static_cast<const int32_t*>(weight.columns));
  return made;
}

void lay_out(const Images& images, int side, int64_t first, int64_t groups, float* to) {
  const int64_t channels = images.channels, size = images.phases() * images.plane() * side;
  torch::stable::parallel_for(0, groups * channels,
                              std::max<int64_t>(kTerms / kWidest / (size + 1), 1),
                              [&](int64_t at, int64_t end) {
                                for (; at < end; ++at) {
                                  lay_out_channel(images, side, first + at / channels * side,
                                                  at % channels, to + at * size);
                                }
                              });
}

void convolve(const Images& images, const std::vector<Filters>& parts, void* output, int64_t size) {
  bool direct = images.dtype == ScalarType::Float && images.height.plain() && images.width.plain();
  for (const Filters& part : parts) {
    const Window& window = part.window;
    direct &= (window.lines - 1) * images.width.line + window.count >= kWidest;
  }
  const Plan single(images, parts, 1, direct);
  int64_t done = 0;
  if (images.count >= kLanes) {
    const Plan several(images, parts, kLanes, false);
    // Laying out and storing takes more time then.
    if (several.cost() * 5 <= single.cost() * 4) {
      done = images.count / kLanes * kLanes;
      run(images, parts, several, 0, done, output, size);
    }
  }
  if (done < images.count) run(images, parts, single, done, images.count, output, size);
}

}  // namespace dst
