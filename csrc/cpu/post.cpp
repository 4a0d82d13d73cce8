// dW and dt of many layers from the dense weight gradients, in one pass.
#include <algorithm>
#include <memory>

#include "../ops.h"
#include "../segments.h"
#include "blocks.h"
#include "storage.h"
#include "work.h"

namespace dst {
namespace {

// Up to kRun elements of a row: writes dW, returns their share of -dt.
template <typename Real, Surrogate surrogate, bool structure>
DST_FUNCTION Real post_run(const PostSegment& s, Real threshold, int64_t begin, int64_t end) {
  Real grads[kBlock], weights[kBlock], results[kBlock];
  Lanes<Real> lanes;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* grad = load(s.grad, at, count, grads);
    const Real* weight = load(s.weight, at, count, weights);
    Real* result = target(s.grad_weight, at, results);
    lanes.add(count, [&](int i) DST_LAMBDA {
      const auto both = gradients<Real, surrogate, structure>(grad[i], weight[i], threshold);
      result[i] = both.weight;
      return both.minus_threshold;
    });
    store(s.grad_weight, at, count, result);
  }
  return lanes.sum();
}

// Elements with a threshold each: writes dW and dt.
template <typename Real, Surrogate surrogate, bool structure>
DST_FUNCTION void post_elements(const PostSegment& s, int64_t begin, int64_t end) {
  Real grads[kBlock], weights[kBlock], results[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* grad = load(s.grad, at, count, grads);
    const Real* weight = load(s.weight, at, count, weights);
    const Real* threshold = static_cast<const Real*>(s.threshold.data) + at;
    Real* result = target(s.grad_weight, at, results);
    Real* grad_threshold = static_cast<Real*>(s.grad_threshold.data) + at;
    DST_VECTORIZE for (int i = 0; i < count; ++i) {
      const auto both = gradients<Real, surrogate, structure>(grad[i], weight[i], threshold[i]);
      result[i] = both.weight;
      grad_threshold[i] = -both.minus_threshold;
    }
    store(s.grad_weight, at, count, result);
  }
}

// `partials`: -dt of each unit of a long row.
template <typename Real, Surrogate surrogate, bool structure>
DST_FUNCTION void post_rows(const PostSegment& s, const Part& part, double* partials) {
  const Real* thresholds = static_cast<const Real*>(s.threshold.data);
  Real* grad_thresholds = static_cast<Real*>(s.grad_threshold.data);
  for (int64_t row = part.row; row < part.row + part.rows; ++row) {
    const int64_t begin = row * s.shape.columns + part.column;
    const int64_t end = begin + part.columns;
    if (s.granularity == Granularity::kElement) {
      post_elements<Real, surrogate, structure>(s, begin, end);
      continue;
    }
    double sum = 0;
    for (int64_t at = begin; at < end; at += kRun) {
      sum += post_run<Real, surrogate, structure>(s, thresholds[row], at, std::min(at + kRun, end));
    }
    if (is_long(s.shape)) {
      partials[part.unit] = sum;
    } else {
      grad_thresholds[row] = static_cast<Real>(-sum);
    }
  }
}

template <typename Real>
DST_FUNCTION void post_rows(const PostSegment& s, const Part& part, double* partials) {
  dispatch(s.surrogate, s.structure, [&]<Surrogate surrogate, bool structure>() DST_LAMBDA {
    post_rows<Real, surrogate, structure>(s, part, partials);
  });
}

DST_CLONES void post_part(const PostSegment& s, const Part& part, double* partials) {
  if (s.weight.storage == Storage::kFloat64) return post_rows<double>(s, part, partials);
  post_rows<float>(s, part, partials);
}

template <typename Real>
void add_units(const PostSegment& s, const double* partials) {
  Real* grad_thresholds = static_cast<Real*>(s.grad_threshold.data);
  const int64_t units = units_per_row(s.shape);
  for (int64_t row = 0; row < s.shape.rows; ++row, partials += units) {
    double sum = 0;
    for (int64_t u = 0; u < units; ++u) sum += partials[u];
    grad_thresholds[row] = static_cast<Real>(-sum);
  }
}

}  // namespace

Outputs post(const Tensors& grads, const Tensors& weights, const Tensors& thresholds,
             const Integers& settings, const std::optional<Tensors>& grad_weights,
             const std::optional<Tensors>& grad_thresholds) {
  const Reader reader("post", weights, true);
  Outputs outputs(grad_weights ? *grad_weights : new_like(weights),
                  grad_thresholds ? *grad_thresholds : new_like(thresholds));
  std::vector<PostSegment> segments = post_segments(reader, grads, weights, thresholds, settings,
                                                    std::get<0>(outputs), std::get<1>(outputs));
  std::vector<Rows> shapes;
  shapes.reserve(segments.size());
  for (PostSegment& s : segments) {
    if (!s.weight) fill_zero(s.grad_threshold);  // sums over nothing
    if (s.granularity != Granularity::kRow) s.shape = {1, s.weight.numel};
    shapes.push_back(s.shape);
  }
  const Work work(std::move(shapes));
  const std::unique_ptr<double[]> partials(new double[work.units()]);
  work.run([&](const Part& part) { post_part(segments[part.segment], part, partials.get()); });

  for (size_t i = 0; i < segments.size(); ++i) {
    const PostSegment& s = segments[i];
    if (!is_long(s.shape) || s.granularity == Granularity::kElement) continue;
    const double* first = partials.get() + work.first_unit(i);
    s.weight.storage == Storage::kFloat64 ? add_units<double>(s, first)
                                          : add_units<float>(s, first);
  }
  return outputs;
}

}  // namespace dst
