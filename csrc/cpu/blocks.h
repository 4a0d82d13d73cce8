// The method on one block of at most kBlock elements. Thresholds are one number for all of them
// (Row) or one for each (Element).
#pragma once

#include <cstdint>

#include "../formulas.h"
#include "vector.h"

namespace dst {

template <typename Real>
struct RowThreshold {
  Real value;
  DST_FUNCTION Real operator[](int) const { return value; }
};

template <typename Real>
struct ElementThresholds {
  const Real* values;
  DST_FUNCTION Real operator[](int i) const { return values[i]; }
};

// W * M; returns how many are kept.
template <typename Real, typename Threshold>
DST_FUNCTION int mask_block(const Real* weight, Threshold threshold, Real* result, int count) {
  int dropped = 0;
  DST_VECTORIZE for (int i = 0; i < count; ++i) {
    dropped += pruned(weight[i], threshold[i]);
    result[i] = masked(weight[i], threshold[i]);
  }
  return count - dropped;
}

// Sums over a run, element by element into up to kBlock lanes, which are added as a tree at the
// end: a fixed order that needs no reassociation by the compiler.
template <typename Real>
class Lanes {
 public:
  // For a run of `columns` elements.
  explicit DST_FUNCTION Lanes(int64_t columns) {
    while (used_ < columns && used_ < kBlock) used_ *= 2;
    for (int i = 0; i < used_; i += kLeast) fill<kLeast>(values_ + i);
  }

  DST_FUNCTION Real& operator[](int i) { return values_[i]; }

  DST_FUNCTION Real sum() {
    for (int half = used_ / 2; half >= kLeast; half /= 2) {
      for (int i = 0; i < half; i += kLeast) add<kLeast>(values_ + i, values_ + half + i);
    }
    add<8>(values_, values_ + 8);
    add<4>(values_, values_ + 4);
    return (values_[0] + values_[2]) + (values_[1] + values_[3]);
  }

 private:
  static constexpr int kLeast = 16;

  template <int count>
  static DST_FUNCTION void fill(Real* lanes) {
    for (int i = 0; i < count; ++i) lanes[i] = Real(0);
  }

  template <int count>
  static DST_FUNCTION void add(Real* lanes, const Real* others) {
    DST_VECTORIZE for (int i = 0; i < count; ++i) lanes[i] += others[i];
  }

  int used_ = kLeast;
  Real values_[kBlock];
};

// f.operator()<surrogate, structure>(), for kernels that are compiled for each. `f` must be inlined
// (DST_LAMBDA) to be compiled for its caller's instruction set.
template <typename F>
DST_FUNCTION void dispatch(Surrogate surrogate, bool structure, const F& f) {
#define DST_CASE(name)                                           \
  case Surrogate::name:                                          \
    structure ? f.template operator()<Surrogate::name, true>()   \
              : f.template operator()<Surrogate::name, false>(); \
    break;
  switch (surrogate) {
    DST_CASE(kLongTailed)
    DST_CASE(kRectangular)
    DST_CASE(kTriangular)
    DST_CASE(kStraightThrough)
  }
#undef DST_CASE
}

}  // namespace dst
