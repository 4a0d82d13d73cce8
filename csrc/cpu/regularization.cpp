// The sparse regulariser over all thresholds of a call, and its slopes.
#include <algorithm>
#include <memory>

#include "../ops.h"
#include "blocks.h"
#include "storage.h"
#include "work.h"

namespace dst {
namespace {

struct Thresholds {
  Array values, slopes;
};

template <typename Real>
DST_FUNCTION double run(const Thresholds& s, int64_t begin, int64_t end) {
  Real thresholds[kBlock], slopes[kBlock];
  double sum = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* threshold = load(s.values, at, count, thresholds);
    Real* slope = target(s.slopes, at, slopes);
    double block = 0;
    for (int i = 0; i < count; ++i) {
      slope[i] = regularization_slope(threshold[i]);
      block += regularization_value(threshold[i]);
    }
    sum += block;
    store(s.slopes, at, count, slope);
  }
  return sum;
}

}  // namespace

void regularization(const Tensors& thresholds, const Tensor& value, const Tensors& slopes) {
  const Reader reader("regularization", thresholds, true);
  reader.check_length("slopes", slopes.size());
  std::vector<Thresholds> segments(reader.count());
  std::vector<Rows> shapes;
  shapes.reserve(segments.size());
  bool doubles = false;
  for (size_t i = 0; i < segments.size(); ++i) {
    Thresholds& s = segments[i];
    s.values = reader.optional(thresholds[i], {"thresholds", i});
    s.slopes = reader.required(slopes[i], {"slopes", i}, s.values.numel);
    reader.check_storage(s.values, arithmetic(s.values), {"thresholds", i});
    reader.check_storage(s.slopes, s.values.storage, {"slopes", i});
    reader.check_dense(thresholds[i], {"thresholds", i});
    reader.check_dense(slopes[i], {"slopes", i});
    doubles |= s.values.storage == Storage::kFloat64;  // also of a shard without elements
    shapes.push_back({1, s.values.numel});
  }
  const Array result = reader.required(value, {"value", 0}, 1);
  reader.check_storage(result, doubles ? Storage::kFloat64 : Storage::kFloat32, {"value", 0});

  const Work work(std::move(shapes));
  const std::unique_ptr<double[]> sums(new double[work.units()]);
  work.run([&](const Part& part) {
    const Thresholds& s = segments[part.segment];
    const int64_t end = part.column + part.columns;
    sums[part.unit] = s.values.storage == Storage::kFloat64 ? run<double>(s, part.column, end)
                                                            : run<float>(s, part.column, end);
  });
  double sum = 0;
  for (int64_t unit = 0; unit < work.units(); ++unit) sum += sums[unit];
  if (doubles) {
    *static_cast<double*>(result.data) = sum;
  } else {
    *static_cast<float*>(result.data) = static_cast<float>(sum);
  }
}

}  // namespace dst
