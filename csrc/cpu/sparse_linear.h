// What the products with one or two inputs and with more have in common.
#pragma once

#include "sparse.h"

namespace dst {

struct Linear {
  SparseRows& weight;
  int64_t inputs, features;
  const void* input;
  void* output;
};

void one_input(const Linear& call);
void two_inputs(const Linear& call);

}  // namespace dst
