// What both libraries compute, one element at a time: margin, mask, surrogates, regulariser and
// optimizer updates. The reference in dst_kernels/reference says what is right.
//
// Real is the type of the arithmetic: double where a parameter is float64, else float.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__CUDA_EMULATION__)
#define DST_FUNCTION __host__ __device__ __forceinline__
#else
#define DST_FUNCTION inline __attribute__((always_inline))
#endif

namespace dst {

// In the order of dst_kernels.reference.SURROGATES.
enum class Surrogate : int64_t {
  kLongTailed = 0,
  kRectangular = 1,
  kTriangular = 2,
  kStraightThrough = 3
};

// NaN in weight or threshold counts as kept: only a margin <= 0 prunes.
template <typename Real>
DST_FUNCTION bool pruned(Real weight, Real threshold) {
  return std::abs(weight) <= threshold;
}

// W * M. A NaN threshold must come out as NaN, which W alone would hide; so does an infinite weight
// that an infinite threshold prunes, as 0 * W is NaN.
template <typename Real>
DST_FUNCTION Real masked(Real weight, Real threshold) {
  const Real kept = threshold != threshold ? threshold : weight;
  return pruned(weight, threshold) ? weight - weight : kept;
}

// H(margin). Comparisons are such that a NaN margin gives a NaN.
template <typename Real, Surrogate surrogate>
DST_FUNCTION Real slope(Real margin) {
  const Real distance = std::abs(margin);
  if constexpr (surrogate == Surrogate::kLongTailed) {
    const Real inner = Real(2) - Real(4) * distance;
    const Real tail = inner < Real(0.4) ? Real(0.4) : inner;
    return distance > Real(1) ? Real(0) : tail;
  } else if constexpr (surrogate == Surrogate::kRectangular) {
    return distance > Real(0.5) ? Real(0) : (distance != distance ? distance : Real(1));
  } else if constexpr (surrogate == Surrogate::kTriangular) {
    return distance > Real(1) ? Real(0) : Real(1) - distance;
  } else {
    return distance != distance ? distance : Real(1);
  }
}

// What one weight gives: its own gradient, and its share of -dt.
template <typename Real>
struct Gradients {
  Real weight;
  Real minus_threshold;
};

template <typename Real, Surrogate surrogate, bool structure>
DST_FUNCTION Gradients<Real> gradients(Real dense, Real weight, Real threshold) {
  const Real magnitude = std::abs(weight);
  const Real margin = magnitude - threshold;
  const Real through_mask = dense * slope<Real, surrogate>(margin);
  Real of_weight = margin <= Real(0) ? Real(0) : dense;
  if constexpr (structure) of_weight += through_mask * magnitude;
  return {of_weight, through_mask * weight};
}

// d/dt of exp(-t), constant from t = -64 downwards (see reference/regularization.py).
template <typename Real>
DST_FUNCTION Real regularization_slope(Real threshold) {
  const Real exponent = -threshold > Real(64) ? Real(64) : -threshold;
  return -std::exp(exponent);
}

// exp(-t), continued along its tangent from t = -64 downwards.
template <typename Real>
DST_FUNCTION Real regularization_value(Real threshold) {
  const Real negated = -(threshold > Real(1000) ? Real(1000) : threshold);
  const Real exponent = negated > Real(64) ? Real(64) : negated;
  return std::exp(exponent) * (Real(1) + (negated - exponent));
}

// torch.optim.SGD on one element; returns the new parameter and updates the momentum.
template <typename Real>
struct Sgd {
  Real lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;

  DST_FUNCTION Real operator()(Real parameter, Real gradient, Real& buffer, bool first) const {
    Real step = maximize ? -gradient : gradient;
    step += weight_decay * parameter;
    if (momentum != Real(0)) {
      buffer = first ? step : momentum * buffer + (Real(1) - dampening) * step;
      step = nesterov ? step + momentum * buffer : buffer;
    }
    return parameter - lr * step;
  }
};

// torch.optim.AdamW on one element. Everything but the last two arguments is the same for a whole
// parameter. What torch divides the root of the square by, root = sqrt(1 - beta2^step), is moved
// into the other constants, which leaves one division for each element.
template <typename Real>
struct AdamW {
  Real decay;  // 1 - lr weight_decay
  Real rest1;  // 1 - beta1
  Real beta2;
  Real rest2;      // 1 - beta2
  Real step_size;  // root lr / (1 - beta1^step)
  Real eps;        // root eps
  bool maximize;

  // In double, for in float 1 - 0.999 is off by 5e-5 of itself.
  static DST_FUNCTION AdamW of(double lr, double weight_decay, double beta1, double beta2,
                               double eps, bool maximize, double step) {
    const double root = std::sqrt(1 - std::pow(beta2, step));
    return {Real(1 - lr * weight_decay),
            Real(1 - beta1),
            Real(beta2),
            Real(1 - beta2),
            Real(root * lr / (1 - std::pow(beta1, step))),
            Real(root * eps),
            maximize};
  }

  DST_FUNCTION Real operator()(Real parameter, Real gradient, Real& average, Real& square) const {
    const Real step = maximize ? -gradient : gradient;
    parameter *= decay;
    average += rest1 * (step - average);
    square = beta2 * square + rest2 * step * step;
    return parameter - step_size * average / (std::sqrt(square) + eps);
  }
};

}  // namespace dst
