// Kept elements of a run, one after the other, and their columns.
//
// pack_run(run, count, keep, first column, values, columns) returns how many there are: those for
// which `keep` says so. It may write up to `count` elements, the kept ones first.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "../formulas.h"
#include "sparse.h"

namespace dst {

// Weights above a finite threshold.
struct Above {
  float threshold;

  DST_FUNCTION bool operator()(float weight) const { return !pruned(weight, threshold); }
  DST_FUNCTION Mask operator()(Vector weights) const {
    return (Mask) !(((Vector)((Bits)weights & 0x7fffffffu) <= threshold));
  }
};

struct NotZero {
  template <typename Real>
  DST_FUNCTION bool operator()(Real value) const {
    return number(value) != 0;
  }
  DST_FUNCTION Mask operator()(Vector values) const { return (Mask)(values != 0.0f); }
};

// Without a branch, which would often be guessed wrongly.
template <typename Real, typename Keep, typename Column>
DST_FUNCTION int64_t pack_elements(const Real* run, int64_t from, int64_t to, Keep keep,
                                   int64_t first, int64_t kept, Real* values, Column* columns) {
  for (int64_t i = from; i < to; ++i) {
    values[kept] = run[i];
    columns[kept] = static_cast<Column>(first + i);
    kept += keep(run[i]);
  }
  return kept;
}

#if defined(__GNUC__) && !defined(__clang__)

// For each set of eight lanes, the lanes that are in it, in order.
template <typename T>
struct LanesOf {
  alignas(32) std::array<std::array<T, kLanes>, 256> table{};

  constexpr LanesOf() {
    for (int set = 0; set < 256; ++set) {
      int used = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (set >> lane & 1) table[set][used++] = static_cast<T>(lane);
      }
    }
  }
};

template <typename T>
inline constexpr LanesOf<T> kLanesOf;

template <typename T>
using Lanes8 [[gnu::vector_size(sizeof(T) * kLanes), gnu::aligned(2), gnu::may_alias]] = T;

// Eight at a time: what is stored too much is overwritten next, or lies behind the kept ones.
template <typename Keep, typename Column>
DST_FUNCTION int64_t pack_run(const float* run, int64_t count, Keep keep, int64_t first,
                              float* values, Column* columns) {
  constexpr Mask lane = {1, 2, 4, 8, 16, 32, 64, 128};
  int64_t kept = 0, i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector block = load(run + i);
    const Mask a = keep(block) & lane;
    const Mask b = a + Mask{a[4], a[5], a[6], a[7], a[0], a[1], a[2], a[3]};
    const Mask c = b + Mask{b[2], b[3], b[0], b[1], b[6], b[7], b[4], b[5]};
    const int32_t set = c[0] + c[1];
    const auto wide = *reinterpret_cast<const Mask*>(kLanesOf<int32_t>.table[set].data());
    const auto lanes = *reinterpret_cast<const Lanes8<Column>*>(kLanesOf<Column>.table[set].data());
    store(__builtin_shuffle(block, wide), values + kept);
    *reinterpret_cast<Lanes8<Column>*>(columns + kept) = lanes + static_cast<Column>(first + i);
    kept += std::popcount(static_cast<uint32_t>(set));
  }
  return pack_elements(run, i, count, keep, first, kept, values, columns);
}

#endif

template <typename Real, typename Keep, typename Column>
DST_FUNCTION int64_t pack_run(const Real* run, int64_t count, Keep keep, int64_t first,
                              Real* values, Column* columns) {
  return pack_elements(run, 0, count, keep, first, 0, values, columns);
}

}  // namespace dst
