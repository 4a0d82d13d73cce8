// pack_run by AVX-512, by AVX2 and in plain C++: which one is chosen when the library is loaded.
#include <array>
#include <bit>
#include <cmath>

#include "kept_rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DST_X86
#ifndef __clang__  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace dst {
namespace {

template <typename Column>
using PackRun = int64_t (*)(const float*, int64_t, float, int64_t, float*, Column*);

// What is left of a run from element `i` on, of which `kept` are packed.
template <typename Column>
int64_t pack_rest(const float* run, int64_t i, int64_t count, int64_t kept, float threshold,
                  int64_t first, float* values, Column* columns) {
  for (; i < count; ++i) {  // a branch would often be guessed wrongly
    values[kept] = run[i];
    columns[kept] = static_cast<Column>(first + i);
    kept += !(std::abs(run[i]) <= threshold);
  }
  return kept;
}

template <typename Column>
int64_t pack_anywhere(const float* run, int64_t count, float threshold, int64_t first,
                      float* values, Column* columns) {
  return pack_rest(run, 0, count, 0, threshold, first, values, columns);
}

#ifdef DST_X86

// For each set of eight lanes, the lanes that are in it, in order.
constexpr auto kLanesOf = [] {
  std::array<std::array<int32_t, 8>, 256> table{};
  for (int set = 0; set < 256; ++set) {
    int used = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (set >> lane & 1) table[set][used++] = lane;
    }
  }
  return table;
}();

// What both store too much is overwritten next, or lies behind the kept ones.
template <typename Column>
__attribute__((target("avx2,popcnt"))) int64_t pack_avx2(const float* run, int64_t count,
                                                         float threshold, int64_t first,
                                                         float* values, Column* columns) {
  const __m256 limit = _mm256_set1_ps(threshold), sign = _mm256_set1_ps(-0.0f);
  int64_t kept = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 block = _mm256_loadu_ps(run + i);
    const __m256 above = _mm256_cmp_ps(_mm256_andnot_ps(sign, block), limit, _CMP_NLE_UQ);
    const int set = _mm256_movemask_ps(above);
    const __m256i lanes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanesOf[set].data()));
    const __m256i found = _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(first + i)));
    _mm256_storeu_ps(values + kept, _mm256_permutevar8x32_ps(block, lanes));
    if constexpr (sizeof(Column) == 2) {
      const __m128i low = _mm256_castsi256_si128(found), high = _mm256_extracti128_si256(found, 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(columns + kept), _mm_packus_epi32(low, high));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + kept), found);
    }
    kept += std::popcount(static_cast<uint32_t>(set));
  }
  return pack_rest(run, i, count, kept, threshold, first, values, columns);
}

template <typename Column>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt"))) int64_t
pack_avx512(const float* run, int64_t count, float threshold, int64_t first, float* values,
            Column* columns) {
  const __m512 limit = _mm512_set1_ps(threshold);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t kept = 0, i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 block = _mm512_loadu_ps(run + i);
    const __mmask16 set = _mm512_cmp_ps_mask(_mm512_abs_ps(block), limit, _CMP_NLE_UQ);
    const __m512i found = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first + i)));
    _mm512_storeu_ps(values + kept, _mm512_maskz_compress_ps(set, block));
    if constexpr (sizeof(Column) == 2) {
      const __m256i narrow = _mm512_cvtepi32_epi16(found);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + kept),
                          _mm256_maskz_compress_epi16(set, narrow));
    } else {
      _mm512_storeu_si512(columns + kept, _mm512_maskz_compress_epi32(set, found));
    }
    kept += std::popcount(static_cast<uint32_t>(set));
  }
  return pack_rest(run, i, count, kept, threshold, first, values, columns);
}

#endif

template <typename Column>
PackRun<Column> choose() {
#ifdef DST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return pack_avx512<Column>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return pack_avx2<Column>;
#endif
  return pack_anywhere<Column>;
}

const PackRun<uint16_t> kPack16 = choose<uint16_t>();
const PackRun<int32_t> kPack32 = choose<int32_t>();

}  // namespace

int64_t pack_run(const float* run, int64_t count, float threshold, int64_t first, float* values,
                 uint16_t* columns) {
  return kPack16(run, count, threshold, first, values, columns);
}

int64_t pack_run(const float* run, int64_t count, float threshold, int64_t first, float* values,
                 int32_t* columns) {
  return kPack32(run, count, threshold, first, values, columns);
}

}  // namespace dst
