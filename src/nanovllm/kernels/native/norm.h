// RMSNorm of one row, as kernels/torch/norm.py defines it: rounded to T before and after the weight.
#pragma once
#include <cmath>

#include "vec.h"

// row: [n] of S (T, or float that holds values of T) -> out: [n] of O. weight: [n]; null: no norm.
template <class T, class S, class O>
static inline void norm_row(const S* row, const T* weight, O* out, long n, float eps) {
  vf squares = {};
  long i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = load(row + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < n; i++) total += to_float(row[i]) * to_float(row[i]);
  const float scale = 1.0f / std::sqrt(total / float(n) + eps);
  for (i = 0; i + VL <= n; i += VL) store(out + i, rounded<T>(load(row + i) * scale) * load(weight + i));
  for (; i < n; i++) out[i] = from_float<O>(rounded<T>(to_float(row[i]) * scale) * to_float(weight[i]));
}

template <class T>
static inline void rms_norm_row(const T* row, const T* weight, T* out, long n, float eps) {
  norm_row<T, T, T>(row, weight, out, n, eps);
}
