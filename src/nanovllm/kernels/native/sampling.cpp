// Sampling: Philox4x32-10, Gumbel noise and arg max in one pass. Twin: kernels/torch/sampling.py, bit for bit.
//
// Compiled without contraction of products and sums (-ffp-contract=off), in the order of the twin. A token's noise is
// computed only where it could win: noise is at most 22.88, and at most -log(u) of its uniform number u, whose exponent
// bounds that. Both bounds are compared before the logarithms, and what they leave out cannot have won, ties included.
#include <cmath>

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr float MOST_NOISE = 22.9f;
constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, STEP0 = 0x9E3779B9u, STEP1 = 0xBB67AE85u;
constexpr int COUNTERS = 8, TOKENS = 4 * COUNTERS;
constexpr long PART = 8192;  // tokens that a thread takes at a time

// The words of COUNTERS counters from `counter` on: words[4 * i + lane].
static inline void philox(uint32_t k0, uint32_t k1, uint32_t counter, uint32_t position, uint32_t* words) {
#if defined(__AVX2__)
  const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
  __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32(int(counter)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i c1 = _mm256_set1_epi32(int(position)), c2 = _mm256_setzero_si256(), c3 = c2;
  for (int round = 0; round < 10; round++) {
    const __m256i even0 = _mm256_mul_epu32(c0, m0), odd0 = _mm256_mul_epu32(_mm256_srli_epi64(c0, 32), m0);
    const __m256i even1 = _mm256_mul_epu32(c2, m1), odd1 = _mm256_mul_epu32(_mm256_srli_epi64(c2, 32), m1);
    const __m256i low0 = _mm256_blend_epi32(even0, _mm256_slli_epi64(odd0, 32), 0xAA);
    const __m256i low1 = _mm256_blend_epi32(even1, _mm256_slli_epi64(odd1, 32), 0xAA);
    const __m256i high0 = _mm256_blend_epi32(_mm256_srli_epi64(even0, 32), odd0, 0xAA);
    const __m256i high1 = _mm256_blend_epi32(_mm256_srli_epi64(even1, 32), odd1, 0xAA);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(int(k0)));
    c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(int(k1)));
    c1 = low1;
    c3 = low0;
    k0 += STEP0;
    k1 += STEP1;
  }
  // [lane][counter] -> [counter][lane]
  const __m256i a = _mm256_unpacklo_epi32(c0, c1), b = _mm256_unpackhi_epi32(c0, c1);
  const __m256i c = _mm256_unpacklo_epi32(c2, c3), d = _mm256_unpackhi_epi32(c2, c3);
  const __m256i t0 = _mm256_unpacklo_epi64(a, c), t1 = _mm256_unpackhi_epi64(a, c);  // counters 0 and 4, 1 and 5
  const __m256i t2 = _mm256_unpacklo_epi64(b, d), t3 = _mm256_unpackhi_epi64(b, d);
  __m256i* to = (__m256i*)words;
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(t0, t1, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(t2, t3, 0x20));
  _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(t0, t1, 0x31));
  _mm256_storeu_si256(to + 3, _mm256_permute2x128_si256(t2, t3, 0x31));
#else
  uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
  for (int i = 0; i < COUNTERS; i++) c0[i] = counter + i, c1[i] = position, c2[i] = c3[i] = 0;
  for (int round = 0; round < 10; round++, k0 += STEP0, k1 += STEP1)
    for (int i = 0; i < COUNTERS; i++) {
      const uint64_t p0 = uint64_t(c0[i]) * M0, p1 = uint64_t(c2[i]) * M1;
      c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = uint32_t(p1);
      c3[i] = uint32_t(p0);
    }
  for (int i = 0; i < COUNTERS; i++)
    words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
#endif
}

// Natural logarithm of positive normal numbers: Cephes' logf (S. Moshier), its steps in the order of the twin.
static inline vf log_of(vf x) {
  const vi bits = (vi)x, exponent_bits = (bits - 0x3F3504F3) & -0x800000;
  const vf exponent = __builtin_convertvector(exponent_bits, vf) * 0x1p-23f;
  const vf fraction = (vf)(bits - exponent_bits) - 1.0f;
  const vf square = fraction * fraction;
  vf y = fraction * 7.0376836292e-2f;
  y = (y + -1.1514610310e-1f) * fraction;
  y = (y + 1.1676998740e-1f) * fraction;
  y = (y + -1.2420140846e-1f) * fraction;
  y = (y + 1.4249322787e-1f) * fraction;
  y = (y + -1.6668057665e-1f) * fraction;
  y = (y + 2.0000714765e-1f) * fraction;
  y = (y + -2.4999993993e-1f) * fraction;
  y = (y + 3.3333331174e-1f) * fraction;
  y = y * square;
  y = y + exponent * -2.12194440e-4f;
  y = y + square * -0.5f;
  y = y + fraction;
  return y + exponent * 0.693359375f;
}

// The words as floats in [0.5, 2^32 - 2^8]: 2^32 times the uniform numbers.
static inline vf clamped(const uint32_t* words) {
  vu w;
  std::memcpy(&w, words, sizeof w);
  const vf high = __builtin_convertvector((vi)(w >> 16), vf), low = __builtin_convertvector((vi)(w & 0xFFFFu), vf);
  vf f = high * 65536.0f + low;  // one rounding: both parts and the product are exact
  f = f < splat(0.5f) ? splat(0.5f) : f;
  return f > splat(4294967040.0f) ? splat(4294967040.0f) : f;
}

static inline vf noise_of(vf clamped) {
  const vf uniform = clamped * 0x1p-32f, rest = 1.0f - uniform, minus = rest - 1.0f;
  const vf exponential = log_of(rest) * uniform / minus;
  return -log_of(minus == splat(0.0f) ? uniform : exponential);
}

static inline bool any(vi mask) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_movemask_ps((__m256)mask);
#else
  int32_t all = 0;
  for (int i = 0; i < VL; i++) all |= mask[i];
  return all != 0;
#endif
}

struct Best {
  float value = -INFINITY;
  int64_t token = -1;

  // As torch's argmax: the first of the largest; a NaN is the largest.
  void offer(float v, int64_t t) {
    if (token < 0 || v > value || (v != v && value == value)) value = v, token = t;
  }
};

// The best of tokens [begin, end); begin is a multiple of 4.
template <class T>
static Best best_of(const T* logits, long begin, long end, float temperature, float divisor, int64_t seed,
                    int64_t position) {
  Best best;
  const bool noisy = temperature != 0.0f;
  for (long first = begin; first < end; first += TOKENS) {
    const long count = std::min<long>(TOKENS, end - first);
    vf scaled[TOKENS / VL];
    if (count == TOKENS) {
      for (int v = 0; v < TOKENS / VL; v++) scaled[v] = load(logits + first + v * VL) / divisor;
    } else {
      float rest[TOKENS];
      for (int i = 0; i < TOKENS; i++) rest[i] = i < count ? to_float(logits[first + i]) / divisor : -INFINITY;
      std::memcpy(scaled, rest, sizeof rest);
    }
    const vf to_beat = splat(best.value);
    vi possible = {};
    for (int v = 0; v < TOKENS / VL; v++) possible |= ~(vi)(scaled[v] + (noisy ? MOST_NOISE : 0.0f) < to_beat);
    if (best.token >= 0 && !any(possible)) continue;
    uint32_t words[TOKENS];
    if (noisy)
      philox(uint32_t(seed), uint32_t(uint64_t(seed) >> 32), uint32_t(first / 4), uint32_t(position), words);
    for (int v = 0; v * VL < count; v++) {
      vf perturbed = scaled[v];
      if (noisy) {
        const vf uniform = clamped(words + v * VL);
        // log2(u) is at least the exponent
        const vf bound = __builtin_convertvector(159 - ((vi)uniform >> 23), vf) * 0.6931472f + 1e-3f;
        if (best.token >= 0 && !any(~(vi)(perturbed + bound < splat(best.value)))) continue;
        perturbed += noise_of(uniform);
      } else {
        perturbed += 0.0f;
      }
      for (int i = 0; i < VL && v * VL + i < count; i++) best.offer(perturbed[i], first + v * VL + i);
    }
  }
  return best;
}

template <class T>
static void sample_of(const T* logits, long stride, const float* temperatures, const int64_t* seeds,
                      const int64_t* positions, int scaled, int64_t* tokens, long rows, long vocab) {
  const long parts = (vocab + PART - 1) / PART;
  std::vector<Best> found(rows * parts);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_for(2.0 * rows * vocab))
  for (long i = 0; i < rows * parts; i++) {
    const long row = i / parts, begin = i % parts * PART;
    const float t = temperatures[row], divisor = scaled || t == 0.0f ? 1.0f : t;
    found[i] = best_of(logits + row * stride, begin, std::min(vocab, begin + PART), t, divisor, seeds[row],
                       positions[row]);
  }
  for (long row = 0; row < rows; row++) {
    Best best;
    for (long p = 0; p < parts; p++) best.offer(found[row * parts + p].value, found[row * parts + p].token);
    tokens[row] = best.token;
  }
}

static void noise_rows(float* noise, const int64_t* seeds, const int64_t* positions, long rows, long vocab) {
  for (long row = 0; row < rows; row++)
    for (long first = 0; first < vocab; first += TOKENS) {
      uint32_t words[TOKENS];
      float found[TOKENS];
      philox(uint32_t(seeds[row]), uint32_t(uint64_t(seeds[row]) >> 32), uint32_t(first / 4), uint32_t(positions[row]),
             words);
      for (int v = 0; v < TOKENS; v += VL) store(found + v, noise_of(clamped(words + v)));
      std::memcpy(noise + row * vocab + first, found, std::min<long>(TOKENS, vocab - first) * sizeof(float));
    }
}

extern "C" {
// logits: [rows, vocab] -> tokens: [rows]. scaled: the logits are divided by the temperature already.
void sample(int dtype, const void* logits, long stride, const float* temperatures, const int64_t* seeds,
            const int64_t* positions, int scaled, int64_t* tokens, long rows, long vocab) {
  DISPATCH(dtype, (sample_of((const T*)logits, stride, temperatures, seeds, positions, scaled, tokens, rows, vocab)));
}

// The noise alone: [rows, vocab]. For tests.
void gumbel_noise(float* noise, const int64_t* seeds, const int64_t* positions, long rows, long vocab) {
  noise_rows(noise, seeds, positions, rows, vocab);
}
}
