// Numbers as they are stored, read and written in blocks of the arithmetic's type.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../arguments.h"
#include "vector.h"

namespace dst {

template <typename Real>
constexpr Storage kStorageOf = std::is_same_v<Real, double> ? Storage::kFloat64 : Storage::kFloat32;

inline size_t bytes(const Array& array) {
  constexpr size_t kSizes[] = {4, 8, 2, 2};
  return array.numel * kSizes[static_cast<int>(array.storage)];
}

// Elements from `offset` on, in another type.
void widen(const Array& from, int64_t offset, int count, float* to);
void widen(const Array& from, int64_t offset, int count, double* to);
void narrow(const float* from, const Array& to, int64_t offset, int count);
void narrow(const double* from, const Array& to, int64_t offset, int count);

// `count` <= kBlock elements from `offset` on: where they are if they are stored as Real, else
// converted into `buffer`.
template <typename Real>
DST_FUNCTION const Real* load(const Array& array, int64_t offset, int count, Real* buffer) {
  if (array.storage == kStorageOf<Real>) return static_cast<const Real*>(array.data) + offset;
  widen(array, offset, count, buffer);
  return buffer;
}

template <typename Real>
DST_FUNCTION Real load_one(const Array& array, int64_t index) {
  Real buffer = 0;
  return *load(array, index, 1, &buffer);
}

// Where to compute elements to be stored: in place if they are stored as Real, else in `buffer`.
template <typename Real>
DST_FUNCTION Real* target(const Array& array, int64_t offset, Real* buffer) {
  if (array.storage != kStorageOf<Real>) return buffer;
  return static_cast<Real*>(array.data) + offset;
}

// Stores what was computed in `target`.
template <typename Real>
DST_FUNCTION void store(const Array& array, int64_t offset, int count, const Real* values) {
  if (array.storage != kStorageOf<Real>) narrow(values, array, offset, count);
}

// All bits zero is the number 0 in every dtype.
inline void fill_zero(const Array& array) { std::memset(array.data, 0, bytes(array)); }

// Between arrays of one dtype and size.
inline void copy(const Array& from, const Array& to) {
  std::memcpy(to.data, from.data, bytes(from));
}

}  // namespace dst
