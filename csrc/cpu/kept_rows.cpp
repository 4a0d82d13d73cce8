// The kept weights of each row and their columns: what products of a training step read in place of
// W * M. A thread writes its rows one after the other, from where the first of them begins in the
// dense weight, so that it need not know how many weights other rows keep.
#include "kept_rows.h"

#include <limits>

namespace dst {
namespace {

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
    to += pack_not_zero(weights, call.columns, 0, static_cast<Real*>(call.values) + to,
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
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
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
