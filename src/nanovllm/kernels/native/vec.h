// What all kernels share: vectors of floats of the machine's width, float32 and bfloat16 elements, threads.
//
// The vectors are those of GCC and Clang, so one source serves SSE, AVX2, AVX-512 and NEON.
// Every row of a result is computed in an order of its own, which does not depend on the other rows, on how rows are
// grouped or on the number of threads: a request's numbers are the same bits whatever it is batched with.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
// declared here, so that no header of OpenMP is needed: the runtime is the one that torch has loaded
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
extern "C" int omp_get_max_threads();
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_max_threads() { return 1; }
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;        // floats in a vector
constexpr int MAX_ROWS = 12;  // rows of a tile whose sums fit into the registers: two vectors each
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MAX_ROWS = 6;
#elif defined(__aarch64__)
constexpr int VL = 4;
constexpr int MAX_ROWS = 12;
#else
constexpr int VL = 4;
constexpr int MAX_ROWS = 6;
#endif
constexpr int NR = 2 * VL;  // columns of a panel of packed weights

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 {
  uint16_t bits;
};

// The code of a tensor's dtype: kernels/native/library.py
constexpr int FLOAT32 = 0;

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// To the nearest, ties to even; a NaN stays one.
static inline uint32_t bf16_bits(uint32_t u) {
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

template <class T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return {uint16_t(bf16_bits(u))};
}

// x as it would be read again from a tensor of T
template <class T>
static inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vf v) {
  vu u = (vu)v, nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  u = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  u = (nan & 0x7fc0u) | (~nan & u);
  vh h = __builtin_convertvector(u, vh);
  std::memcpy(p, &h, sizeof h);
}
template <class T>
static inline vf rounded(vf v) {
  if constexpr (sizeof(T) == 4) return v;
  T t[VL];
  store(t, v);
  return load(t);
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }

// The sum of neighbours, then of neighbouring sums, and so on.
static inline float sum(vf v) {
  float t[VL];
  std::memcpy(t, &v, sizeof v);
  for (int n = VL; n > 1; n /= 2)
    for (int i = 0; i < n / 2; i++) t[i] = t[2 * i] + t[2 * i + 1];
  return t[0];
}
static inline float largest(vf v) {
  float t[VL], m;
  std::memcpy(t, &v, sizeof v);
  m = t[0];
  for (int i = 1; i < VL; i++) m = t[i] > m ? t[i] : m;
  return m;
}

// e^x between -87 and 88, where it is held at the ends: Cephes' expf (S. Moshier), error below 2 ulp.
static inline vf exp(vf x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

// The part of [0, total) that thread t of n gets.
static inline void share(long total, int t, int n, long* begin, long* end) {
  *begin = total * t / n;
  *end = total * (t + 1) / n;
}

// Threads for this many operations: starting one costs as much as some ten thousand of them.
static inline int threads_for(double operations) {
  return std::max(1, int(std::min(double(omp_get_max_threads()), operations / 2e4)));
}

#define DISPATCH(dtype, call)        \
  do {                               \
    if ((dtype) == FLOAT32) {        \
      typedef float T;               \
      call;                          \
    } else {                         \
      typedef bf16 T;                \
      call;                          \
    }                                \
  } while (0)
