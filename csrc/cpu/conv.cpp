#include "conv.h"

namespace dst {
namespace {

constexpr int64_t kPacked = 1 << 20;  // numbers laid out at a time

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

// `direct`: nothing may be read behind the last image.
std::vector<Block> blocks_of(const Window& window, int64_t line, bool direct) {
  const int64_t first = window.first_line * line + window.first;
  const int64_t positions = (window.lines - 1) * line + window.count;
  std::vector<Block> blocks;
  for (int64_t done = 0; done < positions;) {
    Block block{done, block_width(positions - done, kWidest), {}};
    const int64_t end = std::min(done + block.width, positions);
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
    block.first += first;
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// All planes of one channel of an image.
template <typename Real>
DST_FUNCTION void lay_out(const Images& images, const Real* channel, float* to) {
  const Axis &height = images.height, &width = images.width;
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

DST_CLONES void lay_out_channel(const Images& images, int64_t channel, float* to) {
  const int64_t at = channel * images.height.size * images.width.size;
  if (images.dtype == ScalarType::Float) {
    lay_out(images, static_cast<const float*>(images.data) + at, to);
  } else {
    lay_out(images, static_cast<const BFloat16*>(images.data) + at, to);
  }
}

// Where a row stores its results.
struct Target {
  void* image;
  int64_t size;  // of a row
};

template <int width, typename Real>
DST_FUNCTION void convolve(const Filters& part, const float* planes, const Block& block,
                           const Target& target, int64_t row, int64_t end) {
  const SparseRows& w = part.weight;
  const float* x = planes + block.first;
  for (; row < end; ++row) {
    const int64_t at = w.begin(row), count = w.count(row);
    Vector sums[width / kLanes];
    row_times_block<width, 1>(part.values + at, part.offsets + at, count, x, sums);
    Real results[width];
    for (int v = 0; v < width / kLanes; ++v) {
      if (w.bias) sums[v] += w.bias[row];
      store(sums[v], results + v * kLanes);
    }
    Real* output = static_cast<Real*>(target.image) + row * target.size;
    for (const Run& run : block.runs) {
      const Real* from = results + run.at;
      Real* to = output + run.output;
      if (part.window.step == 1) {
        std::copy_n(from, run.count, to);
      } else {
        for (int i = 0; i < run.count; ++i) to[i * part.window.step] = from[i];
      }
    }
  }
}

template <typename Real>
DST_FUNCTION void convolve(const Filters& part, const float* planes, const Block& block,
                           const Target& target, int64_t row, int64_t end) {
  switch (block.width) {
    case 8:
      return convolve<8, Real>(part, planes, block, target, row, end);
    case 16:
      return convolve<16, Real>(part, planes, block, target, row, end);
    case 32:
      return convolve<32, Real>(part, planes, block, target, row, end);
    default:
      return convolve<64, Real>(part, planes, block, target, row, end);
  }
}

DST_CLONES void convolve_block(const Filters& part, const float* planes, const Block& block,
                               const Target& target, int64_t row, int64_t end) {
  if (part.weight.dtype == ScalarType::Float) {
    convolve<float>(part, planes, block, target, row, end);
  } else {
    convolve<BFloat16>(part, planes, block, target, row, end);
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

void convolve(const Images& images, const std::vector<Filters>& parts, void* output, int64_t size) {
  bool direct =
      images.dtype == ScalarType::Float && images.height.plain() && images.width.plain();
  for (const Filters& part : parts) {
    const Window& window = part.window;
    direct &= (window.lines - 1) * images.width.line + window.count >= kWidest;
  }
  std::vector<std::vector<Block>> blocks;
  for (const Filters& part : parts) {
    blocks.push_back(blocks_of(part.window, images.width.line, direct));
  }
  const int64_t planes = images.planes(), channels = images.channels;
  const int64_t most = direct ? images.count : std::max<int64_t>(kPacked / (planes + 1), 1);
  Scratch<float> laid_out;
  if (!direct) {
    const int64_t all = std::min(most, images.count) * planes;
    laid_out = Scratch<float>(Use::kPacked, all + kWidest);
    std::fill_n(laid_out.get() + all, kWidest, 0.0f);  // read, but not stored
  }
  const int64_t bytes = images.dtype == ScalarType::Float ? sizeof(float) : sizeof(BFloat16);
  for (int64_t first = 0; first < images.count; first += most) {
    const int64_t together = std::min(most, images.count - first);
    const float* from = laid_out.get();
    if (direct) {
      from = static_cast<const float*>(images.data);
    } else {
      const int64_t all = images.phases() * images.plane();
      torch::stable::parallel_for(
          0, together * channels, std::max<int64_t>(kTerms / kWidest / (all + 1), 1),
          [&](int64_t begin, int64_t end) {
            for (int64_t channel = begin; channel < end; ++channel) {
              lay_out_channel(images, first * channels + channel, laid_out.get() + channel * all);
            }
          });
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      const Filters& part = parts[i];
      const int64_t count = blocks[i].size(), rows = part.weight.rows;
      part.weight.share(together * count, kWidest, [&](int64_t row, int64_t end, int64_t number) {
        const int64_t image = number / count;
        char* to = static_cast<char*>(output) + (first + image) * rows * size * bytes;
        convolve_block(part, from + image * planes, blocks[i][number % count], {to, size}, row,
                       end);
      });
    }
  }
}

}  // namespace dst
