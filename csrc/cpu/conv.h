// Convolutions with a sparse W over height and width, without im2col.
//
// Each row of W is multiplied with blocks of output positions. What it takes for them from an image
// lies side by side if each phase of the stride is a plane of its own: plane (a, b) of a channel
// has the elements (y * stride + a, x * stride + b) of the padded image. So the column of a weight
// becomes an offset into the planes. Their lines are longer than the output's: blocks run through
// the lines, and what they compute between two lines of the output is not stored.
#pragma once

#include <numeric>
#include <vector>

#include "sparse.h"

namespace dst {

// Height or width of images that are laid out as planes.
struct Axis {
  int64_t size, kernel, stride, padding, dilation;
  int64_t output;
  int64_t phases;  // that are read: tap i reads phase i % phases
  int64_t line;    // elements of a plane

  // Of the input of a convolution; a geometry as the ops have it, from its element for this axis.
  Axis(const char* op, int64_t size, const int64_t* geometry);

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t longest_shift() const { return shift(kernel - 1); }
  // Whether an image serves as it is.
  bool plain() const { return stride == 1 && padding == 0 && line == size; }
};

// The positions in the planes for which products are wanted, and where these are stored.
struct Window {
  int64_t first_line, first;  // position
  int64_t lines, count;       // of a line
  int64_t output;             // where the first one goes
  int64_t line_step, step;    // between lines, and between neighbours
};

struct Images {
  Axis height, width;
  ScalarType dtype;
  int64_t channels, count;
  const void* data;

  int64_t plane() const { return height.line * width.line; }
  int64_t phases() const { return height.phases * width.phases; }
  int64_t planes() const { return channels * phases() * plane(); }
};

// Rows to multiply with the images, and where: weight j of all is values[j], for what begins
// offsets[j] behind a position.
struct Filters {
  const SparseRows& weight;
  const float* values;
  const int32_t* offsets;
  Window window;
};

// Refuses rows that are not [channels / groups, *kernel], [rows, columns] as stored.
void check_rows(const char* op, const SparseRows& weight, const Tensor& columns, int64_t channels,
                const Integers& geometry);

// Where the operands of each weight begin in the planes.
Scratch<int32_t> offsets_of(const SparseRows& weight, const Images& images, int64_t groups);

// The planes of images from `first` on, `side` images (1 or kLanes) side by side: so each position
// has that many numbers. Of `groups` such groups, one after the other.
void lay_out(const Images& images, int side, int64_t first, int64_t groups, float* to);

// Stores row r of an image at `output` + r * size; all images one after the other.
void convolve(const Images& images, const std::vector<Filters>& parts, void* output, int64_t size);

}  // namespace dst
