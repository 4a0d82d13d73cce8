// The arguments of pack, post and regularization, checked and sorted by segment.
#pragma once

#include "arguments.h"

namespace dst {

struct PackSegment {
  Array weight, threshold, masked, effective;
  Rows shape;
  Granularity granularity;
  int64_t collapsed;  // the guard resets up to this kept count; -1: never
  bool commit;        // a reset is written into `threshold` too
};

struct PostSegment {
  Array grad, weight, threshold, grad_weight, grad_threshold;
  Rows shape;
  Granularity granularity;
  Surrogate surrogate;
  bool structure;
};

inline std::vector<PackSegment> pack_segments(const Reader& reader, const Tensors& weights,
                                              const Tensors& thresholds, const Integers& settings,
                                              const Tensors& masked, const Tensors& effective) {
  reader.check_length("thresholds", thresholds.size());
  reader.check_length("settings", settings.size(), 2);
  reader.check_length("masked", masked.size());
  reader.check_length("effective", effective.size());
  std::vector<PackSegment> segments(reader.count());
  for (size_t i = 0; i < segments.size(); ++i) {
    PackSegment& s = segments[i];
    s.weight = reader.optional(weights[i], {"weights", i});
    s.shape = reader.rows(weights[i], {"weights", i});
    s.threshold = reader.optional(thresholds[i], {"thresholds", i});
    s.granularity = reader.granularity(s.threshold, s.weight, s.shape, {"thresholds", i});
    s.masked = reader.required(masked[i], {"masked", i}, s.weight.numel);
    s.effective = reader.required(effective[i], {"effective", i}, s.threshold.numel);
    reader.check_storage(s.threshold, arithmetic(s.weight), {"thresholds", i});
    reader.check_storage(s.effective, arithmetic(s.weight), {"effective", i});
    reader.check_dense_rows(thresholds[i], {"thresholds", i});
    reader.check_dense_rows(masked[i], {"masked", i});
    reader.check_dense_rows(effective[i], {"effective", i});
    s.collapsed = settings[2 * i];
    s.commit = settings[2 * i + 1] != 0;
  }
  return segments;
}

inline std::vector<PostSegment> post_segments(const Reader& reader, const Tensors& grads,
                                              const Tensors& weights, const Tensors& thresholds,
                                              const Integers& settings, const Tensors& grad_weights,
                                              const Tensors& grad_thresholds) {
  reader.check_length("grads", grads.size());
  reader.check_length("thresholds", thresholds.size());
  reader.check_length("settings", settings.size(), 2);
  reader.check_length("grad_weights", grad_weights.size());
  reader.check_length("grad_thresholds", grad_thresholds.size());
  std::vector<PostSegment> segments(reader.count());
  for (size_t i = 0; i < segments.size(); ++i) {
    PostSegment& s = segments[i];
    s.weight = reader.optional(weights[i], {"weights", i});
    s.shape = reader.rows(weights[i], {"weights", i});
    s.threshold = reader.optional(thresholds[i], {"thresholds", i});
    s.granularity = reader.granularity(s.threshold, s.weight, s.shape, {"thresholds", i});
    s.grad = reader.required(grads[i], {"grads", i}, s.weight.numel);
    s.grad_weight = reader.required(grad_weights[i], {"grad_weights", i}, s.weight.numel);
    s.grad_threshold =
        reader.required(grad_thresholds[i], {"grad_thresholds", i}, s.threshold.numel);
    reader.check_storage(s.threshold, arithmetic(s.weight), {"thresholds", i});
    reader.check_storage(s.grad_weight, s.weight.storage, {"grad_weights", i});
    reader.check_storage(s.grad_threshold, arithmetic(s.weight), {"grad_thresholds", i});
    reader.check_dense_rows(grads[i], {"grads", i});
    reader.check_dense_rows(thresholds[i], {"thresholds", i});
    reader.check_dense_rows(grad_weights[i], {"grad_weights", i});
    reader.check_dense_rows(grad_thresholds[i], {"grad_thresholds", i});
    s.surrogate = reader.surrogate(settings[2 * i], i);
    s.structure = settings[2 * i + 1] != 0;
  }
  return segments;
}

}  // namespace dst
