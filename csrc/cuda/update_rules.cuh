// What tells SGD's step from AdamW's.
#pragma once

#include <cmath>

#include "../step_segments.h"

namespace dst::cuda {

// `Rule` is the numbers of a param group that only it has; `Update` is what it makes of them for
// one parameter: a function of formulas.h.
struct SgdRule {
  using Update = Sgd<float>;
  static constexpr int kStates = 1;
  static constexpr bool kOptionalStates = true;  // absent without momentum, unread at first

  float momentum, dampening;
  bool nesterov;

  static SgdRule of(const Hyper& hyper) {
    return {static_cast<float>(hyper.rest[0]), static_cast<float>(hyper.rest[1]),
            hyper.rest[2] != 0};
  }

  DST_FUNCTION Update update(float lr, float weight_decay, bool maximize, const float*) const {
    return {lr, momentum, dampening, weight_decay, nesterov, maximize};
  }

  static DST_FUNCTION float apply(const Update& update, float parameter, float gradient,
                                  float (&states)[kStates], bool first) {
    return update(parameter, gradient, states[0], first);
  }
};

struct AdamWRule {
  using Update = AdamW<float>;
  static constexpr int kStates = 2;
  static constexpr bool kOptionalStates = false;

  float rest1, beta2, rest2, log_beta1, log_beta2, eps;

  static AdamWRule of(const Hyper& hyper) {
    const double beta1 = hyper.rest[0], beta2 = hyper.rest[1];
    return {static_cast<float>(1 - beta1),       static_cast<float>(beta2),
            static_cast<float>(1 - beta2),       static_cast<float>(std::log(beta1)),
            static_cast<float>(std::log(beta2)), static_cast<float>(hyper.rest[2])};
  }

  // As AdamW::of, but every thread can afford it: 1 - beta^step in float without cancellation.
  DST_FUNCTION Update update(float lr, float weight_decay, bool maximize,
                             const float* steps) const {
    const float step = *steps + 1.0f;
    const float root = std::sqrt(-std::expm1(step * log_beta2));
    return {1.0f - lr * weight_decay,
            rest1,
            beta2,
            rest2,
            root * lr / -std::expm1(step * log_beta1),
            root * eps,
            maximize};
  }

  static DST_FUNCTION float apply(const Update& update, float parameter, float gradient,
                                  float (&states)[kStates], bool) {
    return update(parameter, gradient, states[0], states[1]);
  }
};

// The regulariser's share in the gradient of some parameters.
struct Alpha {
  bool given;
  float value;
  const float* tensor;  // replaces the value

  static Alpha of(const Hyper& hyper) {
    return {hyper.has_alpha, static_cast<float>(hyper.alpha), hyper.alpha_tensor};
  }

  __device__ __forceinline__ float operator()() const { return tensor ? *tensor : value; }
};

// A row of hypers.
template <typename Rule>
struct Group {
  Rule rule;
  float lr, weight_decay;
  const float* rate;  // replaces lr
  Alpha alpha;
  bool maximize;

  static Group of(const Hyper& hyper) {
    return {Rule::of(hyper),
            static_cast<float>(hyper.lr),
            static_cast<float>(hyper.weight_decay),
            hyper.rate,
            Alpha::of(hyper),
            hyper.maximize};
  }

  __device__ __forceinline__ typename Rule::Update update(const float* steps) const {
    return rule.update(rate ? *rate : lr, weight_decay, maximize, steps);
  }
};

}  // namespace dst::cuda
