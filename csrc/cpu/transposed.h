// Rows of a matrix side by side: what products with sparse rows read and write.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse.h"

// GCC 12 takes a tile apart for its transposition, and then misses that it has been written.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace dst {

// Exchanges rows and columns of 8 x 8 numbers.
DST_FUNCTION void transpose(Vector* r) {
  Vector s[8];
  for (int half = 0; half < 8; half += 4) {
    const Vector a = r[half], b = r[half + 1], c = r[half + 2], d = r[half + 3];
    const Vector ab = {a[0], b[0], a[1], b[1], a[4], b[4], a[5], b[5]};
    const Vector cd = {c[0], d[0], c[1], d[1], c[4], d[4], c[5], d[5]};
    const Vector ba = {a[2], b[2], a[3], b[3], a[6], b[6], a[7], b[7]};
    const Vector dc = {c[2], d[2], c[3], d[3], c[6], d[6], c[7], d[7]};
    s[half] = Vector{ab[0], ab[1], cd[0], cd[1], ab[4], ab[5], cd[4], cd[5]};
    s[half + 1] = Vector{ab[2], ab[3], cd[2], cd[3], ab[6], ab[7], cd[6], cd[7]};
    s[half + 2] = Vector{ba[0], ba[1], dc[0], dc[1], ba[4], ba[5], dc[4], dc[5]};
    s[half + 3] = Vector{ba[2], ba[3], dc[2], dc[3], ba[6], ba[7], dc[6], dc[7]};
  }
  for (int i = 0; i < 4; ++i) {
    const Vector a = s[i], b = s[i + 4];
    r[i] = Vector{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
    r[i + 4] = Vector{a[4], a[5], a[6], a[7], b[4], b[5], b[6], b[7]};
  }
}

// Several rows of a matrix side by side: number c of all of them begins at packed + c * width.
struct Block {
  int64_t first;  // row
  int width;
  float* packed;
};

// A matrix [rows, columns], one row after the other.
struct Matrix {
  const void* data;
  int64_t rows, columns;
};

// Columns from `column` to `end` of a block's rows. The last row fills what is left of it.
template <typename Real>
DST_FUNCTION void pack_columns(const Matrix& matrix, const Block& block, int64_t column,
                               int64_t end) {
  for (int part = 0; part < block.width; part += kLanes) {
    const Real* from[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t row = std::min(block.first + part + i, matrix.rows - 1);
      from[i] = static_cast<const Real*>(matrix.data) + row * matrix.columns;
    }
    float* to = block.packed + part;
    int64_t k = column;
    for (; k + kLanes <= end; k += kLanes) {
      Vector tile[kLanes] = {};
      for (int i = 0; i < kLanes; ++i) tile[i] = load(from[i] + k);
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(tile[i], to + (k + i) * block.width);
    }
    for (; k < end; ++k) {
      for (int i = 0; i < kLanes; ++i) to[k * block.width + i] = number(from[i][k]);
    }
  }
}

// Writes numbers from `column` to `end` of a block's rows back into a matrix.
template <typename Real>
DST_FUNCTION void unpack_columns(const Block& block, const Matrix& matrix, int64_t column,
                                 int64_t end) {
  Real* data = static_cast<Real*>(const_cast<void*>(matrix.data));
  for (int64_t k = column; k < end; k += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - k));
    for (int part = 0; part < block.width; part += kLanes) {
      Vector tile[kLanes] = {};
      for (int i = 0; i < count; ++i) tile[i] = load(block.packed + (k + i) * block.width + part);
      transpose(tile);
      const int64_t row = block.first + part;
      for (int i = 0; i < kLanes && row + i < matrix.rows; ++i) {
        store(tile[i], count, data + (row + i) * matrix.columns + k);
      }
    }
  }
}

}  // namespace dst
