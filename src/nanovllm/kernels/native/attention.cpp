// Paged attention that reads keys and values where they lie. Twin: kernels/torch/attention.py.
//
// An item is one KV head of one request and a few of its query tokens; its rows are those tokens times the query heads
// that share the KV head. Keys are taken CHUNK at a time, counted from the beginning of the sequence, with the running
// maximum and sum of Milakov and Gimelshein ("Online normalizer calculation for softmax", 2018). So decodes, prompts
// and chunks of prompts are computed alike, and a row's bits do not depend on the batch.
#include <cmath>

#include "vec.h"

constexpr int CHUNK = 256;  // keys; scores of one chunk stay in the first level of the cache
constexpr int ITEM_ROWS = 16;  // rows of an item, unless one token has more

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The sums of eight vectors, each in the order of sum().
static inline void sums_of_eight(const vf (&v)[8], float* out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4], (__m256)v[5]), _mm256_hadd_ps((__m256)v[6], (__m256)v[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
#else
  for (int i = 0; i < 8; i++) out[i] = sum(v[i]);
#endif
}

// Scores of KEYS keys and ROWS rows. KEYS * ROWS is 8, or 1 key is left over.
template <class T, int KEYS, int ROWS>
static inline void dots(const float* q, long d, const T* keys, float* scores) {
  vf acc[KEYS][ROWS];
  for (int t = 0; t < KEYS; t++)
    for (int r = 0; r < ROWS; r++) acc[t][r] = vf{};
  long i = 0;
  for (; i + VL <= d; i += VL) {
    vf query[ROWS];
    for (int r = 0; r < ROWS; r++) query[r] = load(q + r * d + i);
    for (int t = 0; t < KEYS; t++) {
      const vf key = load(keys + t * d + i);
      for (int r = 0; r < ROWS; r++) acc[t][r] += query[r] * key;
    }
  }
  float found[KEYS * ROWS];
  if constexpr (KEYS * ROWS == 8) {
    vf all[8];
    for (int t = 0; t < KEYS; t++)
      for (int r = 0; r < ROWS; r++) all[r * KEYS + t] = acc[t][r];
    sums_of_eight(all, found);
  } else {
    for (int t = 0; t < KEYS; t++)
      for (int r = 0; r < ROWS; r++) found[r * KEYS + t] = sum(acc[t][r]);
  }
  for (; i < d; i++)
    for (int t = 0; t < KEYS; t++)
      for (int r = 0; r < ROWS; r++) found[r * KEYS + t] += q[r * d + i] * to_float(keys[t * d + i]);
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < KEYS; t++) scores[r * CHUNK + t] = found[r * KEYS + t];
}

template <class T, int ROWS>
static inline void score_page(const float* q, long d, const T* keys, long count, float* scores) {
  constexpr int KEYS = 8 / ROWS;
  long t = 0;
  for (; t + KEYS <= count; t += KEYS) dots<T, KEYS, ROWS>(q, d, keys + t * d, scores + t);
  for (; t < count; t++) dots<T, 1, ROWS>(q, d, keys + t * d, scores + t);
}

// Adds weight * value of a page to ROWS rows, in WIDTH vectors from element i on.
template <class T, int ROWS, int WIDTH>
static inline void weigh_page(const float* weights, const T* values, long count, long d, vf (&acc)[ROWS][WIDTH]) {
  for (long t = 0; t < count; t++) {
    vf v[WIDTH];
    for (int c = 0; c < WIDTH; c++) v[c] = load(values + t * d + c * VL);
    for (int r = 0; r < ROWS; r++) {
      const vf w = splat(weights[r * CHUNK + t]);
      for (int c = 0; c < WIDTH; c++) acc[r][c] += w * v[c];
    }
  }
}

struct Pages {
  const int32_t* table;
  long block_size, stride, head_offset, d;
};

template <class T, int ROWS, int WIDTH>
static inline void weigh_columns(const Pages& pages, const T* v_cache, long first, long count, const float* weights,
                                 float* out, long i) {
  vf acc[ROWS][WIDTH];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < WIDTH; c++) acc[r][c] = load(out + r * pages.d + i + c * VL);
  for (long t = 0; t < count;) {
    const long offset = (first + t) % pages.block_size, n = std::min(pages.block_size - offset, count - t);
    const T* page = v_cache + pages.table[(first + t) / pages.block_size] * pages.stride + pages.head_offset;
    weigh_page<T, ROWS, WIDTH>(weights + t, page + offset * pages.d + i, n, pages.d, acc);
    t += n;
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < WIDTH; c++) store(out + r * pages.d + i + c * VL, acc[r][c]);
}

template <class T, int ROWS>
static inline void weigh(const Pages& pages, const T* v_cache, long first, long count, const float* weights,
                         float* out) {
  constexpr int WIDTH = ROWS == 1 ? 8 : 8 / ROWS;
  long i = 0;
  for (; i + WIDTH * VL <= pages.d; i += WIDTH * VL)
    weigh_columns<T, ROWS, WIDTH>(pages, v_cache, first, count, weights, out, i);
  for (; i + VL <= pages.d; i += VL)
    weigh_columns<T, ROWS, 1>(pages, v_cache, first, count, weights, out, i);
  for (; i < pages.d; i++)
    for (long t = 0; t < count; t++) {
      const long offset = (first + t) % pages.block_size;
      const T* page = v_cache + pages.table[(first + t) / pages.block_size] * pages.stride + pages.head_offset;
      for (int r = 0; r < ROWS; r++)
        out[r * pages.d + i] += weights[r * CHUNK + t] * to_float(page[offset * pages.d + i]);
    }
}

template <class T, int ROWS>
static inline void score(const Pages& pages, const T* k_cache, long first, long count, const float* q, float* scores) {
  for (long t = 0; t < count;) {
    const long offset = (first + t) % pages.block_size, n = std::min(pages.block_size - offset, count - t);
    const T* page = k_cache + pages.table[(first + t) / pages.block_size] * pages.stride + pages.head_offset;
    score_page<T, ROWS>(q, pages.d, page + offset * pages.d, n, scores + t);
    t += n;
  }
}

// Replaces the scores of `keys` keys by their weights relative to a new running maximum; returns what the sums so far
// must be multiplied by.
static inline float soften(float* scores, long keys, long count, float* maximum, float* total) {
  vf top = splat(*maximum);
  long t = 0;
  for (; t + VL <= keys; t += VL) top = max(top, load(scores + t));
  float m = largest(top);
  for (; t < keys; t++) m = std::max(m, scores[t]);
  const float before = *maximum == -INFINITY ? 0.0f : largest(exp(splat(*maximum - m)));
  for (t = keys; t < (keys + VL - 1) / VL * VL; t++) scores[t] = -INFINITY;
  vf added = {};
  for (t = 0; t < keys; t += VL) {
    vf s = load(scores + t), e = exp(s - m);
    e = s == splat(-INFINITY) ? vf{} : e;
    store(scores + t, e);
    added += e;
  }
  for (t = keys; t < count; t++) scores[t] = 0.0f;
  *maximum = m;
  *total = *total * before + sum(added);
  return before;
}

struct Item {
  int32_t entry, first, count;  // query tokens [first, first + count) of an entry
};

template <class T>
static void attend_item(const T* q, const T* k_cache, const T* v_cache, T* out, Pages pages, long tokens, long group,
                        long q_stride, long first_length, float scale) {
  static thread_local std::vector<float> buffer;
  const long d = pages.d, rows = tokens * group;
  if (long(buffer.size()) < rows * (2 * d + CHUNK + 2)) buffer.resize(rows * (2 * d + CHUNK + 2));
  float *queries = buffer.data(), *sums = queries + rows * d, *scores = sums + rows * d;
  float *maximum = scores + rows * CHUNK, *total = maximum + rows;
  std::fill(sums, sums + rows * d, 0.0f);
  for (long r = 0; r < rows; r++) {
    const T* from = q + (r / group) * q_stride + (r % group) * d;
    for (long i = 0; i < d; i++) queries[r * d + i] = to_float(from[i]) * scale;
  }
  std::fill(maximum, maximum + rows, -INFINITY);
  std::fill(total, total + rows, 0.0f);
  const long longest = first_length + tokens - 1;
  for (long first = 0; first < longest; first += CHUNK) {
    const long count = std::min<long>(CHUNK, longest - first);
    long r = 0;
    for (; r + 4 <= rows; r += 4) score<T, 4>(pages, k_cache, first, count, queries + r * d, scores + r * CHUNK);
    for (; r + 2 <= rows; r += 2) score<T, 2>(pages, k_cache, first, count, queries + r * d, scores + r * CHUNK);
    for (; r < rows; r++) score<T, 1>(pages, k_cache, first, count, queries + r * d, scores + r * CHUNK);
    for (r = 0; r < rows; r++) {
      const long keys = std::min(count, first_length + r / group - first);
      if (keys <= 0) {
        std::fill(scores + r * CHUNK, scores + r * CHUNK + count, 0.0f);
        continue;
      }
      const float before = soften(scores + r * CHUNK, keys, count, maximum + r, total + r);
      if (first)
        for (long i = 0; i < d; i++) sums[r * d + i] *= before;
    }
    for (r = 0; r + 4 <= rows; r += 4) weigh<T, 4>(pages, v_cache, first, count, scores + r * CHUNK, sums + r * d);
    for (; r + 2 <= rows; r += 2) weigh<T, 2>(pages, v_cache, first, count, scores + r * CHUNK, sums + r * d);
    for (; r < rows; r++) weigh<T, 1>(pages, v_cache, first, count, scores + r * CHUNK, sums + r * d);
  }
  for (long r = 0; r < rows; r++) {
    T* to = out + (r / group) * q_stride + (r % group) * d;
    for (long i = 0; i < d; i++) to[i] = from_float<T>(sums[r * d + i] / total[r]);
  }
}

template <class T>
static void attend_of(const T* q, const T* k_cache, const T* v_cache, T* out, const int32_t* tables, long table_stride,
                      const int32_t* seq_lens, const int64_t* starts, long entries, long q_heads, long kv_heads, long d,
                      long block_size, long cache_stride, float scale) {
  const long group = q_heads / kv_heads, step = std::max<long>(1, ITEM_ROWS / group);
  std::vector<Item> items;
  double operations = 0;
  for (long e = 0; e < entries; e++) {
    const int32_t length = int32_t(starts[e + 1] - starts[e]);
    operations += double(seq_lens[e]) * length * q_heads * d / 4;
    // the last ones, which are the longest, first
    for (int32_t end = length; end > 0; end -= int32_t(step)) {
      const int32_t first = std::max<int32_t>(0, end - int32_t(step));
      items.push_back({int32_t(e), first, end - first});
    }
  }
  const long work = long(items.size()) * kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_for(operations))
  for (long i = 0; i < work; i++) {
    const Item item = items[i / kv_heads];
    const long h = i % kv_heads, token = starts[item.entry] + item.first;
    const long length = starts[item.entry + 1] - starts[item.entry];
    const Pages pages = {tables + item.entry * table_stride, block_size, cache_stride, h * block_size * d, d};
    const long at = (token * q_heads + h * group) * d;
    attend_item(q + at, k_cache, v_cache, out + at, pages, item.count, group, q_heads * d,
                seq_lens[item.entry] - length + item.first + 1, scale);
  }
}

extern "C" {
// q, out: [tokens, q_heads, d]; caches: [blocks, kv_heads, block_size, d]; tables: [entries, ...] of blocks; seq_lens:
// [entries], tokens with those of this step; starts: [entries + 1], where each entry's query tokens begin.
void attend(int dtype, const void* q, const void* k_cache, const void* v_cache, void* out, const int32_t* tables,
            long table_stride, const int32_t* seq_lens, const int64_t* starts, long entries, long q_heads,
            long kv_heads, long d, long block_size, long cache_stride, float scale) {
  DISPATCH(dtype, (attend_of((const T*)q, (const T*)k_cache, (const T*)v_cache, (T*)out, tables, table_stride,
                             seq_lens, starts, entries, q_heads, kv_heads, d, block_size, cache_stride, scale)));
}
}
