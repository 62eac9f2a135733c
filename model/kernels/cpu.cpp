// The serving path on CPUs with AVX512-BF16: matrix product, attention over paged keys and
// values, RMSNorm. bfloat16 in and out, float32 accumulation.
//
// Every output element is summed in one fixed order that does not depend on how many rows
// are computed beside it. A sequence therefore gets bit-identical results alone, in a batch,
// prefilled in one piece or in chunks; failover relies on it.
//
// Plain C interface, pointers and sizes only; cpu.py checks shapes and owns all memory.
// reference.py states the same computations in torch.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "team.h"

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;      // float32 in a vector; also columns in a panel, keys in a tile
constexpr int kLine = 64;       // bytes in a cache line
constexpr int kMaxRows = 8;     // rows of x whose sums are in registers at once
constexpr int kKeyTiles = 4;    // key tiles between two rescalings of the running softmax
constexpr int kKeys = kKeyTiles * kLanes;
constexpr int kMaxHeadDim = 256;

moray::Team team;
constexpr int64_t kAlone = 1 << 16;  // weights, or numbers, for which it takes longer to share work than to do it

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline bf16 to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __m512 load_bf16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store_bf16(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// A pair of bfloat16 in every lane.
inline __m512bh broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// e^x, relative error about 2e-7: 2^n * p(r) with x = n ln2 + r, |r| <= ln2 / 2. exp(-inf) is 0.
inline __m512 exp512(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// ---------------------------------------------------------------------------------------------
// Matrix product. Weights [n, k] are packed into panels of 16 columns, [n / 16][k / 2][16][2]:
// one vector load brings a pair of k for 16 columns, which vdpbf16ps multiplies by one pair of x.

// Memory to bring near meanwhile: so many cache lines for each pair of k.
struct Ahead {
  const char* at;
  int64_t lines;
};

enum class Epilogue : int { kBf16 = 0, kFloat = 1, kSwiGLU = 2 };

template <int ROWS, int PANELS, Epilogue EPILOGUE>
void multiply(const bf16* x, int64_t ldx, const bf16* w, int64_t k, void* y, int64_t ldy, int64_t row, int64_t panel,
              Ahead ahead) {
  __m512 sum[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_setzero_ps();
  const int64_t panel_size = k * kLanes;
  const bf16* weights = w + panel * panel_size;
  for (int64_t i = 0; i < k; i += 2) {
    __m512bh column[PANELS];
    for (int p = 0; p < PANELS; ++p) {
      column[p] = load_pairs(weights + p * panel_size + i * kLanes);
      if (ROWS < 4) _mm_prefetch((const char*)(weights + p * panel_size + i * kLanes) + 1024, _MM_HINT_T0);
    }
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.at += kLine) _mm_prefetch(ahead.at, _MM_HINT_T1);
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh value = broadcast_pair(x + (row + r) * ldx + i);
      for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], column[p], value);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (EPILOGUE == Epilogue::kSwiGLU) {  // panels alternate: gate, up
      for (int p = 0; p + 1 < PANELS; p += 2)
        store_bf16((bf16*)y + (row + r) * ldy + (panel + p) / 2 * kLanes, _mm512_mul_ps(silu(sum[r][p]), sum[r][p + 1]));
    } else {
      for (int p = 0; p < PANELS; ++p) {
        const int64_t at = (row + r) * ldy + (panel + p) * kLanes;
        if constexpr (EPILOGUE == Epilogue::kFloat) _mm512_storeu_ps((float*)y + at, sum[r][p]);
        else store_bf16((bf16*)y + at, sum[r][p]);
      }
    }
  }
}

template <int ROWS, Epilogue EPILOGUE>
void multiply_panels(const bf16* x, int64_t ldx, const bf16* w, int64_t k, void* y, int64_t ldy, int64_t row,
                     int64_t panel, int64_t panels, Ahead ahead) {
  switch (panels) {
    case 4: if constexpr (ROWS <= 4) multiply<ROWS, 4, EPILOGUE>(x, ldx, w, k, y, ldy, row, panel, ahead); break;
    case 3: if constexpr (EPILOGUE != Epilogue::kSwiGLU) multiply<ROWS, 3, EPILOGUE>(x, ldx, w, k, y, ldy, row, panel, ahead); break;
    case 2: multiply<ROWS, 2, EPILOGUE>(x, ldx, w, k, y, ldy, row, panel, ahead); break;
    case 1: if constexpr (EPILOGUE != Epilogue::kSwiGLU) multiply<ROWS, 1, EPILOGUE>(x, ldx, w, k, y, ldy, row, panel, ahead); break;
  }
}

template <Epilogue EPILOGUE>
void multiply_rows(const bf16* x, int64_t ldx, const bf16* w, int64_t k, void* y, int64_t ldy, int64_t row,
                   int64_t rows, int64_t panel, int64_t panels, Ahead ahead) {
#define ROWS_CASE(R) case R: multiply_panels<R, EPILOGUE>(x, ldx, w, k, y, ldy, row, panel, panels, ahead); break;
  switch (rows) {
    ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7) ROWS_CASE(8)
  }
#undef ROWS_CASE
}

// Columns go to threads in groups of panels; a group's weights stay in L2 while all rows pass.
template <Epilogue EPILOGUE>
void matmul(const bf16* x, int64_t ldx, const bf16* w, void* y, int64_t ldy, int64_t m, int64_t panels, int64_t k) {
  const int64_t wide = m <= 4 ? 4 : EPILOGUE == Epilogue::kSwiGLU ? 2 : 3;
  const int64_t groups = (panels + wide - 1) / wide;
  team.run(groups, panels * kLanes * k < kAlone ? 0 : 2, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin * wide; panel < std::min(end * wide, panels); panel += wide) {
      const int64_t width = std::min(wide, panels - panel);
      // The first rows wait for memory; the later ones fetch the next group while they compute.
      const int64_t later = (m - 1) / kMaxRows;
      const int64_t lines = later ? (width + later - 1) / later : 0;
      for (int64_t row = 0; row < m; row += kMaxRows) {
        const int64_t fetched = (row / kMaxRows - 1) * lines;
        const Ahead ahead{(const char*)(w + (panel + width) * k * kLanes) + fetched * kLine * k / 2,
                          row && fetched < width ? lines : 0};
        multiply_rows<EPILOGUE>(x, ldx, w, k, y, ldy, row, std::min<int64_t>(kMaxRows, m - row), panel, width, ahead);
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Attention. Keys of 16 tokens form a tile [head_dim / 2][16][2], values a tile
// [16 / 2][head_dim][2]: both are what vdpbf16ps takes without a shuffle. A block holds
// block_size / 16 tiles for each KV head.

struct Cache {
  bf16* keys;
  bf16* values;
  const int32_t* block_table;
  int64_t block_size, kv_heads, head_dim;

  int64_t tile(int64_t token, int64_t head) const {
    const int64_t block = block_table[token / block_size];
    const int64_t tiles = block_size / kLanes;
    return ((block * kv_heads + head) * tiles + token % block_size / kLanes) * kLanes * head_dim;
  }
  void write_key(int64_t token, int64_t head, const bf16* key) const {
    bf16* to = keys + tile(token, head) + token % kLanes * 2;
    for (int64_t d = 0; d < head_dim; d += 2) std::memcpy(to + d * kLanes, key + d, 4);
  }
  void write_value(int64_t token, int64_t head, const bf16* value) const {
    bf16* to = values + tile(token, head) + token % kLanes / 2 * 2 * head_dim + token % 2;
    for (int64_t d = 0; d < head_dim; ++d) to[2 * d] = value[d];
  }
};

// Turns interleaved pairs in place by the angles of one token. A vector holds 16 pairs, one in each lane.
void rotate(bf16* x, const float* cosine, const float* sine, int64_t head_dim) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  for (int64_t i = 0; i < head_dim / 2; i += kLanes) {
    const __mmask16 some = __mmask16((1u << std::min<int64_t>(kLanes, head_dim / 2 - i)) - 1);
    const __m512i pairs = _mm512_maskz_loadu_epi32(some, x + 2 * i);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
    const __m512 c = _mm512_maskz_loadu_ps(some, cosine + i), s = _mm512_maskz_loadu_ps(some, sine + i);
    const __m512 turned_even = _mm512_sub_ps(_mm512_mul_ps(even, c), _mm512_mul_ps(odd, s));
    const __m512 turned_odd = _mm512_add_ps(_mm512_mul_ps(even, s), _mm512_mul_ps(odd, c));
    const __m512i low16 = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(turned_even));
    const __m512i high16 = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(turned_odd)), 16);
    _mm512_mask_storeu_epi32(x + 2 * i, some, _mm512_or_si512(low16, high16));
  }
}

// Divides by the root mean square, in place.
void normalize(bf16* x, float eps, int64_t head_dim) {
  float squares = 0.f;
  for (int64_t i = 0; i < head_dim; ++i) squares += to_float(x[i]) * to_float(x[i]);
  const float inverse = 1.f / std::sqrt(squares / float(head_dim) + eps);
  for (int64_t i = 0; i < head_dim; ++i) x[i] = to_bf16(to_float(x[i]) * inverse);
}

// Asks for `size` numbers; tiles lie apart, so the processor does not foresee them.
inline void fetch(const bf16* p, int64_t size) {
  for (int64_t i = 0; i < size; i += kLine / int64_t(sizeof(bf16))) _mm_prefetch((const char*)(p + i), _MM_HINT_T0);
}

// scores[t][r][0..15] = query r . the 16 keys of tile t. Enough sums at once to hide the latency of each.
template <int ROWS, int TILES>
void score(const bf16* const* query, const bf16* const* keys, int64_t head_dim, float (*scores)[ROWS][kLanes]) {
  __m512 sum[TILES][ROWS];
  for (int t = 0; t < TILES; ++t)
    for (int r = 0; r < ROWS; ++r) sum[t][r] = _mm512_setzero_ps();
  for (int64_t d = 0; d < head_dim; d += 2) {
    __m512bh pair[TILES];
    for (int t = 0; t < TILES; ++t) pair[t] = load_pairs(keys[t] + d * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh q = broadcast_pair(query[r] + d);
      for (int t = 0; t < TILES; ++t) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], pair[t], q);
    }
  }
  for (int t = 0; t < TILES; ++t)
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(scores[t][r], sum[t][r]);
}

// out[r][d..d + 16 * PANELS) += weights[t][r] . values of tile t, over all tiles in order
template <int ROWS, int PANELS>
void accumulate(const bf16 (*weights)[ROWS][kLanes], const bf16* const* values, int tiles, int64_t head_dim, int64_t d,
                float (*out)[kMaxHeadDim]) {
  __m512 sum[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_loadu_ps(out[r] + d + p * kLanes);
  for (int t = 0; t < tiles; ++t)
    for (int64_t key = 0; key < kLanes; key += 2) {
      __m512bh pair[PANELS];
      for (int p = 0; p < PANELS; ++p) pair[p] = load_pairs(values[t] + key * head_dim + 2 * (d + p * kLanes));
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh weight = broadcast_pair(weights[t][r] + key);
        for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], pair[p], weight);
      }
    }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) _mm512_storeu_ps(out[r] + d + p * kLanes, sum[r][p]);
}

struct Row {
  const bf16* query;
  bf16* out;
  int64_t first, last;  // the keys it sees, both included
};

// Flash attention (Dao et al., 2022) of up to 8 query rows that share a KV head.
template <int ROWS>
void attend_rows(const Row* rows, const Cache& cache, int64_t head, float scale) {
  constexpr int kPanels = ROWS <= 5 ? 4 : 2;  // what fits the registers
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  alignas(64) float scores[kKeyTiles][ROWS][kLanes];
  alignas(64) bf16 weights[kKeyTiles][ROWS][kLanes];
  alignas(64) float out[ROWS][kMaxHeadDim];
  float highest[ROWS], total[ROWS];
  const bf16* query[ROWS];
  int64_t first = rows[0].first, last = rows[0].last;
  for (int r = 0; r < ROWS; ++r) {
    query[r] = rows[r].query;
    highest[r] = kHidden;
    total[r] = 0.f;
    std::fill(out[r], out[r] + cache.head_dim, 0.f);
    first = std::min(first, rows[r].first);
    last = std::max(last, rows[r].last);
  }
  for (int64_t group = first / kKeys * kKeys; group <= last; group += kKeys) {
    // Blocks wholly before `first` may be freed already: their table entries are not followed.
    const int64_t start = std::max(group, first / kLanes * kLanes);
    const int tiles = int(std::min(group + kKeys, last / kLanes * kLanes + kLanes) - start) / kLanes;
    const bf16 *keys[kKeyTiles], *values[kKeyTiles];
    for (int t = 0; t < tiles; ++t) {
      const int64_t tile = cache.tile(start + t * kLanes, head);
      keys[t] = cache.keys + tile;
      values[t] = cache.values + tile;
      fetch(values[t], kLanes * cache.head_dim);
    }
    int t = 0;
    if constexpr (ROWS <= 5)
      for (; t + 4 <= tiles; t += 4) score<ROWS, 4>(query, keys + t, cache.head_dim, scores + t);
    for (; t + 2 <= tiles; t += 2) score<ROWS, 2>(query, keys + t, cache.head_dim, scores + t);
    for (; t < tiles; ++t) score<ROWS, 1>(query, keys + t, cache.head_dim, scores + t);
    for (int64_t next = group + kKeys; next <= std::min(last, group + 2 * kKeys - 1); next += kLanes)
      fetch(cache.keys + cache.tile(next, head), kLanes * cache.head_dim);
    for (int r = 0; r < ROWS; ++r) {
      __m512 value[kKeyTiles];
      __mmask16 seen[kKeyTiles];
      __m512 top = _mm512_set1_ps(highest[r]);
      for (t = 0; t < tiles; ++t) {
        const __m512i key = _mm512_add_epi32(_mm512_set1_epi32(int(start) + t * kLanes), lanes);
        seen[t] = _mm512_cmple_epi32_mask(key, _mm512_set1_epi32(int(rows[r].last))) &
                  _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(int(rows[r].first)));
        value[t] = _mm512_mask_mul_ps(_mm512_set1_ps(kHidden), seen[t], _mm512_loadu_ps(scores[t][r]),
                                      _mm512_set1_ps(scale));
        top = _mm512_max_ps(top, value[t]);
      }
      const float peak = _mm512_reduce_max_ps(top);
      const float reference = peak == kHidden ? 0.f : peak;  // a row that sees none of these keys
      __m512 sum = _mm512_setzero_ps();
      for (t = 0; t < tiles; ++t) {
        const __m512 weight =
            _mm512_maskz_mov_ps(seen[t], exp512(_mm512_sub_ps(value[t], _mm512_set1_ps(reference))));
        sum = _mm512_add_ps(sum, weight);
        store_bf16(weights[t][r], weight);
      }
      const float rescale = highest[r] == peak ? 1.f : std::exp(highest[r] - peak);
      total[r] = total[r] * rescale + _mm512_reduce_add_ps(sum);
      highest[r] = peak;
      if (rescale != 1.f)
        for (int64_t d = 0; d < cache.head_dim; d += kLanes)
          _mm512_storeu_ps(out[r] + d, _mm512_mul_ps(_mm512_loadu_ps(out[r] + d), _mm512_set1_ps(rescale)));
    }
    int64_t d = 0;
    for (; d + kPanels * kLanes <= cache.head_dim; d += kPanels * kLanes)
      accumulate<ROWS, kPanels>(weights, values, tiles, cache.head_dim, d, out);
    for (; d < cache.head_dim; d += kLanes) accumulate<ROWS, 1>(weights, values, tiles, cache.head_dim, d, out);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int64_t d = 0; d < cache.head_dim; d += kLanes)
      store_bf16(rows[r].out + d, _mm512_div_ps(_mm512_loadu_ps(out[r] + d), _mm512_set1_ps(total[r])));
}

void attend(const Row* rows, int64_t count, const Cache& cache, int64_t head, float scale) {
#define ROWS_CASE(R) case R: attend_rows<R>(rows, cache, head, scale); break;
  switch (count) {
    ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7) ROWS_CASE(8)
  }
#undef ROWS_CASE
}

}  // namespace

extern "C" {

// out [ceil(n / 16)][k / 2][16][2] from w [n, k]; missing columns are 0. k must be even.
void moray_pack(const bf16* w, bf16* out, int64_t n, int64_t k) {
  const int64_t panels = (n + kLanes - 1) / kLanes;
  for (int64_t panel = 0; panel < panels; ++panel) {
    bf16* to = out + panel * k * kLanes;
    for (int64_t i = 0; i < k; i += 2)
      for (int64_t lane = 0; lane < kLanes; ++lane, to += 2) {
        const int64_t column = panel * kLanes + lane;
        to[0] = column < n ? w[column * k + i] : 0;
        to[1] = column < n ? w[column * k + i + 1] : 0;
      }
  }
}

// y [m, 16 * panels] = x [m, k] (row stride ldx) times packed weights; y is bfloat16, or float32 for
// epilogue 1; epilogue 2 takes panels that alternate gate and up and stores silu(gate) * up.
void moray_matmul(const bf16* x, int64_t ldx, const bf16* w, void* y, int64_t ldy, int64_t m, int64_t panels, int64_t k,
                  int epilogue) {
  switch (Epilogue(epilogue)) {
    case Epilogue::kBf16: matmul<Epilogue::kBf16>(x, ldx, w, y, ldy, m, panels, k); break;
    case Epilogue::kFloat: matmul<Epilogue::kFloat>(x, ldx, w, y, ldy, m, panels, k); break;
    case Epilogue::kSwiGLU: matmul<Epilogue::kSwiGLU>(x, ldx, w, y, ldy, m, panels, k); break;
  }
}

// One feed-forward after another, each on its own rows: y = down(silu(gate(x)) * up(x)). x, y [sum(counts), dim];
// hidden_rows [sum(counts), hidden] is scratch. w13 and w2 are packed as for epilogues 2 and 0 above.
void moray_swiglus(const bf16* x, const bf16* const* w13, const bf16* const* w2, const int64_t* counts, int64_t n,
                   bf16* hidden_rows, bf16* y, int64_t dim, int64_t hidden) {
  for (int64_t i = 0; i < n; ++i) {
    if (!counts[i]) continue;
    matmul<Epilogue::kSwiGLU>(x, dim, w13[i], hidden_rows, hidden, counts[i], 2 * hidden / kLanes, dim);
    matmul<Epilogue::kBf16>(hidden_rows, hidden, w2[i], y, dim, counts[i], dim / kLanes, hidden);
    x += counts[i] * dim;
    hidden_rows += counts[i] * hidden;
    y += counts[i] * dim;
  }
}

// y [m, k] = x / rms(x) * weight. k must be a multiple of 16.
void moray_rms_norm(const bf16* x, const bf16* weight, bf16* y, int64_t m, int64_t k, float eps) {
  team.run(m, m * k < kAlone ? 0 : 2, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bf16* from = x + row * k;
      __m512 squares = _mm512_setzero_ps();
      for (int64_t i = 0; i < k; i += kLanes) {
        const __m512 v = load_bf16(from + i);
        squares = _mm512_fmadd_ps(v, v, squares);
      }
      const __m512 inverse = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / float(k) + eps));
      for (int64_t i = 0; i < k; i += kLanes)
        store_bf16(y + row * k + i, _mm512_mul_ps(_mm512_mul_ps(load_bf16(from + i), inverse), load_bf16(weight + i)));
    }
  });
}

// Rotates q and k, writes k and v into the cache, attends.
//   qkv [tokens, (heads + 2 * kv_heads) * head_dim], q and k are turned in place
//   cosine, sine [tokens, head_dim / 2], or null for a layer without positions
//   out [tokens, heads * head_dim]
//   temperature [tokens], factors of the queries, or null
//   qk_norm_eps: 0, or queries and keys are normalized after rotation with this epsilon
//   chunk: a query sees keys of its own chunk of positions only; 0 is no limit
void moray_attention(bf16* qkv, const float* cosine, const float* sine, const float* temperature, bf16* keys, bf16* values,
                     const int32_t* block_tables, int64_t max_blocks, const int32_t* query_starts,
                     const int32_t* context_lens, int64_t sequences, bf16* out, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, int64_t block_size, int64_t chunk, float qk_norm_eps, float scale) {
  const int64_t width = (heads + 2 * kv_heads) * head_dim;
  const int64_t group = heads / kv_heads;
  const int64_t tile = std::max<int64_t>(1, kMaxRows / group);  // queries whose heads of one group fill the rows
  const auto cache_of = [&](int64_t s) {
    return Cache{keys, values, block_tables + s * max_blocks, block_size, kv_heads, head_dim};
  };
  team.run(query_starts[sequences], 2, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t s = std::upper_bound(query_starts, query_starts + sequences + 1, token) - query_starts - 1;
      const Cache cache = cache_of(s);
      const int64_t position = context_lens[s] - (query_starts[s + 1] - token);
      bf16* row = qkv + token * width;
      if (cosine)
        for (int64_t h = 0; h < heads + kv_heads; ++h)
          rotate(row + h * head_dim, cosine + token * head_dim / 2, sine + token * head_dim / 2, head_dim);
      if (temperature)
        for (int64_t i = 0; i < heads * head_dim; ++i) row[i] = to_bf16(to_float(row[i]) * temperature[token]);
      if (qk_norm_eps > 0.f)
        for (int64_t h = 0; h < heads + kv_heads; ++h) normalize(row + h * head_dim, qk_norm_eps, head_dim);
      for (int64_t h = 0; h < kv_heads; ++h) {
        cache.write_key(position, h, row + (heads + h) * head_dim);
        cache.write_value(position, h, row + (heads + kv_heads + h) * head_dim);
      }
    }
  });
  // One piece of work is a tile of queries and a KV head: of all sequences, in one row.
  std::vector<int64_t> works(sequences + 1, 0);
  for (int64_t s = 0; s < sequences; ++s)
    works[s + 1] = works[s] + (query_starts[s + 1] - query_starts[s] + tile - 1) / tile * kv_heads;
  team.run(works[sequences], 16, [&](int64_t first, int64_t last) {
    for (int64_t work = first; work < last; ++work) {
      const int64_t s = std::upper_bound(works.begin(), works.end(), work) - works.begin() - 1;
      const Cache cache = cache_of(s);
      const int64_t end = query_starts[s + 1], head = (work - works[s]) % kv_heads;
      const int64_t from = query_starts[s] + (work - works[s]) / kv_heads * tile;
      Row rows[kMaxRows];
      int64_t count = 0;
      for (int64_t token = from; token < std::min(from + tile, end); ++token)
        for (int64_t g = 0; g < group; ++g) {
          const int64_t position = context_lens[s] - (end - token), h = head * group + g;
          rows[count++] = Row{qkv + token * width + h * head_dim, out + (token * heads + h) * head_dim,
                              chunk ? position / chunk * chunk : 0, position};
          if (count == kMaxRows) attend(rows, count, cache, head, scale), count = 0;
        }
      if (count) attend(rows, count, cache, head, scale);
    }
  });
}

// Of the loops above, from now on; the caller's thread included.
void moray_set_num_threads(int threads) { team.resize(threads); }

// While parked, they run on the calling thread alone, and the others sleep.
void moray_park(int parked) { team.park(parked); }

}  // extern "C"
