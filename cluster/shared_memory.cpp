// Collectives between processes of one host, over a segment of memory that they all map.
//
// Every operation is one exchange, in which all ranks take part: each writes what it gives
// into a slot of its own and posts the number of the exchange; whoever reads waits until all
// have posted that number. There are two slots, used in turn: a rank that posts exchange k has
// left exchange k - 1, so it has seen all others leave k - 2, and its slot of k - 2 is free.
// Longer data goes in as many exchanges as it takes.
//
// Waiting spins for a while, then sleeps on a futex, so that an idle group costs nothing. A rank may be late: while it
// counts up its sign of life it computes, and only silence is held against it.
//
// Plain C interface; shared_memory.py owns the descriptor and checks arguments.

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

namespace {

constexpr int64_t kSlotBytes = 512 * 1024;
constexpr int kAborted = -1;
constexpr int64_t kSleepNs = 50 * 1000 * 1000;  // between two looks at the abort flag and the clock
constexpr int64_t kYieldNs = 200 * 1000;        // of giving the CPU away before sleeping for good

struct alignas(128) Line {
  std::atomic<uint32_t> posted;   // number of the last exchange this rank has given its part of
  std::atomic<uint32_t> sleepers; // ranks that sleep until it changes
  std::atomic<uint32_t> alive;    // counted up for as long as the process runs
};

struct Group {
  char* base;
  int64_t bytes;
  int rank, size;
  uint32_t exchange;
  int64_t spin_ns, deadline_ns, longest_ns;
  std::atomic<int> aborted;

  Line& line(int of) { return reinterpret_cast<Line*>(base)[of]; }
  char* slot(int of) { return base + size * sizeof(Line) + (2 * of + exchange % 2) * kSlotBytes; }
};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void futex(std::atomic<uint32_t>& word, int what, uint32_t value, const timespec* timeout) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), what, value, timeout, nullptr, 0);
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void post(Group& g) {
  Line& mine = g.line(g.rank);
  mine.posted.store(g.exchange, std::memory_order_seq_cst);
  if (mine.sleepers.load(std::memory_order_seq_cst)) futex(mine.posted, FUTEX_WAKE, INT32_MAX, nullptr);
}

// 0 once `of` has posted; kAborted; or of + 1 when it has given no sign of life for the deadline, or is too late even so.
int wait_for(Group& g, int of) {
  Line& line = g.line(of);
  const auto is_there = [&] { return int32_t(line.posted.load(std::memory_order_acquire) - g.exchange) >= 0; };
  if (is_there()) return 0;
  const int64_t begun = now_ns();
  int64_t silent_since = 0;  // since `begun`
  uint32_t alive = line.alive.load(std::memory_order_relaxed);
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (is_there()) return 0;
      relax();
    }
    if (g.aborted.load(std::memory_order_relaxed)) return kAborted;
    const int64_t waited = now_ns() - begun;
    if (waited < g.spin_ns) continue;
    if (waited < g.spin_ns + kYieldNs) {
      sched_yield();
      continue;
    }
    if (const uint32_t now = line.alive.load(std::memory_order_relaxed); now != alive) {
      alive = now;
      silent_since = waited;
    }
    if (waited - silent_since > g.deadline_ns || waited > g.longest_ns) return of + 1;
    const timespec nap{0, kSleepNs};
    line.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = line.posted.load(std::memory_order_seq_cst);
    if (int32_t(seen - g.exchange) < 0) futex(line.posted, FUTEX_WAIT, seen, &nap);
    line.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

int wait_for_all(Group& g) {
  for (int of = 0; of < g.size; ++of)
    if (of != g.rank)
      if (const int fault = wait_for(g, of)) return fault;
  return 0;
}

// Posts what is in this rank's slot and waits for the others.
int exchange(Group& g) {
  post(g);
  return wait_for_all(g);
}

inline float to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int64_t kBlock = 1024;  // elements whose sums stay in the cache

// x = the sum of all slots, by rank: every rank adds in the same order and gets the same bits.
WIDEST void sum_bf16(uint16_t* x, const uint16_t* const* slots, int size, int64_t count) {
  float sums[kBlock];
  for (int64_t from = 0; from < count; from += kBlock) {
    const int64_t n = std::min(kBlock, count - from);
    for (int64_t i = 0; i < n; ++i) sums[i] = to_float(slots[0][from + i]);
    for (int r = 1; r < size; ++r)
      for (int64_t i = 0; i < n; ++i) sums[i] += to_float(slots[r][from + i]);
    for (int64_t i = 0; i < n; ++i) x[from + i] = to_bf16(sums[i]);
  }
}

WIDEST void sum_float(float* x, const float* const* slots, int size, int64_t count) {
  for (int64_t from = 0; from < count; from += kBlock) {
    const int64_t n = std::min(kBlock, count - from);
    for (int64_t i = 0; i < n; ++i) x[from + i] = slots[0][from + i];
    for (int r = 1; r < size; ++r)
      for (int64_t i = 0; i < n; ++i) x[from + i] += slots[r][from + i];
  }
}

template <typename T>
int all_reduce(Group& g, T* x, int64_t count, void (*sum)(T*, const T* const*, int, int64_t)) {
  const int64_t most = kSlotBytes / int64_t(sizeof(T));
  const T* slots[64];
  for (int64_t from = 0; from < count; from += most) {
    const int64_t n = std::min(most, count - from);
    ++g.exchange;
    std::memcpy(g.slot(g.rank), x + from, n * sizeof(T));
    if (const int fault = exchange(g)) return fault;
    for (int r = 0; r < g.size; ++r) slots[r] = reinterpret_cast<const T*>(g.slot(r));
    sum(x + from, slots, g.size, n);
  }
  return 0;
}

}  // namespace

extern "C" {

int64_t moray_segment_bytes(int size) { return size * (int64_t(sizeof(Line)) + 2 * kSlotBytes); }

// A member of the group whose zeroed segment is `fd`; null when it cannot be mapped. At most 64 ranks.
Group* moray_join(int fd, int rank, int size, int64_t spin_ns) {
  const int64_t bytes = moray_segment_bytes(size);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return nullptr;
  return new Group{static_cast<char*>(base), bytes, rank, size, 0, spin_ns, INT64_MAX, INT64_MAX, {0}};
}

void moray_leave(Group* g) {
  munmap(g->base, g->bytes);
  delete g;
}

// deadline_ns: of silence. longest_ns: of waiting for a rank that does give signs of life.
void moray_set_deadline(Group* g, int64_t deadline_ns, int64_t longest_ns) {
  g->deadline_ns = deadline_ns;
  g->longest_ns = longest_ns;
}

// A sign of life for those who wait for this rank. From any thread.
void moray_alive(Group* g) { g->line(g->rank).alive.fetch_add(1, std::memory_order_relaxed); }

// Makes this process's waits, now and later, end at once. From any thread.
void moray_abort(Group* g) { g->aborted.store(1); }

// All that follow return 0, -1 after an abort, or rank + 1 of a rank that missed the deadline.

int moray_all_reduce_bf16(Group* g, uint16_t* x, int64_t count) { return all_reduce(*g, x, count, sum_bf16); }

int moray_all_reduce_float(Group* g, float* x, int64_t count) { return all_reduce(*g, x, count, sum_float); }

// data: `bytes` of `root`, to the ranks whose bit is set in `readers`; others just take part.
int moray_broadcast(Group* g, char* data, int64_t bytes, int root, uint64_t readers) {
  for (int64_t from = 0; from < bytes; from += kSlotBytes) {
    const int64_t n = std::min(kSlotBytes, bytes - from);
    ++g->exchange;
    if (g->rank == root) std::memcpy(g->slot(root), data + from, n);
    if (const int fault = exchange(*g)) return fault;
    if (g->rank != root && (readers >> g->rank & 1)) std::memcpy(data + from, g->slot(root), n);
  }
  return 0;
}

// out: rows of [size][row_bytes], from each rank's `rows` rows of `row_bytes`, on the ranks whose bit is set in `readers`.
int moray_gather(Group* g, const char* data, int64_t rows, int64_t row_bytes, char* out, uint64_t readers) {
  const bool reads = readers >> g->rank & 1, gives = readers & ~(uint64_t(1) << g->rank);
  const int64_t width = std::min(row_bytes, kSlotBytes), most = kSlotBytes / std::max<int64_t>(1, width);
  for (int64_t row = 0; row < rows; row += most)
    for (int64_t column = 0; column < row_bytes; column += width) {
      const int64_t m = std::min(most, rows - row), n = std::min(width, row_bytes - column);
      const char* own = data + row * row_bytes + column;
      ++g->exchange;
      for (int64_t i = 0; gives && i < m; ++i) std::memcpy(g->slot(g->rank) + i * n, own + i * row_bytes, n);
      if (const int fault = exchange(*g)) return fault;
      for (int r = 0; reads && r < g->size; ++r)
        for (int64_t i = 0; i < m; ++i)
          std::memcpy(out + ((row + i) * g->size + r) * row_bytes + column,
                      r == g->rank ? own + i * row_bytes : g->slot(r) + i * n, n);
    }
  return 0;
}

int moray_barrier(Group* g) {
  ++g->exchange;
  return exchange(*g);
}

}  // extern "C"
