// The method on one block of at most kBlock elements. Thresholds are one number for all of them
// (Row) or one for each (Element).
#pragma once

#include <cstdint>
#include <cstring>

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

// Sums over a run, element by element into 64 lanes, which are added as a tree at the end: a fixed
// order that needs no reassociation by the compiler, and sums that stay in registers.
template <typename Real>
class Lanes {
 public:
  // Adds term(i) of the next `count` elements: kBlock, or what is left of the run. `term` is called
  // once for each, in any order, and must be inlined (DST_LAMBDA).
  template <typename Term>
  DST_FUNCTION void add(int count, const Term& term) {
    int i = 0;
    for (; i + kVectors * kWidth <= count; i += kVectors * kWidth) {
      for (int v = 0; v < kVectors; ++v) {
        Real terms[kWidth];
        DST_VECTORIZE for (int j = 0; j < kWidth; ++j) terms[j] = term(i + v * kWidth + j);
        add(terms, v);
      }
    }
    for (int v = 0; v < kVectors; ++v, i += kWidth) {
      if (i >= count) return;
      Real terms[kWidth] = {};
      const int rest = count - i;
      if (rest >= kWidth) {
        DST_VECTORIZE for (int j = 0; j < kWidth; ++j) terms[j] = term(i + j);
      } else {
        for (int j = 0; j < rest; ++j) terms[j] = term(i + j);
      }
      add(terms, v);
    }
  }

  DST_FUNCTION Real sum() const {
    Vector sums = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
    for (int half = kWidth / 2; half > 2; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[half + i];
    }
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }

 private:
  static constexpr int kWidth = 16, kVectors = 4;
  typedef Real Vector __attribute__((vector_size(kWidth * sizeof(Real))));

  DST_FUNCTION void add(const Real* terms, int v) {
    Vector vector;
    std::memcpy(&vector, terms, sizeof(vector));
    sums_[v] += vector;
  }

  Vector sums_[kVectors] = {};
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
