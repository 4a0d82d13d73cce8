// input W^T + bias for a sparse W and one input or two.
//
// One input is read where each weight needs it. Of two, the numbers for one column are first put
// side by side.
#include <bit>
#include <cstring>

#include "sparse_linear.h"
#include "storage.h"

namespace dst {
namespace {

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadMask __attribute__((vector_size(16)));
typedef uint64_t Pairs __attribute__((vector_size(16)));

// Eight numbers of x, not next to each other.
DST_FUNCTION Vector gather(const float* x, const int32_t* c) {
  return Vector{x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]};
}

// Processors load twice in a cycle or so; shifts come on top.
DST_FUNCTION Vector gather(const float* x, const uint16_t* c) {
  if constexpr (std::endian::native == std::endian::little) {
    uint64_t a, b;
    std::memcpy(&a, c, 8);
    std::memcpy(&b, c + 4, 8);
    return Vector{x[a & 0xffff], x[a >> 16 & 0xffff], x[a >> 32 & 0xffff], x[a >> 48],
                  x[b & 0xffff], x[b >> 16 & 0xffff], x[b >> 32 & 0xffff], x[b >> 48]};
  } else {
    return Vector{x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]};
  }
}

DST_FUNCTION uint64_t pair(const float* x, int64_t column) {
  uint64_t both;
  std::memcpy(&both, x + 2 * column, sizeof(both));
  return both;
}

// Two pairs of numbers of x.
DST_FUNCTION Quad gather_pairs(const float* x, const int32_t* c) {
  return (Quad)Pairs{pair(x, c[0]), pair(x, c[1])};
}

DST_FUNCTION Quad gather_pairs(const float* x, const uint16_t* c) {
  if constexpr (std::endian::native == std::endian::little) {
    uint32_t a;
    std::memcpy(&a, c, 4);
    return (Quad)Pairs{pair(x, a & 0xffff), pair(x, a >> 16)};
  } else {
    return (Quad)Pairs{pair(x, c[0]), pair(x, c[1])};
  }
}

// What eight weights give is added up here. `keep(terms, weight)` has the last word on the terms of
// each weight.
struct OneInput {
  static constexpr int kInputs = 1;
  Vector sums = {};

  template <typename Real, typename Column, typename Keep>
  DST_FUNCTION void add(const Real* values, const Column* columns, const float* x,
                        const Keep& keep) {
    sums += keep(load(values) * gather(x, columns), Mask{0, 1, 2, 3, 4, 5, 6, 7});
  }

  DST_FUNCTION void get(float* result) const {
    result[0] =
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }
};

// The numbers of both for a column are side by side in x, and in the sums.
struct TwoInputs {
  static constexpr int kInputs = 2;
  Quad sums[2] = {};

  template <typename Column, typename Keep>
  DST_FUNCTION void add(const float* values, const Column* columns, const float* x,
                        const Keep& keep) {
    const Vector v = load(values);
    const auto add_two = [&](Quad& sum, int i, Quad of_two) DST_LAMBDA {
      sum += keep(of_two * gather_pairs(x, columns + i), QuadMask{i, i, i + 1, i + 1});
    };
    add_two(sums[0], 0, Quad{v[0], v[0], v[1], v[1]});
    add_two(sums[1], 2, Quad{v[2], v[2], v[3], v[3]});
    add_two(sums[0], 4, Quad{v[4], v[4], v[5], v[5]});
    add_two(sums[1], 6, Quad{v[6], v[6], v[7], v[7]});
  }

  DST_FUNCTION void get(float* result) const {
    const Quad all = sums[0] + sums[1];
    result[0] = all[0] + all[2];
    result[1] = all[1] + all[3];
  }
};

template <typename Sums, typename Real, typename Column>
DST_FUNCTION void row_times_few(const Real* values, const Column* columns, int64_t count,
                                int64_t readable, const float* x, float* result) {
  const auto all = [](auto terms, auto) DST_LAMBDA { return terms; };
  Sums sums;
  const int64_t whole = count & -2 * kLanes;
  for (int64_t j = 0; j < whole; j += 2 * kLanes) {
    sums.add(values + j, columns + j, x, all);
    sums.add(values + j + kLanes, columns + j + kLanes, x, all);
  }
  values += whole, columns += whole;
  if (count & kLanes) {
    sums.add(values, columns, x, all);
    values += kLanes, columns += kLanes;
  }
  if (const int rest = count & (kLanes - 1)) {
    Real last_values[kLanes];
    Column last_columns[kLanes];
    if (count - rest + kLanes > readable) [[unlikely]] {  // else it reads on in the next row
      std::fill_n(last_values, kLanes, Real{});
      std::fill_n(last_columns, kLanes, Column{});
      values = std::copy_n(values, rest, last_values) - rest;
      columns = std::copy_n(columns, rest, last_columns) - rest;
    }
    const auto own = [&](auto terms, auto weight) DST_LAMBDA {
      return (decltype(terms))((decltype(weight))terms & (weight < rest));
    };
    sums.add(values, columns, x, own);
  }
  sums.get(result);
}

template <typename Sums, typename Real, typename Column, typename Value>
DST_FUNCTION void few_inputs(const Linear& call, const Value* values, const float* x, int64_t row,
                             int64_t end) {
  const SparseRows& w = call.weight;
  const Column* columns = static_cast<const Column*>(w.columns);
  // Read once, not again after each store.
  const float* bias = w.bias;
  const int32_t *starts = w.starts(), *places = w.places();
  const int64_t stored = w.stored();
  Real* output = static_cast<Real*>(call.output);
  for (; row < end; ++row) {
    const int64_t count = starts[row + 1] - starts[row];
    const int64_t at = places ? places[2 * row] : starts[row];
    const int64_t readable = places ? count : stored - at;
    float sums[Sums::kInputs];
    row_times_few<Sums>(values + at, columns + at, count, readable, x, sums);
    for (int i = 0; i < Sums::kInputs; ++i) {
      const Vector result = {bias ? sums[i] + bias[row] : sums[i]};
      if constexpr (std::is_same_v<Real, float>) {
        output[i * w.rows + row] = result[0];
      } else {
        store(result, 1, output + i * w.rows + row);
      }
    }
  }
}

template <typename Real>
DST_FUNCTION void one_input(const Linear& call, const float* x, int64_t row, int64_t end) {
  const Real* values = static_cast<const Real*>(call.weight.stored_values());
  call.weight.small ? few_inputs<OneInput, Real, uint16_t>(call, values, x, row, end)
                    : few_inputs<OneInput, Real, int32_t>(call, values, x, row, end);
}

DST_CLONES void one_input(const Linear& call, const float* x, int64_t row, int64_t end) {
  call.weight.dtype == ScalarType::Float ? one_input<float>(call, x, row, end)
                                         : one_input<BFloat16>(call, x, row, end);
}

template <typename Real>
DST_FUNCTION void two_inputs(const Linear& call, const float* values, const float* x, int64_t row,
                             int64_t end) {
  call.weight.small ? few_inputs<TwoInputs, Real, uint16_t>(call, values, x, row, end)
                    : few_inputs<TwoInputs, Real, int32_t>(call, values, x, row, end);
}

DST_CLONES void two_inputs(const Linear& call, const float* values, const float* x, int64_t row,
                           int64_t end) {
  call.weight.dtype == ScalarType::Float ? two_inputs<float>(call, values, x, row, end)
                                         : two_inputs<BFloat16>(call, values, x, row, end);
}

template <typename Real>
DST_FUNCTION void interleave(const Linear& call, float* to) {
  const Real* from = static_cast<const Real*>(call.input);
  for (int64_t k = 0; k < call.features; ++k) {
    to[2 * k] = number(from[k]);
    to[2 * k + 1] = number(from[call.features + k]);
  }
}

DST_CLONES void interleave(const Linear& call, float* to) {
  call.weight.dtype == ScalarType::Float ? interleave<float>(call, to)
                                         : interleave<BFloat16>(call, to);
}

}  // namespace

void one_input(const Linear& call) {
  const float* x = static_cast<const float*>(call.input);
  Scratch<float> wide;
  if (call.weight.dtype != ScalarType::Float) {
    wide = Scratch<float>(Use::kPacked, call.features);
    widen({const_cast<void*>(call.input), call.features, Storage::kBFloat16}, 0,
          static_cast<int>(call.features), wide.get());
    x = wide.get();
  }
  call.weight.share(1, 4, [&](int64_t row, int64_t end, int64_t) { one_input(call, x, row, end); });
}

void two_inputs(const Linear& call) {
  const float* values = call.weight.values();
  const Scratch<float> pairs(Use::kPacked, 2 * call.features);
  interleave(call, pairs.get());
  call.weight.share(1, 4, [&](int64_t row, int64_t end, int64_t) {
    two_inputs(call, values, pairs.get(), row, end);
  });
}

}  // namespace dst
