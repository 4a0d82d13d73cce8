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

// Sums over a run, element by element into up to kBlock lanes, which are added as a tree at the
// end: a fixed order that needs no reassociation by the compiler.
template <typename Real>
class Lanes {
 public:
  // The sums that a block's elements are to be added to, and where the results go.
  struct Sums {
    const Real* before;
    Real* after;
  };

  // For a run of `columns` elements.
  explicit DST_FUNCTION Lanes(int64_t columns) {
    while (used_ < columns && used_ < kBlock) used_ *= 2;
  }

  // For the next `count` elements: kBlock, or what is left of the run.
  DST_FUNCTION Sums next(int count) {
    if (!empty_) return {values_, values_};
    empty_ = false;
    for (int i = count; i < used_; ++i) values_[i] = Real(0);
    return {kZeros, values_};
  }

  DST_FUNCTION Real sum() {
    if (empty_) return Real(0);
    Vector sums;
    switch (used_) {
      case 32:
        tree<32>(values_, sums);
        break;
      case 64:
        tree<64>(values_, sums);
        break;
      case 128:
        tree<128>(values_, sums);
        break;
      case 256:
        tree<256>(values_, sums);
        break;
      case 512:
        tree<512>(values_, sums);
        break;
      default:
        tree<kLeast>(values_, sums);
    }
    for (int half = kLeast / 2; half > 2; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[half + i];
    }
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }

 private:
  static constexpr int kLeast = 16;
  static_assert(kBlock == 512, "sum() has a case for every power of two");
  alignas(64) static constexpr Real kZeros[kBlock] = {};

  // In registers, where a loop over halves would write all of its steps to memory.
  typedef Real Vector __attribute__((vector_size(kLeast * sizeof(Real))));

  // The kLeast sums that are left of `count` lanes when each half has been added to the one before.
  template <int count, int step = kLeast>
  static DST_FUNCTION void tree(const Real* lanes, Vector& sums) {
    if constexpr (step == count) {
      std::memcpy(&sums, lanes, sizeof(sums));
    } else {
      Vector others;
      tree<count, 2 * step>(lanes, sums);
      tree<count, 2 * step>(lanes + step, others);
      sums += others;
    }
  }

  int used_ = kLeast;
  bool empty_ = true;
  alignas(64) Real values_[kBlock];
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
