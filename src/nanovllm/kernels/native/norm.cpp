// RMSNorm, and the sum that precedes it. Twin: kernels/torch/norm.py.
#include "norm.h"

template <class T>
static void add_rms_norm_rows(const T* x, const T* residual, const T* weight, T* out, T* total, long rows, long n,
                              float eps) {
#pragma omp parallel num_threads(threads_for(4.0 * rows * n))
  {
    long begin, end;
    share(rows, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
    for (long r = begin; r < end; r++) {
      const T* row = x + r * n;
      if (residual) {
        const T* other = residual + r * n;
        T* to = total + r * n;
        long i = 0;
        for (; i + VL <= n; i += VL) store(to + i, load(row + i) + load(other + i));
        for (; i < n; i++) to[i] = from_float<T>(to_float(row[i]) + to_float(other[i]));
        row = to;
      }
      rms_norm_row(row, weight, out + r * n, n, eps);
    }
  }
}

extern "C" {
int nr() { return NR; }
int vector_floats() { return VL; }

// x: [rows, n] -> out: [rows, n]. Where there is a residual: total = x + residual is normed.
void add_rms_norm(int dtype, const void* x, const void* residual, const void* weight, void* out, void* total, long rows,
                  long n, float eps) {
  DISPATCH(dtype, (add_rms_norm_rows((const T*)x, (const T*)residual, (const T*)weight, (T*)out, (T*)total, rows, n,
                                     eps)));
}
}
