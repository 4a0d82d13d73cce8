// Surrogates chosen at run time, one for each segment. As template parameters, as in formulas.h,
// they would make eight copies of every loop.
#pragma once

#include "../formulas.h"

namespace dst::cuda {

// All of them are one curve: max(top - slope |x|, floor) up to |x| = bound, then `beyond`. Equal
// to formulas.h to the last bit, NaN included, since slope |x| is exact.
struct Curve {
  float bound, beyond, top, slope, floor;

  static DST_FUNCTION Curve of(Surrogate surrogate) {
    switch (surrogate) {
      case Surrogate::kLongTailed:
        return {1.0f, 0.0f, 2.0f, 4.0f, 0.4f};
      case Surrogate::kRectangular:
        return {0.5f, 0.0f, 1.0f, 0.0f, 0.0f};
      case Surrogate::kTriangular:
        return {1.0f, 0.0f, 1.0f, 1.0f, 0.0f};
      default:  // straight through: all is beyond, but for NaN
        return {-1.0f, 1.0f, 1.0f, 0.0f, 0.0f};
    }
  }

  DST_FUNCTION float operator()(float margin) const {
    const float distance = std::abs(margin);
    const float inner = top - slope * distance;
    const float tail = inner < floor ? floor : inner;
    return distance > bound ? beyond : tail;
  }
};

// `gradients` of formulas.h.
struct Differentiation {
  Curve curve;
  bool structure;

  DST_FUNCTION Gradients<float> operator()(float dense, float weight, float threshold) const {
    const float magnitude = std::abs(weight);
    const float margin = magnitude - threshold;
    const float through_mask = dense * curve(margin);
    const float through_weight = margin <= 0.0f ? 0.0f : dense;
    const float both = through_weight + through_mask * magnitude;
    return {structure ? both : through_weight, through_mask * weight};
  }
};

}  // namespace dst::cuda
