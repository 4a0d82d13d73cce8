// The ops, the same in both libraries but for sparse products (CPU). cpu/library.cpp registers them
// and says what they do.
#pragma once

#include <tuple>

#include "arguments.h"

namespace dst {

// The caller's tensors, or new ones.
using Outputs = std::tuple<Tensors, Tensors>;

Outputs pack(const Tensors& weights, const Tensors& thresholds, const Integers& settings,
             const std::optional<Tensors>& masked, const std::optional<Tensors>& effective,
             const std::optional<Tensor>& kept, std::optional<ScalarType> dtype);

Outputs post(const Tensors& grads, const Tensors& weights, const Tensors& thresholds,
             const Integers& settings, const std::optional<Tensors>& grad_weights,
             const std::optional<Tensors>& grad_thresholds);

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
