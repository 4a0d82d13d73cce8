// The ops as the dispatcher calls them. ../segments.h and ../step_segments.h say what they take.
#pragma once

#include "../arguments.h"

namespace dst::cuda {

void pack(Tensors weights, Tensors thresholds, Integers settings, Tensors masked, Tensors effective,
          Tensor kept);

void post(Tensors grads, Tensors weights, Tensors thresholds, Integers settings,
          Tensors grad_weights, Tensors grad_thresholds);

void regularization(Tensors thresholds, Tensor value, Tensors slopes);

void sgd_step(Tensors weights, Tensors grads, Tensors buffers, Tensors thresholds,
              Tensors threshold_grads, Tensors threshold_buffers, Tensors masked, Tensor kept,
              Integers settings, Tensor hypers, Tensors rates, Tensors alphas, Tensors scales);

void adamw_step(Tensors weights, Tensors grads, Tensors averages, Tensors squares, Tensors steps,
                Tensors thresholds, Tensors threshold_grads, Tensors threshold_averages,
                Tensors threshold_squares, Tensors threshold_steps, Tensors masked, Tensor kept,
                Integers settings, Tensor hypers, Tensors rates, Tensors alphas, Tensors scales);

void grad_norm(Tensors weights, Tensors grads, Tensors thresholds, Tensors threshold_grads,
               Integers settings, Tensor hypers, Tensors alphas, Tensors scales, Tensor norm);

}  // namespace dst::cuda
