// Global memory, a few numbers at a time: widths, cache policies, conversions to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "../arguments.h"

namespace dst::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// What one thread moves at once of the widest of some types. The others move as many numbers, so
// that every access of a warp is one contiguous run, whatever the mix: 16 bytes per thread of a
// float32, 8 of a bfloat16 beside it.
constexpr int kAccessBytes = 16;

template <typename... Ts>
constexpr int kWidth = kAccessBytes / (((sizeof(Ts) == 4) || ...) ? 4 : 2);

// kWidth on the host.
inline int width_of(std::initializer_list<Storage> storages) {
  for (const Storage storage : storages) {
    if (storage == Storage::kFloat32) return kWidth<float>;
  }
  return kWidth<BFloat16>;
}

// Whether rows of so many columns can be moved `width` numbers at a time in all arrays.
inline bool fits(int width, int64_t columns, std::initializer_list<Array> arrays) {
  for (const Array& array : arrays) {
    const int bytes = width * (array.storage == Storage::kFloat32 ? 4 : 2);
    const uintptr_t alignment = bytes < kAccessBytes ? bytes : kAccessBytes;
    if (reinterpret_cast<uintptr_t>(array.data) % alignment != 0) return false;
  }
  return columns % width == 0;
}

// N numbers as they lie in memory.
template <typename T, int N>
struct Vector {
  T numbers[N];
};

// Whether something else will soon want what is read or written. What is touched once should not
// push it out of the caches.
enum class Cache { kKeep, kOnce };

namespace detail {

template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

template <typename T, int N>
struct Words {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  static constexpr int kEach = kBytes < kAccessBytes ? kBytes : kAccessBytes;
  static constexpr int kCount = kBytes / kEach;
  using type = typename Word<kEach>::type;
};

}  // namespace detail

template <Cache cache, int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* pointer) {
  using Words = detail::Words<T, N>;
  using Word = typename Words::type;
  const Word* from = reinterpret_cast<const Word*>(pointer);
  Word words[Words::kCount];
#pragma unroll
  for (int i = 0; i < Words::kCount; ++i) {
    if constexpr (cache == Cache::kOnce) {
      words[i] = __ldcs(from + i);
    } else {
      words[i] = from[i];
    }
  }
  Vector<T, N> result;
  memcpy(&result, words, sizeof(result));
  return result;
}

template <Cache cache, int N, typename T>
__device__ __forceinline__ void store(T* pointer, const Vector<T, N>& value) {
  using Words = detail::Words<T, N>;
  using Word = typename Words::type;
  Word words[Words::kCount];
  memcpy(words, &value, sizeof(value));
  Word* to = reinterpret_cast<Word*>(pointer);
#pragma unroll
  for (int i = 0; i < Words::kCount; ++i) {
    if constexpr (cache == Cache::kOnce) {
      __stcs(to + i, words[i]);
    } else {
      to[i] = words[i];
    }
  }
}

// Adds to a number that other blocks add to, and returns what was there before. Whoever finds the
// sum there and then calls __threadfence() also finds what this thread has written, and what others
// had written before they met it at a barrier. __threadfence() on this side would empty the L1
// cache.
__device__ __forceinline__ unsigned long long add_after_writes(unsigned long long* number,
                                                               unsigned long long value) {
#ifdef __CUDA_ARCH__
  unsigned long long before;
  asm volatile("atom.add.release.gpu.global.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(number), "l"(value)
               : "memory");
  return before;
#else
  return atomicAdd(number, value);
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(value); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

template <typename T, int N>
__device__ __forceinline__ Vector<float, N> to_floats(const Vector<T, N>& vector) {
  Vector<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.numbers[i] = to_float(vector.numbers[i]);
  return result;
}

// Two at a time where the machine has an instruction for two.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> from_floats(const Vector<float, N>& floats) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return floats;
  } else if constexpr (N % 2 == 1) {
    Vector<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.numbers[i] = from_float<T>(floats.numbers[i]);
    return result;
  } else {
    constexpr bool kBrain = std::is_same_v<T, BFloat16>;
    std::conditional_t<kBrain, __nv_bfloat162, __half2> pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float low = floats.numbers[2 * i], high = floats.numbers[2 * i + 1];
      if constexpr (kBrain) {
        pairs[i] = __floats2bfloat162_rn(low, high);
      } else {
        pairs[i] = __floats2half2_rn(low, high);
      }
    }
    Vector<T, N> result;
    memcpy(&result, pairs, sizeof(result));
    return result;
  }
}

// f(storage, T{}) for every type of weights.
template <typename F>
void for_each_type(const F& f) {
  f(Storage::kFloat32, float{});
  f(Storage::kBFloat16, BFloat16{});
  f(Storage::kFloat16, Float16{});
}

// f(T{}) with the type of `storage`.
template <typename F>
__device__ __forceinline__ void with_type(Storage storage, const F& f) {
  if (storage == Storage::kFloat32) {
    f(float{});
  } else if (storage == Storage::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

// Numbers `first` to `first + N` of an array whose type is known at run time only.
template <Cache cache, int N>
__device__ __forceinline__ void store_as(Storage storage, void* array, int64_t first,
                                         const Vector<float, N>& values) {
  with_type(storage, [&](auto type) {
    using T = decltype(type);
    store<cache>(static_cast<T*>(array) + first, from_floats<T>(values));
  });
}

__device__ __forceinline__ float load_as(Storage storage, const void* array, int64_t index) {
  float result = 0.0f;
  with_type(storage, [&](auto type) {
    result = to_float(static_cast<const decltype(type)*>(array)[index]);
  });
  return result;
}

}  // namespace dst::cuda
