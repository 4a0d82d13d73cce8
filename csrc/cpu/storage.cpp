// Conversions between the dtypes of storage and of arithmetic.
#include "storage.h"

#include <bit>

namespace dst {
namespace {

DST_FUNCTION float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; a NaN stays one.
DST_FUNCTION uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

DST_FUNCTION float from_float16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  // Exponents count from another bias; infinity and NaN move on to float32's highest exponent.
  const uint32_t bias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const float normal = std::bit_cast<float>((magnitude << 13) + bias);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t result = std::bit_cast<uint32_t>(magnitude < 0x400u ? subnormal : normal);
  return std::bit_cast<float>(result | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

// Round to nearest even; beyond 65504 infinity, a NaN stays one.
DST_FUNCTION uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 leaves multiples of 2^-24 in the last bits, rounded by the addition.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | sign);
}

template <typename Real>
DST_FUNCTION void widen_block(const Array& from, int64_t offset, int count, Real* to) {
  switch (from.storage) {
    case Storage::kBFloat16: {
      const uint16_t* values = static_cast<const uint16_t*>(from.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) to[i] = from_bfloat16(values[i]);
      break;
    }
    case Storage::kFloat16: {
      const uint16_t* values = static_cast<const uint16_t*>(from.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) to[i] = from_float16(values[i]);
      break;
    }
    case Storage::kFloat32: {
      const float* values = static_cast<const float*>(from.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) to[i] = static_cast<Real>(values[i]);
      break;
    }
    case Storage::kFloat64: {
      const double* values = static_cast<const double*>(from.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) to[i] = static_cast<Real>(values[i]);
      break;
    }
  }
}

// float64 goes to 16 bits by way of float32, as in torch.
template <typename Real>
DST_FUNCTION void narrow_block(const Real* from, const Array& to, int64_t offset, int count) {
  switch (to.storage) {
    case Storage::kBFloat16: {
      uint16_t* values = static_cast<uint16_t*>(to.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) {
        values[i] = to_bfloat16(static_cast<float>(from[i]));
      }
      break;
    }
    case Storage::kFloat16: {
      uint16_t* values = static_cast<uint16_t*>(to.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) {
        values[i] = to_float16(static_cast<float>(from[i]));
      }
      break;
    }
    case Storage::kFloat32: {
      float* values = static_cast<float*>(to.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]);
      break;
    }
    case Storage::kFloat64: {
      double* values = static_cast<double*>(to.data) + offset;
      DST_VECTORIZE for (int i = 0; i < count; ++i) values[i] = static_cast<double>(from[i]);
      break;
    }
  }
}

}  // namespace

DST_CLONES void widen(const Array& from, int64_t offset, int count, float* to) {
  widen_block(from, offset, count, to);
}

DST_CLONES void widen(const Array& from, int64_t offset, int count, double* to) {
  widen_block(from, offset, count, to);
}

DST_CLONES void narrow(const float* from, const Array& to, int64_t offset, int count) {
  narrow_block(from, to, offset, count);
}

DST_CLONES void narrow(const double* from, const Array& to, int64_t offset, int count) {
  narrow_block(from, to, offset, count);
}

}  // namespace dst
