// W * M, effective thresholds and kept counts of many layers in one pass.
#include <algorithm>

#include "../ops.h"
#include "../segments.h"
#include "blocks.h"
#include "storage.h"
#include "work.h"

namespace dst {
namespace {

// One run of a weight under one threshold, or one for each element; returns the kept count.
template <typename Real, bool element>
DST_FUNCTION int64_t pack_run(const PackSegment& s, Real threshold, int64_t begin, int64_t end) {
  Real weights[kBlock], results[kBlock], limits[kBlock];
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* weight = load(s.weight, at, count, weights);
    Real* result = target(s.masked, at, results);
    if constexpr (element) {
      const Real* limit = load(s.threshold, at, count, limits);
      kept += mask_block(weight, ElementThresholds<Real>{limit}, result, count);
      std::copy(limit, limit + count, target(s.effective, at, limits));
    } else {
      kept += mask_block(weight, RowThreshold<Real>{threshold}, result, count);
    }
    store(s.masked, at, count, result);
  }
  return kept;
}

template <typename Real>
DST_FUNCTION int64_t pack_rows(const PackSegment& s, const Part& part, bool collapsed) {
  const Real* thresholds = static_cast<const Real*>(s.threshold.data);
  int64_t kept = 0;
  for (int64_t row = part.row; row < part.row + part.rows; ++row) {
    const int64_t begin = row * s.shape.columns + part.column;
    const int64_t end = begin + part.columns;
    if (s.granularity == Granularity::kElement && !collapsed) {
      kept += pack_run<Real, true>(s, Real(0), begin, end);
    } else {
      kept += pack_run<Real, false>(s, collapsed ? Real(0) : thresholds[row], begin, end);
    }
  }
  return kept;
}

DST_CLONES int64_t pack_part(const PackSegment& s, const Part& part, bool collapsed) {
  if (s.weight.storage == Storage::kFloat64) return pack_rows<double>(s, part, collapsed);
  return pack_rows<float>(s, part, collapsed);
}

// Packs and counts these segments, thresholds taken as 0 where `collapsed`.
void pack_all(const std::vector<PackSegment>& segments, std::vector<Rows> shapes, bool collapsed,
              int64_t* kept) {
  Work(std::move(shapes)).run([&](const Part& part) {
    const int64_t count = pack_part(segments[part.segment], part, collapsed);
    __atomic_fetch_add(kept + part.segment, count, __ATOMIC_RELAXED);
  });
}

}  // namespace

Outputs pack(const Tensors& weights, const Tensors& thresholds, const Integers& settings,
             const std::optional<Tensors>& masked, const std::optional<Tensors>& effective,
             const std::optional<Tensor>& kept, std::optional<ScalarType> dtype) {
  const Reader reader("pack", weights, true);
  Outputs outputs(masked ? *masked : new_like(weights, dtype),
                  effective ? *effective : new_like(thresholds));
  std::vector<PackSegment> segments = pack_segments(reader, weights, thresholds, settings,
                                                    std::get<0>(outputs), std::get<1>(outputs));
  Integers counted(kept ? 0 : segments.size());
  int64_t* counts = kept ? reader.counts(*kept, "kept") : counted.data();
  std::fill_n(counts, segments.size(), 0);

  std::vector<Rows> shapes;
  shapes.reserve(segments.size());
  for (PackSegment& s : segments) {
    if (s.granularity != Granularity::kRow) s.shape = {1, s.weight.numel};
    shapes.push_back(s.shape);
  }
  pack_all(segments, shapes, false, counts);

  bool again = false;
  for (size_t i = 0; i < segments.size(); ++i) {
    const PackSegment& s = segments[i];
    const bool collapsed = s.weight && counts[i] <= s.collapsed;
    if (collapsed) {
      again = true;
      fill_zero(s.effective);
      if (s.commit) fill_zero(s.threshold);
      counts[i] = 0;
    } else {
      shapes[i] = {0, 0};
      if (s.granularity != Granularity::kElement) copy(s.threshold, s.effective);
    }
  }
  if (again) pack_all(segments, shapes, true, counts);
  return outputs;
}

}  // namespace dst
