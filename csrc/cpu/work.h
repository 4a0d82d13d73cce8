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
    places_.reserve(shapes_.size());
    for (const Rows& shape : shapes_) {
      const int64_t elements = shape.rows * shape.columns;
      const int64_t units = shape.rows * units_per_row(shape);
      const bool alone = units >= kMany;
      places_.push_back({units_, alone ? 0 : few_, alone ? elements : 0});
      elements_ += elements;
      units_ += units;
      if (!alone) few_ += elements;
    }
  }

  int64_t units() const { return units_; }
  int64_t first_unit(size_t segment) const { return places_[segment].unit; }

  // f(part) for all parts. A thread takes its share of every segment of many units, as it does in
  // torch's own operations: so it finds in its cache what it wrote there. The other segments are
  // shared as if they were one. A unit is where it begins.
  template <typename F>
  void run(const F& f) const {
    if (elements_ == 0) return;
    torch::stable::parallel_for(0, elements_, kGrain,
                                [&](int64_t begin, int64_t end) { share(begin, end, f); });
  }

 private:
  static constexpr int64_t kGrain = 32768;  // fewer elements are not worth a thread
  static constexpr int64_t kMany = 64;      // units, to be shared evenly

  struct Place {
    int64_t unit;
    int64_t element;   // that it begins with in what is shared with it
    int64_t elements;  // of what is shared: the segment, or (0) all segments of few units
  };

  template <typename F>
  void share(int64_t begin, int64_t end, const F& f) const {
    for (size_t i = 0; i < shapes_.size(); ++i) {
      const Rows& shape = shapes_[i];
      if (shape.rows == 0 || shape.columns == 0) continue;
      const int64_t from = std::max<int64_t>(element(i, begin), 0);
      const int64_t to = std::min(element(i, end), shape.rows * shape.columns);
      if (from >= to) continue;
      if (is_long(shape)) {
        share_units(i, from, to, f);
      } else {
        const int64_t row = (from + shape.columns - 1) / shape.columns;
        const int64_t rows = (to + shape.columns - 1) / shape.columns - row;
        if (rows > 0) f(Part{i, row, rows, 0, shape.columns, places_[i].unit + row});
      }
    }
  }

  // Which element of a segment is where a thread's share of all `elements_` begins or ends.
  int64_t element(size_t i, int64_t boundary) const {
    const Place& place = places_[i];
    const int64_t shared = place.elements ? place.elements : few_;
    return static_cast<int64_t>(static_cast<double>(boundary) / elements_ * shared) - place.element;
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
               places_[i].unit + row * per_row + u});
      }
    }
  }

  std::vector<Rows> shapes_;
  std::vector<Place> places_;
  int64_t elements_ = 0;
  int64_t few_ = 0;  // elements in segments of few units
  int64_t units_ = 0;
};

}  // namespace dst
