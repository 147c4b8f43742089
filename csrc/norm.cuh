// Constants of a batch norm, one value of each per channel.
#pragma once

#include "dtype.cuh"

namespace dfkd_fast {

// The normalized value is (x - mean) * scale + shift.
struct Constants {
  const float* mean;
  const float* inverse;  // reciprocal standard deviation
  const float* scale;
  const float* shift;
};

// Rows of a contiguous float32 table (rows, C).
inline const float* table_data(const Tensor& table, int64_t rows, int64_t channels, const char* name) {
  STD_TORCH_CHECK(table.numel() == rows * channels && table.is_contiguous(), name, " must be contiguous (", rows, ", C)");
  return float_data(table, name);
}

inline Constants constants_of(const Tensor& table, int64_t channels) {
  const float* const data = table_data(table, 4, channels, "constants");
  return {data, data + channels, data + 2 * channels, data + 3 * channels};
}

}  // namespace dfkd_fast
