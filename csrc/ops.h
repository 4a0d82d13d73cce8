// The ops, the same in both libraries. cpu/library.cpp registers them and says what they do.
#pragma once

#include "arguments.h"

namespace dst {

void pack(const Tensors& weights, const Tensors& thresholds, const Integers& settings,
          const Tensors& masked, const Tensors& effective, const Tensor& kept);

void post(const Tensors& grads, const Tensors& weights, const Tensors& thresholds,
          const Integers& settings, const Tensors& grad_weights, const Tensors& grad_thresholds);

void regularization(const Tensors& thresholds, const Tensor& value, const Tensors& slopes);

void sgd_step(const Tensors& weights, const Tensors& grads, const Tensors& buffers,
              const Tensors& thresholds, const Tensors& threshold_grads,
              const Tensors& threshold_buffers, const Tensors& masked, const Tensor& kept,
              const Integers& settings, const Tensor& hypers, const Tensors& rates,
              const Tensors& alphas, const Tensors& scales);

void adamw_step(const Tensors& weights, const Tensors& grads, const Tensors& averages,
                const Tensors& squares, const Tensors& steps, const Tensors& thresholds,
                const Tensors& threshold_grads, const Tensors& threshold_averages,
                const Tensors& threshold_squares, const Tensors& threshold_steps,
                const Tensors& masked, const Tensor& kept, const Integers& settings,
                const Tensor& hypers, const Tensors& rates, const Tensors& alphas,
                const Tensors& scales);

void grad_norm(const Tensors& weights, const Tensors& grads, const Tensors& thresholds,
               const Tensors& threshold_grads, const Integers& settings, const Tensor& hypers,
               const Tensors& alphas, const Tensors& scales, const Tensor& norm);

}  // namespace dst
