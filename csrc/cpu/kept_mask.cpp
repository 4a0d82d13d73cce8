// Kept rows of a weight under a fixed boolean mask: their places, made once for a mask, and what a
// step moves between them and dense tensors.
#include <cstring>
#include <limits>

#include "sparse.h"

namespace dst {
namespace {

struct Places {
  int64_t rows, row_size;
  const void* columns;
  const int32_t* places;

  int64_t begin(int64_t row) const { return places[2 * row]; }
  int64_t end(int64_t row) const { return places[2 * row + 1]; }

  // Of a dense weight of this size, with rows anywhere in `stored` elements.
  Places(const char* op, int64_t numel, const Tensor& columns_, const Tensor& places_,
         int64_t stored)
      : rows(places_.size(0)),
        row_size(rows == 0 ? 0 : numel / rows),
        columns(columns_.data_ptr()),
        places(static_cast<const int32_t*>(places_.data_ptr())) {
    check_run(op, columns_, "columns", columns_.scalar_type(), numel);
    check_run(op, places_, "places", ScalarType::Int, 2 * rows);
    for (int64_t row = 0; row < rows; ++row) {
      STD_TORCH_CHECK(begin(row) >= 0 && begin(row) <= end(row) && end(row) <= stored, op,
                      ": places[", row, "] are ", begin(row), " and ", end(row), ", but there are ",
                      stored, " values");
    }
  }

  // f(row, end of rows), shared among threads. Of `elements` elements one after the other; an
  // element anywhere takes as long as several of those.
  template <typename F>
  void run(int64_t elements, const F& f) const {
    constexpr int64_t kGrain = 32768;  // fewer elements are not worth a thread
    torch::stable::parallel_for(0, rows, kGrain * rows / std::max<int64_t>(elements, 1) + 1, f);
  }
};

bool is_small(const Tensor& columns) { return columns.scalar_type() == ScalarType::UInt16; }

size_t size_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, op, ": weights must be floating-point numbers");
  }
}

// Masks are mostly 0: eight elements are looked at together.
template <typename Column>
int64_t columns_of(const uint8_t* mask, int64_t count, Column* columns) {
  int64_t kept = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, mask + i, 8);
    if (eight == 0) continue;
    for (int64_t at = i; at < i + 8; ++at) {
      columns[kept] = static_cast<Column>(at);
      kept += mask[at] != 0;
    }
  }
  for (; i < count; ++i) {
    columns[kept] = static_cast<Column>(i);
    kept += mask[i] != 0;
  }
  return kept;
}

template <typename Real, typename Column>
void gather(const Places& p, const void* weight, void* values, int64_t row, int64_t end) {
  const Column* columns = static_cast<const Column*>(p.columns);
  for (; row < end; ++row) {
    const Real* from = static_cast<const Real*>(weight) + row * p.row_size;
    Real* to = static_cast<Real*>(values);
    for (int64_t j = p.begin(row); j < p.end(row); ++j) to[j] = from[columns[j]];
  }
}

template <typename Real, typename Column>
void spread(const Places& p, const void* values, void* dense, bool clear, int64_t row,
            int64_t end) {
  const Column* columns = static_cast<const Column*>(p.columns);
  for (; row < end; ++row) {
    const Real* from = static_cast<const Real*>(values);
    Real* to = static_cast<Real*>(dense) + row * p.row_size;
    if (clear) std::memset(to, 0, p.row_size * sizeof(Real));
    for (int64_t j = p.begin(row); j < p.end(row); ++j) to[columns[j]] = from[j];
  }
}

// f(a number of the weight's size, a number of the columns' type), whose types alone count.
template <typename F>
void with_types(size_t size, bool small, const F& f) {
  const auto column = [&](auto real) { small ? f(real, uint16_t{}) : f(real, int32_t{}); };
  size == 8 ? column(uint64_t{}) : size == 4 ? column(uint32_t{}) : column(uint16_t{});
}

}  // namespace

int64_t kept_columns(const Tensor& mask, const Tensor& columns, const Tensor& places) {
  const int64_t numel = mask.numel();
  check_run("kept_columns", mask, "mask", ScalarType::Bool, numel);
  const bool small = is_small(columns);
  check_run("kept_columns", columns, "columns", small ? ScalarType::UInt16 : ScalarType::Int,
            numel);
  const int64_t rows = places.size(0), row_size = rows == 0 ? 0 : numel / rows;
  check_run("kept_columns", places, "places", ScalarType::Int, 2 * rows);
  STD_TORCH_CHECK(!small || row_size <= std::numeric_limits<uint16_t>::max() + 1,
                  "kept_columns: columns must be int32 for rows of ", row_size, " elements");
  STD_TORCH_CHECK(numel <= std::numeric_limits<int32_t>::max(), "kept_columns: mask has ", numel,
                  " elements, at most 2^31 - 1 are possible");
  int32_t* place = static_cast<int32_t*>(places.data_ptr());
  int64_t kept = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* of_row = static_cast<const uint8_t*>(mask.data_ptr()) + row * row_size;
    *place++ = static_cast<int32_t>(kept);
    kept += small ? columns_of(of_row, row_size, static_cast<uint16_t*>(columns.data_ptr()) + kept)
                  : columns_of(of_row, row_size, static_cast<int32_t*>(columns.data_ptr()) + kept);
    *place++ = static_cast<int32_t>(kept);
  }
  return kept;
}

void kept_values(const Tensor& weight, const Tensor& columns, const Tensor& places,
                 const Tensor& values) {
  check_run("kept_values", weight, "weight", weight.scalar_type(), weight.numel());
  check_run("kept_values", values, "values", weight.scalar_type(), values.numel());
  const Places p("kept_values", weight.numel(), columns, places, values.numel());
  const int64_t elements = 4 * values.numel();
  with_types(size_of("kept_values", weight), is_small(columns), [&](auto real, auto column) {
    p.run(elements, [&](int64_t row, int64_t end) {
      gather<decltype(real), decltype(column)>(p, weight.data_ptr(), values.data_ptr(), row, end);
    });
  });
}

void kept_dense(const Tensor& values, const Tensor& columns, const Tensor& places,
                const Tensor& dense, bool clear) {
  check_run("kept_dense", values, "values", values.scalar_type(), values.numel());
  check_run("kept_dense", dense, "dense", values.scalar_type(), dense.numel());
  const Places p("kept_dense", dense.numel(), columns, places, values.numel());
  const int64_t elements = 4 * values.numel() + (clear ? dense.numel() : 0);
  with_types(size_of("kept_dense", values), is_small(columns), [&](auto real, auto column) {
    p.run(elements, [&](int64_t row, int64_t end) {
      spread<decltype(real), decltype(column)>(p, values.data_ptr(), dense.data_ptr(), clear, row,
                                               end);
    });
  });
}

}  // namespace dst
