// The work of a call, cut into parts and shared among torch's threads.
//
// A row of up to kUnit elements is one unit, a longer one several. Units depend on the row's length
// alone; sums are made unit by unit and added in their order. So neither the number of threads nor
// the other segments of a call change a bit of any result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../arguments.h"
#include "vector.h"

namespace dst {

constexpr int64_t kUnit = 64 * kBlock;

// Several whole rows of a segment, or one unit of a long row.
struct Part {
  size_t segment;
  int64_t row, rows;
  int64_t column, columns;
  int64_t unit;  // number of its first unit among all of the call
};

inline bool is_long(Rows shape) { return shape.columns > kUnit; }

// Whether some part has all of a row: neither long rows nor those without elements are in one.
inline bool has_whole_rows(Rows shape) { return shape.columns != 0 && !is_long(shape); }

inline int64_t units_per_row(Rows shape) { return (shape.columns + kUnit - 1) / kUnit; }

class Work {
 public:
  // A segment of no rows or columns has no work.
  explicit Work(std::vector<Rows> shapes) : shapes_(std::move(shapes)) {
    firsts_.reserve(shapes_.size());
    for (const Rows& shape : shapes_) {
      firsts_.push_back({elements_, units_});
      elements_ += shape.rows * shape.columns;
      units_ += shape.rows * units_per_row(shape);
    }
  }

  int64_t units() const { return units_; }
  int64_t first_unit(size_t segment) const { return firsts_[segment].unit; }

  // f(part) for all parts. A thread takes the units that begin in its share of the elements.
  template <typename F>
  void run(const F& f) const {
    if (elements_ == 0) return;
    torch::stable::parallel_for(0, elements_, kGrain,
                                [&](int64_t begin, int64_t end) { share(begin, end, f); });
  }

 private:
  static constexpr int64_t kGrain = 32768;  // fewer elements are not worth a thread

  struct First {
    int64_t element, unit;
  };

  template <typename F>
  void share(int64_t begin, int64_t end, const F& f) const {
    const auto after = std::upper_bound(
        firsts_.begin(), firsts_.end(), begin,
        [](int64_t element, const First& first) { return element < first.element; });
    for (size_t i = after - firsts_.begin() - 1; i < shapes_.size(); ++i) {
      const First& first = firsts_[i];
      if (first.element >= end) break;
      const Rows& shape = shapes_[i];
      if (shape.rows == 0 || shape.columns == 0) continue;
      const int64_t from = std::max<int64_t>(begin - first.element, 0);
      const int64_t to = std::min(end - first.element, shape.rows * shape.columns);
      if (is_long(shape)) {
        share_units(i, from, to, f);
      } else {
        const int64_t row = (from + shape.columns - 1) / shape.columns;
        const int64_t rows = (to + shape.columns - 1) / shape.columns - row;
        if (rows > 0) f(Part{i, row, rows, 0, shape.columns, first.unit + row});
      }
    }
  }

  template <typename F>
  void share_units(size_t i, int64_t from, int64_t to, const F& f) const {
    const Rows& shape = shapes_[i];
    const int64_t per_row = units_per_row(shape);
    for (int64_t row = from / shape.columns; row < shape.rows; ++row) {
      const int64_t start = row * shape.columns;
      if (start >= to) break;
      for (int64_t u = (std::max<int64_t>(from - start, 0) + kUnit - 1) / kUnit; u < per_row; ++u) {
        const int64_t column = u * kUnit;
        if (start + column >= to) break;
        f(Part{i, row, 1, column, std::min(kUnit, shape.columns - column),
               firsts_[i].unit + row * per_row + u});
      }
    }
  }

  std::vector<Rows> shapes_;
  std::vector<First> firsts_;
  int64_t elements_ = 0;
  int64_t units_ = 0;
};

}  // namespace dst
