// Products with a weight that is stored row by row without its zeros (CSR), for inference. What is
// right says dst_kernels/reference/sparse.py.
//
// A row is multiplied with a block of operands at once: for each column of the weight 8 to 64
// numbers, side by side in memory. Each sum is made by one thread, in an order that does not depend
// on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "vector.h"

namespace dst {

constexpr int kLanes = 8;
constexpr int kWidest = 64;
constexpr int64_t kTerms = 1 << 18;  // fewer products are not worth a thread

// Functions with vectors are inlined, so how they are passed does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// GCC splits vectors that are wider than the processor's into pieces in memory: these are not.
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// Numbers of a tensor of bfloat16.
enum class BFloat16 : uint16_t {};

DST_FUNCTION float number(float stored) { return stored; }

DST_FUNCTION double number(double stored) { return stored; }

DST_FUNCTION float number(BFloat16 stored) {
  return std::bit_cast<float>(static_cast<uint32_t>(stored) << 16);
}

DST_FUNCTION Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

DST_FUNCTION Vector load(const BFloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
}

DST_FUNCTION void store(Vector from, float* to) { *reinterpret_cast<Vector*>(to) = from; }

// Round to nearest even; a NaN stays one.
DST_FUNCTION void store(Vector from, BFloat16* to) {
  const Bits bits = (Bits)from;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (Bits)(from != from);
  const Bits result = (nan & 0x7fc0u) | (~nan & rounded);
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(result, Halves);
}

template <typename Real>
DST_FUNCTION void store(Vector from, int count, Real* to) {
  if (count >= kLanes) return store(from, to);
  Real buffer[kLanes];
  store(from, buffer);
  std::copy_n(buffer, count, to);
}

// A contiguous tensor with the dtype of another one.
Tensor new_contiguous(const Tensor& like, const std::vector<int64_t>& shape);

// Refuses a tensor that is not contiguous, on the CPU, of this dtype and size.
void check_run(const char* op, const Tensor& tensor, const char* name, ScalarType dtype,
               int64_t numel);

// Memory that is not written at first, for one call; the thread keeps it for its next one, since
// new pages can take the system longer than a product takes.
enum class Use { kPacked, kSums, kOffsets, kValues, kBias };

template <typename T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(Use use, int64_t count) : use_(use), memory_(std::move(kept(use))) {
    const size_t bytes = count * sizeof(T);
    if (memory_.size < bytes) {
      memory_.data.reset();  // before there is more
      memory_.data.reset(static_cast<char*>(::operator new(bytes, kAlign)));
      memory_.size = bytes;
    }
  }
  Scratch(Scratch&&) = default;
  Scratch& operator=(Scratch&&) = default;
  ~Scratch() {
    if (memory_.data && memory_.size <= kMostKept) kept(use_) = std::move(memory_);
  }

  T* get() const { return reinterpret_cast<T*>(memory_.data.get()); }

 private:
  static constexpr std::align_val_t kAlign{64};
  static constexpr size_t kMostKept = 32 << 20;

  struct Free {
    void operator()(char* data) const { ::operator delete(data, kAlign); }
  };
  struct Memory {
    std::unique_ptr<char, Free> data;
    size_t size = 0;
  };

  static Memory& kept(Use use) {
    static thread_local Memory memory[5];
    return memory[static_cast<int>(use)];
  }

  Use use_ = Use::kPacked;
  Memory memory_;
};

// Of how many numbers the blocks are that cover the next ones of `rest`.
inline int block_width(int64_t rest, int widest) {
  int width = kLanes;
  while (width < rest && width < widest) width *= 2;
  return width;
}

// The weight as it is stored, with its values and a bias in float32.
class SparseRows {
 public:
  // Rows one after the other, from `starts` [rows + 1] on.
  SparseRows(const char* op, const Tensor& input, const Tensor& values, const Tensor& columns,
             const Tensor& starts, const std::optional<Tensor>& bias);
  // Rows anywhere in arrays of the dense weight's size, from `places` [rows, 2] on and up to them:
  // what training stores, since threads can then write rows without knowing of each other's.
  static SparseRows scattered(const char* op, const Tensor& input, const Tensor& values,
                              const Tensor& columns, const Tensor& places,
                              const std::optional<Tensor>& bias);
  // As many rows from `starts` [rows + 1] on, of which the caller has values and columns, from the
  // first row on.
  SparseRows(ScalarType dtype, const int32_t* starts, int64_t rows);

  int64_t rows;
  ScalarType dtype;  // of input, values and output
  bool small;        // columns are uint16, not int32
  const void* columns;
  const float* bias = nullptr;  // or null

  // Values in float32, which are made where they are stored in another type.
  const float* values();
  const void* stored_values() const { return stored_; }

  // Where a row begins, and how many weights it has.
  int64_t begin(int64_t row) const { return places_ ? places_[2 * row] : starts_[row]; }
  int64_t count(int64_t row) const { return starts_[row + 1] - starts_[row]; }
  // How many weights can be read from where a row begins: the others are not the row's.
  int64_t readable(int64_t row) const { return places_ ? count(row) : stored_size_ - starts_[row]; }
  // What these are read from; the second is null where rows follow one another.
  const int32_t* starts() const { return starts_; }
  const int32_t* places() const { return places_; }
  // The size of the arrays that hold the rows.
  int64_t stored() const { return stored_size_; }

  // f(row, end of rows, block) for all rows of all blocks, shared among threads by their weights.
  // `width`: of the blocks, for an estimate of the work.
  template <typename F>
  void share(int64_t blocks, int64_t width, const F& f) const {
    const int64_t all = place(rows);
    if (all == 0) return;
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin / all; block * all < end; ++block) {
        const int64_t row = row_from(begin - block * all);
        const int64_t rows_end = row_from(end - block * all);
        if (row < rows_end) f(row, rows_end, block);
      }
    };
    torch::stable::parallel_for(0, blocks * all, std::max<int64_t>(kTerms / width, 1), run);
  }

 private:
  // Where a row begins among the weights, if each row had one more.
  int64_t place(int64_t row) const { return starts_[row] + row; }

  // The first row whose place is at least this one.
  int64_t row_from(int64_t least) const {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (place(middle) < least) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  SparseRows() = default;
  void set_arrays(const char* op, const Tensor& input, const Tensor& values, const Tensor& columns);
  void set_bias(const char* op, const Tensor& input, const std::optional<Tensor>& bias);

  const int32_t* starts_;            // as if rows followed one another
  const int32_t* places_ = nullptr;  // null: they do
  int64_t stored_size_;
  const void* stored_;
  std::vector<int32_t> counted_;  // starts, where none are given
  Scratch<float> wide_values_, wide_bias_;
};

// Adds up what `count` weights give with a block, whose numbers for column c begin at
// x + c * scale. Short blocks have several sums for each number: an addition must not wait for the
// last one. Long sums are made run by run, for small errors.
template <int width, int scale, typename Column>
DST_FUNCTION void row_times_block(const float* values, const Column* columns, int64_t count,
                                  const float* x, Vector* result) {
  constexpr int vectors = width / kLanes;
  constexpr int chains = vectors > 4 ? 1 : vectors > 2 ? 2 : 4;
  constexpr int64_t kLong = 128;
  for (int64_t j = 0, end = std::min(count, kLong);; end = std::min(count, end + kLong)) {
    const bool first = j == 0;
    Vector sums[chains][vectors] = {};
    for (; j + chains <= end; j += chains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
        const float value = values[j + chain];
        const float* operand = x + static_cast<int64_t>(columns[j + chain]) * scale;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[chain][v] += value * load(operand + v * kLanes);
      }
    }
    for (; j < end; ++j) {
      const float value = values[j];
      const float* operand = x + static_cast<int64_t>(columns[j]) * scale;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[0][v] += value * load(operand + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
      for (int chain = 1; chain < chains; ++chain) sums[0][v] += sums[chain][v];
      result[v] = first ? sums[0][v] : result[v] + sums[0][v];
    }
    if (j == count) return;
  }
}

// The ops.
Tensor sparse_linear(const Tensor& input, const Tensor& values, const Tensor& columns,
                     const Tensor& row_starts, const std::optional<Tensor>& bias);
Tensor kept_linear(const Tensor& input, const Tensor& values, const Tensor& columns,
                   const Tensor& places, const std::optional<Tensor>& bias);
Tensor kept_linear_grad_input(const Tensor& grad, const Tensor& values, const Tensor& columns,
                              const Tensor& places);
void kept_linear_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& columns,
                             const Tensor& places, const Tensor& values);
int64_t kept_columns(const Tensor& mask, const Tensor& columns, const Tensor& places);
void kept_values(const Tensor& weight, const Tensor& columns, const Tensor& places,
                 const Tensor& values);
void kept_dense(const Tensor& values, const Tensor& columns, const Tensor& places,
                const Tensor& dense, bool clear);
bool kept_rows(const Tensor& masked, int64_t most, const Tensor& values, const Tensor& columns,
               const Tensor& places);
Tensor sparse_conv(const Tensor& input, const Tensor& values, const Tensor& columns,
                   const Tensor& row_starts, const std::optional<Tensor>& bias,
                   const Integers& geometry);
Tensor kept_conv(const Tensor& input, const Tensor& values, const Tensor& columns,
                 const Tensor& places, const std::optional<Tensor>& bias, const Integers& geometry);
// shape: channels, height and width of the input.
Tensor kept_conv_grad_input(const Tensor& grad, const Tensor& values, const Tensor& columns,
                            const Tensor& places, const Integers& geometry, const Integers& shape);
void kept_conv_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& columns,
                           const Tensor& places, const Tensor& values, const Integers& geometry);

}  // namespace dst
