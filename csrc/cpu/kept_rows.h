// Kept elements of a run, one after the other, and their columns.
#pragma once

#include <cstdint>

#include "sparse.h"

namespace dst {

// Puts the weights that are above a threshold (finite, or minus infinity), or NaN, into `values`,
// and their columns, of which `first` is the run's first, into `columns`; returns how many there
// are. May write up to `count` elements, the kept ones first. By the processor's own instructions
// for this, where it has some: written out, it would take as long as the rest of a step.
int64_t pack_run(const float* run, int64_t count, float threshold, int64_t first, float* values,
                 uint16_t* columns);
int64_t pack_run(const float* run, int64_t count, float threshold, int64_t first, float* values,
                 int32_t* columns);

// The same with what is not 0.
template <typename Real, typename Column>
DST_FUNCTION int64_t pack_not_zero(const Real* run, int64_t count, int64_t first, Real* values,
                                   Column* columns) {
  if constexpr (std::is_same_v<Real, float>) {
    return pack_run(run, count, 0.0f, first, values, columns);
  } else {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {  // a branch would often be guessed wrongly
      values[kept] = run[i];
      columns[kept] = static_cast<Column>(first + i);
      kept += number(run[i]) != 0;
    }
    return kept;
  }
}

}  // namespace dst
