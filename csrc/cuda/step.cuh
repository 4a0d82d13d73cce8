// The deferred optimizer step: one pass over all parameters, from raw dense gradients G to new
// weights, thresholds and W * M. The order of things is that of reference/step.py.
#pragma once

#include "reduce.cuh"
#include "step_table.cuh"
#include "surrogate.cuh"

namespace dst::cuda {

constexpr int kSumAhead = 16;  // numbers in flight per thread, of two arrays
constexpr int kStepAhead = 8;  // of three or four

// How gradients become final ones.
struct Scaling {
  float inverse, clip;

  static __device__ __forceinline__ Scaling of(const Scales& scales) {
    return {scales.grad_scale ? 1.0f / *scales.grad_scale : 1.0f,
            scales.clip ? *scales.clip : 1.0f};
  }
};

// One parameter and its states, at one place.
template <typename Rule, typename W, typename G, int N>
struct Loaded {
  Vector<G, N> grad;
  Vector<W, N> parameter;
  Vector<W, N> states[Rule::kStates];
};

// Where they lie, and how they are updated.
template <typename Rule, typename W, typename G, int N>
struct Updater {
  const G* grads;  // null: the gradient is the regulariser's alone
  W* parameters;
  W* states[Rule::kStates];  // null: the rule has none
  bool fresh;
  typename Rule::Update update;

  __device__ __forceinline__ Updater(const StepEntry& entry, const Group<Rule>& group)
      : grads(static_cast<const G*>(entry.grad)),
        parameters(static_cast<W*>(entry.weight)),
        fresh(Rule::kOptionalStates && entry.fresh_weight),
        update(group.update(entry.of_weight.steps)) {
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) states[s] = static_cast<W*>(entry.of_weight.states[s]);
  }

  __device__ __forceinline__ Loaded<Rule, W, G, N> load_at(int64_t i) const {
    Loaded<Rule, W, G, N> loaded;
    if (grads != nullptr) loaded.grad = load<Cache::kOnce, N>(grads + i);
    loaded.parameter = load<Cache::kOnce, N>(static_cast<const W*>(parameters) + i);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      if (has_state(s) && !fresh) {
        loaded.states[s] = load<Cache::kOnce, N>(static_cast<const W*>(states[s]) + i);
      }
    }
    return loaded;
  }

  __device__ __forceinline__ bool has_state(int s) const {
    return !Rule::kOptionalStates || states[s] != nullptr;
  }

  // gradient(parameter, raw gradient) is the final one. Returns the parameter as stored.
  template <typename Gradient>
  __device__ __forceinline__ Vector<float, N> update_at(int64_t i,
                                                        const Loaded<Rule, W, G, N>& loaded,
                                                        const Gradient& gradient) const {
    const Vector<float, N> old = to_floats(loaded.parameter), raw = to_floats(loaded.grad);
    Vector<float, N> parameter, state[Rule::kStates];
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) state[s] = to_floats(loaded.states[s]);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float of_one[Rule::kStates];
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s) of_one[s] = state[s].numbers[k];
      parameter.numbers[k] = Rule::apply(update, old.numbers[k],
                                         gradient(old.numbers[k], raw.numbers[k]), of_one, fresh);
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s) state[s].numbers[k] = of_one[s];
    }
    const Vector<W, N> rounded = from_floats<W>(parameter);
    store<Cache::kOnce>(parameters + i, rounded);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      if (has_state(s)) store<Cache::kOnce>(states[s] + i, from_floats<W>(state[s]));
    }
    return to_floats(rounded);
  }
};

// W * M of a few weights; returns how many are kept.
template <int N>
__device__ __forceinline__ int mask_at(const StepEntry& entry, int64_t i, Vector<float, N> weight,
                                       float threshold) {
  int kept = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    kept += !pruned(weight.numbers[k], threshold);
    weight.numbers[k] = masked(weight.numbers[k], threshold);
  }
  store_as<Cache::kKeep>(entry.masked_storage, entry.masked, i, weight);
  return kept;
}

// The threshold of a row with its own states: loaded before the row's sum is known, so that nobody
// waits for it afterwards.
template <typename Rule>
struct ThresholdUpdater {
  typename Rule::Update update;
  float old, further;  // `further`: what its gradient has besides the row's sum
  bool fresh;
  float states[Rule::kStates];

  __device__ __forceinline__ ThresholdUpdater(const StepEntry& entry, const Group<Rule>& group,
                                              int64_t row, float inverse)
      : update(group.update(entry.of_threshold.steps)),
        old(entry.threshold[row]),
        further(0.0f),
        fresh(Rule::kOptionalStates && entry.fresh_threshold),
        states{} {
    if (entry.threshold_grad != nullptr) {
      further = load_as(entry.threshold_grad_storage, entry.threshold_grad, row) * inverse;
    }
    if (group.alpha.given) further += group.alpha() * regularization_slope(old);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      const float* state = static_cast<const float*>(entry.of_threshold.states[s]);
      if (state != nullptr && !fresh) states[s] = state[row];
    }
  }

  __device__ __forceinline__ float operator()(const StepEntry& entry, int64_t row, float sum,
                                              float clip) {
    const float threshold = Rule::apply(update, old, (further - sum) * clip, states, fresh);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      float* state = static_cast<float*>(entry.of_threshold.states[s]);
      if (state != nullptr) state[row] = states[s];
    }
    entry.threshold[row] = threshold;
    return threshold;
  }
};

// -dt of a row from G and the old W, complete in every thread of the share.
template <typename W, typename G, int N>
__device__ __forceinline__ float sum_row(const StepEntry& entry, const Share& share,
                                         const Differentiation& differentiate, float inverse,
                                         float threshold) {
  const G* grads = static_cast<const G*>(entry.grad);
  const W* weights = static_cast<const W*>(entry.weight);
  struct Both {
    Vector<G, N> grad;
    Vector<W, N> weight;
  };
  float sum = 0.0f;
  if (grads == nullptr) return sum;
  stream<N, kSumAhead>(
      share,
      [&](int64_t i) {
        return Both{load<Cache::kKeep, N>(grads + i), load<Cache::kKeep, N>(weights + i)};
      },
      [&](int64_t, const Both& loaded) {
        const Vector<float, N> grad = to_floats(loaded.grad), weight = to_floats(loaded.weight);
        Vector<float, N> minus;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          minus.numbers[k] = differentiate(grad.numbers[k] * inverse, weight.numbers[k], threshold)
                                 .minus_threshold;
        }
        sum += tree_sum(minus);
      });
  return share_sum(share, sum);
}

// Rows of a masked weight. The threshold's gradient is a sum over the row, and the new threshold
// masks it: so the row is read twice, the second time from the caches. Returns what this thread has
// kept.
template <typename Rule, typename W, typename G, int N>
__device__ __forceinline__ int step_rows(const StepEntry& entry, const Group<Rule>* groups,
                                         const Scaling& scaling, int block) {
  const Share share = entry.tiling.share(block);
  const Differentiation differentiate{Curve::of(entry.surrogate), entry.structure};
  const bool inside = share.row < entry.tiling.rows;
  const float old_threshold = inside ? entry.threshold[share.row] : 0.0f;
  float threshold = old_threshold;
  if (entry.threshold_group >= 0) {
    ThresholdUpdater<Rule> updater(entry, groups[entry.threshold_group], inside ? share.row : 0,
                                   scaling.inverse);
    const float sum = sum_row<W, G, N>(entry, share, differentiate, scaling.inverse, old_threshold);
    if (share.rank == 0 && inside) threshold = updater(entry, share.row, sum, scaling.clip);
    threshold = share_broadcast(share, threshold);
  }

  int kept = 0;
  if (entry.weight_group >= 0) {
    const Updater<Rule, W, G, N> updater(entry, groups[entry.weight_group]);
    stream<N, kStepAhead>(
        share, [&](int64_t i) { return updater.load_at(i); },
        [&](int64_t i, const Loaded<Rule, W, G, N>& loaded) {
          const Vector<float, N> weight = updater.update_at(i, loaded, [&](float old, float raw) {
            return differentiate(raw * scaling.inverse, old, old_threshold).weight * scaling.clip;
          });
          if (entry.masked != nullptr) kept += mask_at(entry, i, weight, threshold);
        });
  } else if (entry.masked != nullptr) {
    const W* weights = static_cast<const W*>(entry.weight);
    stream<N, kSumAhead>(
        share, [&](int64_t i) { return load<Cache::kOnce, N>(weights + i); },
        [&](int64_t i, const Vector<W, N>& weight) {
          kept += mask_at(entry, i, to_floats(weight), threshold);
        });
  }
  return kept;
}

// Any other parameter.
template <typename Rule, typename W, typename G, int N>
__device__ __forceinline__ void step_plain(const StepEntry& entry, const Group<Rule>* groups,
                                           const Scaling& scaling, int block) {
  const Share share = entry.tiling.share(block);
  const Group<Rule>& group = groups[entry.weight_group];
  const Updater<Rule, W, G, N> updater(entry, group);
  const bool regularized = group.alpha.given;
  const float alpha = regularized ? group.alpha() : 0.0f;
  stream<N, kStepAhead>(
      share, [&](int64_t i) { return updater.load_at(i); },
      [&](int64_t i, const Loaded<Rule, W, G, N>& loaded) {
        updater.update_at(i, loaded, [&](float old, float raw) {
          float gradient = entry.grad != nullptr ? raw * scaling.inverse : 0.0f;
          if (regularized) gradient += alpha * regularization_slope(old);
          return gradient * scaling.clip;
        });
      });
}

template <typename Rule, typename W, typename Table>
__global__ void __launch_bounds__(kThreads, 4) step_kernel(const __grid_constant__ Table table) {
  const Scales& scales = table.common.scales;
  if (scales.found_inf != nullptr && *scales.found_inf == 1.0f) return;
  const auto place = table.place(blockIdx.x);
  const StepEntry& entry = place.entry;
  const int block = place.block;
  const Group<Rule>* groups = table.common.groups;
  const Scaling scaling = Scaling::of(scales);
  int kept = 0;
  const auto step = [&](auto type) {
    using G = decltype(type);
    constexpr int N = kWidth<W, G>;
    if (entry.threshold != nullptr) {
      if (entry.wide) {
        kept = step_rows<Rule, W, G, N>(entry, groups, scaling, block);
      } else {
        kept = step_rows<Rule, W, G, 1>(entry, groups, scaling, block);
      }
    } else if (entry.wide) {
      step_plain<Rule, W, G, N>(entry, groups, scaling, block);
    } else {
      step_plain<Rule, W, G, 1>(entry, groups, scaling, block);
    }
  };
  if constexpr (std::is_same_v<W, float>) {
    with_type(entry.grad_storage, step);
  } else {
    step(W{});
  }
  if (entry.guard.arrivals == nullptr) return;
  const int64_t of_all = sum_in_last(entry.guard.arrivals, entry.tiling.blocks(), block_sum(kept));
  if (of_all < 0) return;
  if (threadIdx.x == 0) {
    if (entry.of_weight.steps != nullptr) *entry.of_weight.steps += 1.0f;
    if (entry.of_threshold.steps != nullptr) *entry.of_threshold.steps += 1.0f;
  }
  if (entry.masked == nullptr) return;
  Masked layer = {entry.weight, entry.masked, entry.tiling.numel(), entry.masked_storage,
                  entry.wide};
  layer.thresholds[0] = entry.threshold;
  layer.count = entry.tiling.rows;
  settle<W>(entry.guard, layer, of_all);
}

}  // namespace dst::cuda
