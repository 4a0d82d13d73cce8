#include "grad_weight.h"

namespace dst {
namespace {

DST_CLONES void round_rows(const SparseRows& w, const float* sums, int64_t row, int64_t end,
                           BFloat16* values) {
  for (; row < end; ++row) {
    const int64_t at = w.begin(row), count = w.count(row);
    for (int64_t j = 0; j < count; j += kLanes) {
      const int rest = static_cast<int>(std::min<int64_t>(kLanes, count - j));
      Vector block = {};
      for (int i = 0; i < rest; ++i) block[i] = sums[at + j + i];
      store(block, rest, values + at + j);
    }
  }
}

}  // namespace

void WeightSums::finish() const {
  if (!wide_.get()) return;
  weight_.share(1, 1, [&](int64_t row, int64_t end, int64_t) {
    round_rows(weight_, get(), row, end, static_cast<BFloat16*>(values_));
  });
}

}  // namespace dst
