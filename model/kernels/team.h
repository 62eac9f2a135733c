// A team of threads for loops that take microseconds and follow one another closely.
//
// A loop is cut into pieces, and whoever is awake takes the next one. Nobody waits for a thread that has not
// begun: where other processes want the CPUs, too, the caller does alone what its team does not get to. (OpenMP's
// loops end when all threads have arrived, those without a CPU included.) Between loops the team stays awake for a
// while; `park` sends it to sleep at once and keeps it there.

#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace moray {

class Team {
 public:
  static constexpr int kMost = 256;

  // `threads` from now on, the caller's included. They start when they are needed, and end with the process.
  void resize(int threads) { size_.store(std::max(1, std::min(threads, kMost)), std::memory_order_relaxed); }

  // While parked, loops run on the calling thread alone, and the others sleep. Afterwards they wait awake for a loop.
  void park(bool parked) {
    if (parked_.exchange(parked) && !parked) wake();
  }

  // work(begin, end) for ranges that cover 0 to count, each once, `pieces` to a thread; returns when all are done.
  // Of callers at the same time one has the team, the others run alone.
  template <typename Work>
  void run(int64_t count, int64_t pieces, const Work& work) {
    const int size = size_.load(std::memory_order_relaxed);
    pieces = std::min<int64_t>({count, pieces * size, kMaxPieces});
    if (size == 1 || pieces < 2 || parked_.load(std::memory_order_relaxed) || !busy_.try_lock()) {
      if (count) work(0, count);
      return;
    }
    const std::lock_guard<std::mutex> lock(busy_, std::adopt_lock);
    for (; started_ < size - 1; ++started_) std::thread([this, number = started_] { live(number); }).detach();
    work_ = &work;
    call_ = [](const void* work, int64_t begin, int64_t end) { (*static_cast<const Work*>(work))(begin, end); };
    count_ = count;
    cpu_.store(sched_getcpu(), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t next = (ticket_.load(std::memory_order_relaxed) >> kLoopShift) + 1;
    ticket_.store(next << kLoopShift | uint64_t(pieces) << kPiecesShift);
    wake();
    take_part();
    for (int turn = 0; done_.load(std::memory_order_acquire) < pieces; ++turn)
      turn < kTurns ? _mm_pause() : (void)sched_yield();  // who has the last piece may need this CPU
  }

 private:
  // A ticket: number of the loop (32 bits), its pieces (16), those taken (16). One addition takes a piece, and tells
  // of which loop, so a thread that comes late can take none of a loop that is over.
  static constexpr int kPiecesShift = 16, kLoopShift = 32;
  static constexpr int64_t kMaxPieces = 1 << 14;  // taken may exceed it by one for each thread
  static constexpr int64_t kAwakeNs = 200'000;    // between loops: longer than what lies between kernels of a step
  static constexpr int kTurns = 2000;

  void take_part() {
    while (true) {
      const uint64_t ticket = ticket_.fetch_add(1);
      const int64_t piece = ticket & 0xffff, pieces = ticket >> kPiecesShift & 0xffff;
      if (piece >= pieces) return;
      call_(work_, count_ * piece / pieces, count_ * (piece + 1) / pieces);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void live(int number) {
    for (uint32_t seen = 0;; seen = await(seen, number))
      if (number < size_.load(std::memory_order_relaxed) - 1 && has_pieces()) {
        if (sched_getcpu() == cpu_.load(std::memory_order_relaxed)) leave_cpu();
        take_part();
      }
  }

  // For any other that this thread may use. The kernel wakes a thread where it ran last, and on few CPUs may leave it
  // there for milliseconds, taking turns with the caller, while another CPU is idle.
  // CPUs that the process is given in between are lost to this thread.
  static void leave_cpu() {
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all)) return;
    others = all;
    CPU_CLR(sched_getcpu(), &others);
    if (!CPU_COUNT(&others)) return;
    sched_setaffinity(0, sizeof others, &others);
    sched_setaffinity(0, sizeof all, &all);
  }

  bool has_pieces() const {
    const uint64_t ticket = ticket_.load(std::memory_order_acquire);
    return (ticket & 0xffff) < (ticket >> kPiecesShift & 0xffff);
  }

  uint32_t loop() const { return uint32_t(ticket_.load() >> kLoopShift); }

  // Returns when a loop other than `seen` has begun: awake at first, then asleep.
  uint32_t await(uint32_t seen, int number) {
    const int64_t until = now_ns() + kAwakeNs;
    while (number < size_.load(std::memory_order_relaxed) - 1 && !parked_.load(std::memory_order_relaxed)) {
      for (int turn = 0; turn < 32; ++turn) {
        if (const uint32_t now = loop(); now != seen) return now;
        _mm_pause();
      }
      if (now_ns() > until) break;
    }
    sleepers_.fetch_add(1);
    const uint32_t woken = wakes_.load();
    // Whoever begins a loop writes the ticket, then looks for sleepers; we did the opposite: one sees the other.
    if (loop() == seen) futex(FUTEX_WAIT_PRIVATE, woken);
    sleepers_.fetch_sub(1);
    return loop();
  }

  void wake() {
    if (!sleepers_.load()) return;
    wakes_.fetch_add(1);
    futex(FUTEX_WAKE_PRIVATE, kMost);
  }

  void futex(int operation, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&wakes_), operation, value, nullptr, nullptr, 0);
  }

  static int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> wakes_{0};
  std::atomic<int> sleepers_{0}, size_{1}, cpu_{-1};  // cpu_: the caller's
  std::atomic<bool> parked_{false};
  std::mutex busy_;
  int started_ = 0;
  const void* work_ = nullptr;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  int64_t count_ = 0;
};

}  // namespace moray
