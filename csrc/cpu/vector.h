// How loops become SIMD: plain C++ that compilers vectorise, compiled once for each instruction set
// and chosen when the library is loaded.
#pragma once

#include <cstdint>
#include <cstdlib>  // for __GLIBC__

// On a function: compile it for AVX-512, AVX2 and the baseline. What it calls must be inlined into
// it (DST_FUNCTION), else it stays baseline code; lambdas need DST_LAMBDA for that. Clang 22 loses
// functions that only its clones call, so there the baseline must do: on large layers memory is the
// limit anyway.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define DST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DST_CLONES
#endif

// After a lambda's parameters: see DST_CLONES.
#define DST_LAMBDA __attribute__((always_inline))

// Before a loop: its iterations do not touch each other's elements. Arrays may be the same one.
#if defined(__clang__)
#define DST_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define DST_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace dst {

// Elements handled at once: a few arrays of this many stay in the first-level cache.
constexpr int kBlock = 512;

// Longer sums are made run by run and added in double: errors stay small whatever the length.
constexpr int64_t kRun = 8 * kBlock;

}  // namespace dst
