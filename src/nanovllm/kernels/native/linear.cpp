// Matrix products with packed weights, and what follows them: SwiGLU, or norms of heads, rotation and the KV store.
// Twins: kernels/torch/activation.py and kernels/torch/rope.py.
//
// Packed weights are panels of NR outputs: [panels, k, NR]. Outputs come in groups (a head; gate and up), each padded
// to whole panels. A tile of up to MAX_ROWS rows and one panel has its sums in registers, while the panel streams past
// once; each sum adds its products in the order of k. Tiles are written to a small buffer, which stays in the first
// level of the cache, and finished from there.
#include "norm.h"

constexpr int UNIT = 4;  // panels that a single row computes at once: its sums would wait for each other otherwise

template <class T, int M, int P>
static inline void tile(const float* x, long ldx, const T* const* panels, long k, float* out, long ldo) {
  vf sums[P][M][2];
  for (int q = 0; q < P; q++)
    for (int m = 0; m < M; m++) sums[q][m][0] = sums[q][m][1] = vf{};
  const T* w[P];
  for (int q = 0; q < P; q++) w[q] = panels[q];
  for (long p = 0; p < k; p++)
    for (int q = 0; q < P; q++) {
      vf left = load(w[q] + p * NR), right = load(w[q] + p * NR + VL);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        vf s = splat(x[m * ldx + p]);
        sums[q][m][0] += left * s;
        sums[q][m][1] += right * s;
      }
    }
  for (int q = 0; q < P; q++)
    for (int m = 0; m < M; m++) {
      store(out + m * ldo + q * NR, sums[q][m][0]);
      store(out + m * ldo + q * NR + VL, sums[q][m][1]);
    }
}

template <class T, int M>
static void tiles_of(const float* x, long ldx, const T* const* panels, int count, long k, float* out) {
  constexpr int P = M == 1 ? 4 : M == 2 ? 2 : 1;
  const long ldo = long(count) * NR;
  int q = 0;
  for (; q + P <= count; q += P) tile<T, M, P>(x, ldx, panels + q, k, out + q * NR, ldo);
  for (; q < count; q++) tile<T, M, 1>(x, ldx, panels + q, k, out + q * NR, ldo);
}

// x: [rows, k], rows <= MAX_ROWS -> out: [rows, count * NR]
template <class T>
static void tiles(const float* x, long ldx, int rows, const T* const* panels, int count, long k, float* out) {
#define ROWS(M) \
  case M:       \
    return tiles_of<T, M>(x, ldx, panels, count, k, out);
  switch (rows) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if defined(__AVX512F__) || defined(__aarch64__)
    ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
  }
#undef ROWS
}

// Rows of x as floats: x itself, or a copy.
static inline const float* as_float(const float* x, long, std::vector<float>&) { return x; }
static inline const float* as_float(const bf16* x, long count, std::vector<float>& buffer) {
  if (long(buffer.size()) < count) buffer.resize(count);
  long i = 0;
  for (; i + VL <= count; i += VL) store(buffer.data() + i, load(x + i));
  for (; i < count; i++) buffer[i] = to_float(x[i]);
  return buffer.data();
}

// Computes all units of all rows. A unit is a few panels whose results are finished together.
//   panels_of(unit, panels) -> how many; at most most_panels
//   finish(row, unit, sums): of one row, [count * NR]
template <class T, class PanelsOf, class Finish>
static void product(const T* x, long rows, long k, long units, int most_panels, double operations, PanelsOf panels_of,
                    Finish finish) {
  if (rows == 0) return;
  // A block of rows is read again for each unit: it should stay in the second level of the cache.
  const long fitting = std::max<long>(MAX_ROWS, (192L << 10) / (4 * k) / MAX_ROWS * MAX_ROWS);
  const long blocks = (rows + fitting - 1) / fitting, block_rows = (rows + blocks - 1) / blocks;
#pragma omp parallel num_threads(threads_for(operations))
  {
    static thread_local std::vector<float> converted, sums;
    if (long(sums.size()) < long(MAX_ROWS) * most_panels * NR) sums.resize(long(MAX_ROWS) * most_panels * NR);
    std::vector<const T*> panels(most_panels);
    long begin, end, have = -1;
    const float* xf = nullptr;
    share(blocks * units, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
    for (long item = begin; item < end; item++) {
      const long block = item / units, unit = item % units, first = block * block_rows;
      const long n = std::min(block_rows, rows - first);
      if (block != have) xf = as_float(x + first * k, n * k, converted), have = block;
      const int count = panels_of(unit, panels.data());
      const long groups = (n + MAX_ROWS - 1) / MAX_ROWS;
      for (long g = 0; g < groups; g++) {
        const long a = n * g / groups, b = n * (g + 1) / groups;
        tiles<T>(xf + a * k, k, int(b - a), panels.data(), count, k, sums.data());
        for (long r = a; r < b; r++) finish(first + r, unit, sums.data() + (r - a) * count * NR);
      }
    }
  }
}

template <class T>
static inline void add_bias(float* sums, const T* bias, long n) {
  if (bias)
    for (long i = 0; i < n; i++) sums[i] += to_float(bias[i]);
}

template <class T>
static void linear_of(const T* x, const T* w, const T* bias, T* out, long rows, long k, long n) {
  const long panels = (n + NR - 1) / NR, units = (panels + UNIT - 1) / UNIT;
  product<T>(
      x, rows, k, units, UNIT, 2.0 * rows * k * n / 16,
      [=](long unit, const T** found) {
        const int count = int(std::min<long>(UNIT, panels - unit * UNIT));
        for (int q = 0; q < count; q++) found[q] = w + (unit * UNIT + q) * k * NR;
        return count;
      },
      [=](long row, long unit, float* sums) {
        const long first = unit * UNIT * NR, count = std::min<long>(UNIT * NR, n - first);
        if (bias) add_bias(sums, bias + first, count);
        T* to = out + row * n + first;
        long i = 0;
        for (; i + VL <= count; i += VL) store(to + i, load(sums + i));
        for (; i < count; i++) to[i] = from_float<T>(sums[i]);
      });
}

template <class T>
static inline vf silu_and_mul(vf gate, vf up) {
  gate = rounded<T>(gate);
  return rounded<T>(gate / (exp(-gate) + 1.0f)) * rounded<T>(up);
}

template <class T>
static void linear_silu_and_mul_of(const T* x, const T* w, const T* bias, T* out, long rows, long k, long n) {
  constexpr int PAIRS = UNIT / 2;
  const long panels = (n + NR - 1) / NR, units = (panels + PAIRS - 1) / PAIRS;
  product<T>(
      x, rows, k, units, UNIT, 4.0 * rows * k * n / 16,
      [=](long unit, const T** found) {
        const int count = int(std::min<long>(PAIRS, panels - unit * PAIRS));
        for (int q = 0; q < count; q++) {
          found[q] = w + (unit * PAIRS + q) * k * NR;
          found[count + q] = found[q] + panels * k * NR;
        }
        return 2 * count;
      },
      [=](long row, long unit, float* gate) {
        const long first = unit * PAIRS * NR, count = std::min<long>(PAIRS * NR, n - first);
        float* up = gate + std::min<long>(PAIRS, panels - unit * PAIRS) * NR;
        if (bias) add_bias(gate, bias + first, count), add_bias(up, bias + n + first, count);
        T* to = out + row * n + first;
        long i = 0;
        for (; i + VL <= count; i += VL) store(to + i, silu_and_mul<T>(load(gate + i), load(up + i)));
        if (i < count) {  // the rest of a panel is there, and zero
          T rest[VL];
          store(rest, silu_and_mul<T>(load(gate + i), load(up + i)));
          std::memcpy(to + i, rest, (count - i) * sizeof(T));
        }
      });
}

struct Heads {
  long q_heads, kv_heads, head_dim, block_size, cache_stride;
};

// One head of one token: norm, rotation, and its place in the output or in the cache.
template <class T>
static inline void finish_head(float* head, long row, long number, const T* q_norm, const T* k_norm, float eps,
                               const float* cos_sin, T* k_cache, T* v_cache, const int64_t* slots, T* q, T* k, T* v,
                               const Heads& of) {
  const long d = of.head_dim, half = d / 2;
  for (long i = 0; i < d; i++) head[i] = rounded<T>(head[i]);
  if (number < of.q_heads + of.kv_heads) {
    const T* weight = number < of.q_heads ? q_norm : k_norm;
    if (weight) {
      norm_row<T, float, float>(head, weight, head, d, eps);
      for (long i = 0; i < d; i++) head[i] = rounded<T>(head[i]);
    }
    const float *cos = cos_sin + row * d, *sin = cos + half;
    for (long i = 0; i < half; i++) {
      const float first = head[i], second = head[half + i];
      head[i] = first * cos[i] - second * sin[i];
      head[half + i] = second * cos[i] + first * sin[i];
    }
  }
  T* to;
  T* cached = nullptr;
  if (number < of.q_heads) {
    to = q + (row * of.q_heads + number) * d;
  } else {
    const bool is_k = number < of.q_heads + of.kv_heads;
    const long h = number - of.q_heads - (is_k ? 0 : of.kv_heads), slot = slots[row];
    to = (is_k ? k : v) + (row * of.kv_heads + h) * d;
    cached = (is_k ? k_cache : v_cache) + (slot / of.block_size) * of.cache_stride +
             (h * of.block_size + slot % of.block_size) * d;
  }
  for (long i = 0; i < d; i++) to[i] = from_float<T>(head[i]);
  if (cached) std::memcpy(cached, to, d * sizeof(T));
}

template <class T>
static void qkv_of(const T* x, const T* w, const T* bias, const T* q_norm, const T* k_norm, float eps,
                   const float* cos_sin, T* k_cache, T* v_cache, const int64_t* slots, T* q, T* k, T* v, long rows,
                   long width, Heads of) {
  const long panels = (of.head_dim + NR - 1) / NR, heads = of.q_heads + 2 * of.kv_heads;
  product<T>(
      x, rows, width, heads, int(panels), 2.0 * rows * width * heads * of.head_dim / 16,
      [=](long head, const T** found) {
        for (long i = 0; i < panels; i++) found[i] = w + (head * panels + i) * width * NR;
        return int(panels);
      },
      [=](long row, long head, float* sums) {
        if (bias) add_bias(sums, bias + head * of.head_dim, of.head_dim);
        finish_head(sums, row, head, q_norm, k_norm, eps, cos_sin, k_cache, v_cache, slots, q, k, v, of);
      });
}

// What follows a product that the library computed. qkv: [rows, heads * head_dim]
template <class T>
static void after_qkv(const T* qkv, const T* q_norm, const T* k_norm, float eps, const float* cos_sin, T* k_cache,
                      T* v_cache, const int64_t* slots, T* q, T* k, T* v, long rows, Heads of) {
  const long heads = of.q_heads + 2 * of.kv_heads;
#pragma omp parallel num_threads(threads_for(4.0 * rows * heads * of.head_dim))
  {
    std::vector<float> head(of.head_dim);
    long begin, end;
    share(rows * heads, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
    for (long item = begin; item < end; item++) {
      for (long i = 0; i < of.head_dim; i++) head[i] = to_float(qkv[item * of.head_dim + i]);
      finish_head(head.data(), item / heads, item % heads, q_norm, k_norm, eps, cos_sin, k_cache, v_cache, slots, q, k,
                  v, of);
    }
  }
}

template <class T>
static void silu_and_mul_of(const T* gate_up, T* out, long rows, long n) {
#pragma omp parallel num_threads(threads_for(8.0 * rows * n))
  {
    long begin, end;
    share(rows, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
    for (long r = begin; r < end; r++) {
      const T *gate = gate_up + r * 2 * n, *up = gate + n;
      T* to = out + r * n;
      long i = 0;
      for (; i + VL <= n; i += VL) store(to + i, silu_and_mul<T>(load(gate + i), load(up + i)));
      if (i < n) {
        T g[VL] = {}, u[VL] = {}, rest[VL];
        std::memcpy(g, gate + i, (n - i) * sizeof(T));
        std::memcpy(u, up + i, (n - i) * sizeof(T));
        store(rest, silu_and_mul<T>(load(g), load(u)));
        std::memcpy(to + i, rest, (n - i) * sizeof(T));
      }
    }
  }
}

template <class T>
static void pack_of(const T* weight, T* packed, long groups, long n, long k) {
  const long panels = (n + NR - 1) / NR;
#pragma omp parallel num_threads(threads_for(double(groups) * n * k))
  {
    long begin, end;
    share(groups * panels, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
    for (long item = begin; item < end; item++) {
      const long group = item / panels, first = item % panels * NR;
      T* to = packed + item * k * NR;
      for (long j = 0; j < NR; j++)
        for (long p = 0; p < k; p++)
          to[p * NR + j] = first + j < n ? weight[(group * n + first + j) * k + p] : T{};
    }
  }
}

extern "C" {
// weight: [groups * n, k] -> packed: [groups, panels of n, k, NR]
void pack(int dtype, const void* weight, void* packed, long groups, long n, long k) {
  DISPATCH(dtype, (pack_of((const T*)weight, (T*)packed, groups, n, k)));
}

// x: [rows, k], w: packed [n, k], bias: [n] or null -> out: [rows, n]
void linear(int dtype, const void* x, const void* w, const void* bias, void* out, long rows, long k, long n) {
  DISPATCH(dtype, (linear_of((const T*)x, (const T*)w, (const T*)bias, (T*)out, rows, k, n)));
}

// w: packed [2 * n, k] in two groups, gate first -> out: [rows, n]
void linear_silu_and_mul(int dtype, const void* x, const void* w, const void* bias, void* out, long rows, long k,
                         long n) {
  DISPATCH(dtype, (linear_silu_and_mul_of((const T*)x, (const T*)w, (const T*)bias, (T*)out, rows, k, n)));
}

// gate_up: [rows, 2 * n] -> out: [rows, n]
void silu_and_mul(int dtype, const void* gate_up, void* out, long rows, long n) {
  DISPATCH(dtype, (silu_and_mul_of((const T*)gate_up, (T*)out, rows, n)));
}

// x: [rows, width], w: packed with a group for each head; x is the product itself where w is null
void qkv_norm_rope_store_kv(int dtype, const void* x, const void* w, const void* bias, const void* q_norm,
                            const void* k_norm, float eps, const float* cos_sin, void* k_cache, void* v_cache,
                            const int64_t* slots, void* q, void* k, void* v, long rows, long width, long q_heads,
                            long kv_heads, long head_dim, long block_size, long cache_stride) {
  const Heads of = {q_heads, kv_heads, head_dim, block_size, cache_stride};
  if (w)
    DISPATCH(dtype, (qkv_of((const T*)x, (const T*)w, (const T*)bias, (const T*)q_norm, (const T*)k_norm, eps, cos_sin,
                            (T*)k_cache, (T*)v_cache, slots, (T*)q, (T*)k, (T*)v, rows, width, of)));
  else
    DISPATCH(dtype, (after_qkv((const T*)x, (const T*)q_norm, (const T*)k_norm, eps, cos_sin, (T*)k_cache, (T*)v_cache,
                               slots, (T*)q, (T*)k, (T*)v, rows, of)));
}
}
