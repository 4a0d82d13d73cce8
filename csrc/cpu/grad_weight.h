// What the gradients of kept weights share: sums over the numbers of blocks, one for each weight.
#pragma once

#include "sparse.h"

namespace dst {

// Eight vectors added up, each into its number.
DST_FUNCTION Vector add_lanes(const Vector* r) {
  Vector s[4], t[2];
  for (int i = 0; i < 4; ++i) {
    const Vector a = r[2 * i], b = r[2 * i + 1];
    s[i] = Vector{a[0], b[0], a[1], b[1], a[4], b[4], a[5], b[5]} +
           Vector{a[2], b[2], a[3], b[3], a[6], b[6], a[7], b[7]};
  }
  for (int i = 0; i < 2; ++i) {
    const Vector a = s[2 * i], b = s[2 * i + 1];
    t[i] = Vector{a[0], a[1], b[0], b[1], a[4], a[5], b[4], b[5]} +
           Vector{a[2], a[3], b[2], b[3], a[6], a[7], b[6], b[7]};
  }
  const Vector a = t[0], b = t[1];
  return Vector{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]} +
         Vector{a[4], a[5], a[6], a[7], b[4], b[5], b[6], b[7]};
}

// The sums of up to eight neighbours, of which `count` are left, beside or in place of earlier
// ones.
DST_FUNCTION void put_sums(Vector sums, int64_t count, bool add, float* to) {
  if (count >= kLanes) return store(add ? load(to) + sums : sums, to);
  for (int64_t i = 0; i < count; ++i) to[i] = add ? to[i] + sums[i] : sums[i];
}

// Sums in float32, in the places of the weights: those of `values` itself, or ones to be rounded.
class WeightSums {
 public:
  WeightSums(const SparseRows& weight, const Tensor& values)
      : weight_(weight), values_(values.data_ptr()) {
    if (weight.dtype != ScalarType::Float) wide_ = Scratch<float>(Use::kValues, weight.stored());
  }

  float* get() const { return wide_.get() ? wide_.get() : static_cast<float*>(values_); }

  void clear() const {
    for (int64_t row = 0; row < weight_.rows; ++row) {
      std::fill_n(get() + weight_.begin(row), weight_.count(row), 0.0f);
    }
  }

  // Rounds them into the values.
  void finish() const;

 private:
  const SparseRows& weight_;
  void* values_;
  Scratch<float> wide_;
};

}  // namespace dst
