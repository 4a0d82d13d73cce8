// The kept weights of each row and their columns: what products of a training step read in place of
// W * M. A thread writes its rows one after the other, from where the first of them begins in the
// dense weight, so that it need not know how many weights other rows keep.
#include <array>
#include <bit>
#include <cstring>
#include <limits>

#include "sparse.h"

namespace dst {
namespace {

template <typename Real, typename Column>
DST_FUNCTION int32_t pack_elements(const Real* row, int64_t from, int64_t to, int32_t kept,
                                   Real* values, Column* columns) {
  for (int64_t i = from; i < to; ++i) {  // without a branch, which would often be guessed wrongly
    values[kept] = row[i];
    columns[kept] = static_cast<Column>(i);
    kept += number(row[i]) != 0;
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
constexpr LanesOf<T> kLanesOf;

template <typename T>
using Lanes8 [[gnu::vector_size(sizeof(T) * kLanes), gnu::aligned(2), gnu::may_alias]] = T;

// Eight at a time: what is stored too much is overwritten next, or lies behind the kept ones.
template <typename Column>
DST_FUNCTION int32_t pack_row(const float* row, int64_t count, float* values, Column* columns) {
  constexpr Mask lane = {1, 2, 4, 8, 16, 32, 64, 128};
  int32_t kept = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector block = load(row + i);
    const Mask a = (Mask)(block != 0.0f) & lane;
    const Mask b = a + Mask{a[4], a[5], a[6], a[7], a[0], a[1], a[2], a[3]};
    const Mask c = b + Mask{b[2], b[3], b[0], b[1], b[6], b[7], b[4], b[5]};
    const int32_t set = c[0] + c[1];
    const auto wide = *reinterpret_cast<const Mask*>(kLanesOf<int32_t>.table[set].data());
    const auto lanes = *reinterpret_cast<const Lanes8<Column>*>(kLanesOf<Column>.table[set].data());
    store(__builtin_shuffle(block, wide), values + kept);
    *reinterpret_cast<Lanes8<Column>*>(columns + kept) = lanes + static_cast<Column>(i);
    kept += std::popcount(static_cast<uint32_t>(set));
  }
  return pack_elements(row, i, count, kept, values, columns);
}

#endif

template <typename Real, typename Column>
DST_FUNCTION int32_t pack_row(const Real* row, int64_t count, Real* values, Column* columns) {
  return pack_elements(row, 0, count, 0, values, columns);
}

struct Dense {
  int64_t rows, columns;
  const void* masked;
  void* values;
  void* kept_columns;
  int32_t* places;
};

template <typename Real, typename Column>
DST_FUNCTION void pack_rows(const Dense& call, int64_t row, int64_t end) {
  int64_t to = row * call.columns;
  for (; row < end; ++row) {
    const Real* weights = static_cast<const Real*>(call.masked) + row * call.columns;
    call.places[2 * row] = static_cast<int32_t>(to);
    to += pack_row(weights, call.columns, static_cast<Real*>(call.values) + to,
                   static_cast<Column*>(call.kept_columns) + to);
    call.places[2 * row + 1] = static_cast<int32_t>(to);
  }
}

template <typename Real>
DST_FUNCTION void pack_rows_of(const Dense& call, bool small, int64_t row, int64_t end) {
  small ? pack_rows<Real, uint16_t>(call, row, end) : pack_rows<Real, int32_t>(call, row, end);
}

DST_CLONES void pack_rows(const Dense& call, ScalarType dtype, bool small, int64_t row,
                          int64_t end) {
  switch (dtype) {
    case ScalarType::Double:
      return pack_rows_of<double>(call, small, row, end);
    case ScalarType::BFloat16:
      return pack_rows_of<BFloat16>(call, small, row, end);
    default:
      return pack_rows_of<float>(call, small, row, end);
  }
}

// How many weights are kept, as some rows have it.
template <typename Real>
DST_FUNCTION int64_t estimate(const Dense& call) {
  constexpr int64_t kRows = 32;
  const int64_t looked_at = std::min(kRows, call.rows);
  int64_t kept = 0;
  for (int64_t i = 0; i < looked_at; ++i) {
    const int64_t row = i * call.rows / looked_at;
    const Real* weights = static_cast<const Real*>(call.masked) + row * call.columns;
    int32_t of_row = 0;
    DST_VECTORIZE for (int64_t j = 0; j < call.columns; ++j) of_row += number(weights[j]) != 0;
    kept += of_row;
  }
  return kept * call.rows / std::max<int64_t>(looked_at, 1);
}

DST_CLONES int64_t estimate(const Dense& call, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return estimate<double>(call);
    case ScalarType::BFloat16:
      return estimate<BFloat16>(call);
    default:
      return estimate<float>(call);
  }
}

}  // namespace

bool kept_rows(const Tensor& masked, int64_t most, const Tensor& values, const Tensor& columns,
               const Tensor& places) {
  const ScalarType dtype = masked.scalar_type();
  STD_TORCH_CHECK(masked.is_cpu() && masked.is_contiguous() && masked.dim() >= 1,
                  "kept_rows: masked must be contiguous, on the CPU, with at least 1 dimension");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16,
                  "kept_rows: masked must be float32, float64 or bfloat16");
  const int64_t rows = masked.size(0), size = masked.numel();
  const bool small = columns.scalar_type() == ScalarType::UInt16;
  check_run("kept_rows", values, "values", dtype, size);
  check_run("kept_rows", columns, "columns", small ? ScalarType::UInt16 : ScalarType::Int, size);
  check_run("kept_rows", places, "places", ScalarType::Int, 2 * rows);
  const Dense call{rows,
                   rows == 0 ? 0 : size / rows,
                   masked.data_ptr(),
                   values.data_ptr(),
                   columns.data_ptr(),
                   static_cast<int32_t*>(places.data_ptr())};
  STD_TORCH_CHECK(!small || call.columns <= std::numeric_limits<uint16_t>::max() + 1,
                  "kept_rows: columns must be int32 for rows of ", call.columns, " elements");
  STD_TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), "kept_rows: masked has ", size,
                  " elements, at most 2^31 - 1 are possible");
  if (size > most && estimate(call, dtype) > most) return false;
  constexpr int64_t kGrain = 32768;  // fewer elements are not worth a thread
  torch::stable::parallel_for(
      0, rows, kGrain / std::max<int64_t>(call.columns, 1) + 1,
      [&](int64_t begin, int64_t end) { pack_rows(call, dtype, small, begin, end); });
  return true;
}

}  // namespace dst
