// The arguments of sgd_step, adamw_step and grad_norm, checked and sorted by segment.
#pragma once

#include "arguments.h"

namespace dst {

// A param group's numbers. Pointers are to device memory, null where the number beside them holds.
struct Hyper {
  double lr, weight_decay, alpha;
  bool maximize, has_alpha;
  double rest[3];               // SGD: momentum, dampening, nesterov; AdamW: beta1, beta2, eps
  const float* rate = nullptr;  // replaces lr
  const float* alpha_tensor = nullptr;  // replaces alpha
};

// Device memory, null where absent.
struct Scales {
  const float* grad_scale;
  const float* found_inf;
  const float* clip;
};

// A parameter beside what the optimizer keeps for it.
struct State {
  Array first;                 // SGD: momentum buffer; AdamW: average
  Array second;                // AdamW: average of squares
  float* step = nullptr;       // AdamW: steps done
  bool uninitialised = false;  // SGD: the buffer is to be written, not read
};

// Without `threshold` a plain parameter: `shape` is one row, and only the weight's half counts.
struct StepSegment {
  Array weight, grad, threshold, threshold_grad, masked;
  State weight_state, threshold_state;
  // Where these are given (CPU), `masked` gets the kept weights alone, as rows: see cpu/sparse.h.
  void* kept_columns = nullptr;
  int32_t* kept_places = nullptr;
  bool kept_small = false;  // columns are uint16, not int32
  Rows shape;
  int32_t weight_hyper, threshold_hyper;  // rows of hypers; -1: not updated
  Surrogate surrogate;
  bool structure;
  int64_t collapsed;
};

constexpr size_t kStepSettings = 7;

// hypers: float64 [h, 8] on the CPU; rates and alphas: one per row, or none.
inline std::vector<Hyper> read_hypers(const Reader& reader, const Tensor& hypers,
                                      const Tensors& rates, const Tensors& alphas) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(hypers.get(), &code));
  STD_TORCH_CHECK(hypers.is_cpu() && code == aoti_torch_dtype_float64() && hypers.dim() == 2 &&
                      hypers.size(1) == 8 && hypers.is_contiguous(),
                  reader.op(), ": hypers must be a contiguous float64 tensor [h, 8] on the CPU");
  std::vector<Hyper> rows(hypers.size(0));
  const auto check_rows = [&](const char* list, const Tensors& tensors) {
    STD_TORCH_CHECK(tensors.empty() || tensors.size() == rows.size(), reader.op(), ": ", list,
                    " has ", tensors.size(), " entries, expected ", rows.size(),
                    ", one per row of hypers, or none");
  };
  check_rows("rates", rates);
  check_rows("alphas", alphas);
  const double* numbers = static_cast<const double*>(hypers.data_ptr());
  for (size_t i = 0; i < rows.size(); ++i, numbers += 8) {
    Hyper& row = rows[i];
    row.lr = numbers[0];
    row.weight_decay = numbers[1];
    row.maximize = numbers[2] != 0;
    row.has_alpha = numbers[3] != 0;
    row.alpha = numbers[4];
    for (int k = 0; k < 3; ++k) row.rest[k] = numbers[5 + k];
    if (!rates.empty()) row.rate = reader.scalar(rates[i], {"rates", i});
    if (!alphas.empty()) row.alpha_tensor = reader.scalar(alphas[i], {"alphas", i});
  }
  return rows;
}

inline Scales read_scales(const Reader& reader, const Tensors& scales) {
  if (scales.empty()) return {nullptr, nullptr, nullptr};
  STD_TORCH_CHECK(scales.size() == 3, reader.op(), ": scales has ", scales.size(),
                  " entries, expected none or 3: grad_scale, found_inf, clip");
  return {reader.scalar(scales[0], {"scales", 0}), reader.scalar(scales[1], {"scales", 1}),
          reader.scalar(scales[2], {"scales", 2})};
}

// Weights, gradients, thresholds and settings: what all three ops have in common.
inline std::vector<StepSegment> step_segments(const Reader& reader, const Tensors& weights,
                                              const Tensors& grads, const Tensors& thresholds,
                                              const Tensors& threshold_grads,
                                              const Integers& settings, size_t hypers) {
  reader.check_length("grads", grads.size());
  reader.check_length("thresholds", thresholds.size());
  if (!threshold_grads.empty()) reader.check_length("threshold_grads", threshold_grads.size());
  reader.check_length("settings", settings.size(), kStepSettings);
  std::vector<StepSegment> segments(reader.count());
  for (size_t i = 0; i < segments.size(); ++i) {
    StepSegment& s = segments[i];
    s.weight = reader.optional(weights[i], {"weights", i});
    s.grad = reader.optional(grads[i], {"grads", i}, s.weight.numel);
    s.threshold = reader.optional(thresholds[i], {"thresholds", i});
    if (s.threshold) {
      s.shape = reader.rows(weights[i], {"weights", i});
      reader.required(thresholds[i], {"thresholds", i}, s.shape.rows);  // one per row
      reader.check_dense_rows(thresholds[i], {"thresholds", i});
      if (s.grad) reader.check_dense_rows(grads[i], {"grads", i});
    } else {
      reader.check_dense(weights[i], {"weights", i});
      if (s.grad) reader.check_dense(grads[i], {"grads", i});
      s.shape = {1, s.weight.numel};
    }
    if (!threshold_grads.empty()) {
      s.threshold_grad =
          reader.optional(threshold_grads[i], {"threshold_grads", i}, s.threshold.numel);
    }
    reader.check_storage(s.threshold, arithmetic(s.weight), {"thresholds", i});
    const int64_t* setting = settings.data() + kStepSettings * i;
    for (int k = 0; k < 2; ++k) {
      STD_TORCH_CHECK(setting[k] >= -1 && setting[k] < static_cast<int64_t>(hypers), reader.op(),
                      ": segment ", i, " names row ", setting[k], " of hypers, which has ", hypers);
    }
    s.weight_hyper = static_cast<int32_t>(setting[0]);
    s.threshold_hyper = static_cast<int32_t>(setting[1]);
    s.surrogate = reader.surrogate(setting[2], i);
    s.structure = setting[3] != 0;
    s.collapsed = setting[4];
    s.weight_state.uninitialised = setting[5] != 0;
    s.threshold_state.uninitialised = setting[6] != 0;
  }
  return segments;
}

// Whether the step changes the weight, and the threshold.
inline bool updates_weight(const StepSegment& s, const std::vector<Hyper>& hypers) {
  if (s.weight_hyper < 0 || !s.weight) return false;
  return s.grad || (!s.threshold && hypers[s.weight_hyper].has_alpha);
}

inline bool updates_threshold(const StepSegment& s, const std::vector<Hyper>& hypers) {
  if (s.threshold_hyper < 0 || !s.threshold) return false;
  return s.grad || s.threshold_grad || hypers[s.threshold_hyper].has_alpha;
}

inline void read_masked(const Reader& reader, const Tensors& masked,
                        std::vector<StepSegment>& segments) {
  reader.check_length("masked", masked.size());
  for (size_t i = 0; i < segments.size(); ++i) {
    StepSegment& s = segments[i];
    s.masked = reader.optional(masked[i], {"masked", i}, s.weight.numel);
    if (!s.masked) continue;
    STD_TORCH_CHECK(s.threshold, reader.op(), ": ", Name{"masked", i},
                    " is given for a parameter without threshold");
    reader.check_dense_rows(masked[i], {"masked", i});
  }
}

// Which half of a segment: the weight (or plain parameter) or the thresholds.
enum class Half { kWeight, kThreshold };

// f(index, parameter, its state, its hypers) for every parameter of that half that is updated.
template <typename F>
void for_each_updated(std::vector<StepSegment>& segments, const std::vector<Hyper>& hypers,
                      Half half, const F& f) {
  for (size_t i = 0; i < segments.size(); ++i) {
    StepSegment& s = segments[i];
    if (half == Half::kThreshold) {
      if (updates_threshold(s, hypers)) {
        f(i, s.threshold, s.threshold_state, hypers[s.threshold_hyper]);
      }
    } else if (updates_weight(s, hypers)) {
      f(i, s.weight, s.weight_state, hypers[s.weight_hyper]);
    }
  }
}

inline Array read_state(const Reader& reader, const Tensor& tensor, Name name,
                        const Array& parameter) {
  const Array state = reader.required(tensor, name, parameter.numel);
  reader.check_storage(state, parameter.storage, name);
  reader.check_dense(tensor, name);
  return state;
}

inline void read_sgd_state(const Reader& reader, const std::vector<Hyper>& hypers, Half half,
                           const char* list, const Tensors& buffers,
                           std::vector<StepSegment>& segments) {
  reader.check_length(list, buffers.size());
  for_each_updated(segments, hypers, half,
                   [&](size_t i, const Array& parameter, State& state, const Hyper& hyper) {
                     const bool momentum = hyper.rest[0] != 0;
                     if (!momentum) return;
                     state.first = read_state(reader, buffers[i], {list, i}, parameter);
                   });
}

inline void read_adamw_state(const Reader& reader, const std::vector<Hyper>& hypers, Half half,
                             const char* const (&lists)[3], const Tensors& averages,
                             const Tensors& squares, const Tensors& steps,
                             std::vector<StepSegment>& segments) {
  reader.check_length(lists[0], averages.size());
  reader.check_length(lists[1], squares.size());
  reader.check_length(lists[2], steps.size());
  for_each_updated(segments, hypers, half,
                   [&](size_t i, const Array& parameter, State& state, const Hyper&) {
                     state.first = read_state(reader, averages[i], {lists[0], i}, parameter);
                     state.second = read_state(reader, squares[i], {lists[1], i}, parameter);
                     const float* step = reader.scalar(steps[i], {lists[2], i});
                     STD_TORCH_CHECK(step, reader.op(), ": ", Name{lists[2], i}, " is missing");
                     state.step = const_cast<float*>(step);
                   });
}

}  // namespace dst
