// device.h on the host: a block's threads as contexts that take turns, each running until it waits for the others. Slow and
// exact: barriers are barriers, a warp's lanes exchange what they would exchange, 16-bit numbers are rounded as a GPU
// does, and an asynchronous copy is made when it is waited for, no sooner. A warp runs far ahead of the others, in an order
// that can be chosen: where a barrier is missing, that gives other results.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define MLMFAST_DEVICE inline
#define MLMFAST_BOTH inline

namespace mlmfast::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float to_float(float16 x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return value;
}
inline uint16_t bits_of(bfloat16, float value) {  // to the nearest, ties to even
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return static_cast<uint16_t>(std::isnan(value) ? 0x7fff : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
inline uint16_t bits_of(float16, float value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}
template <class T>
uint32_t pair(float first, float second) {
  return bits_of(T{}, first) | static_cast<uint32_t>(bits_of(T{}, second)) << 16;
}
template <class T>
T narrow(float value) {
  return T{bits_of(T{}, value)};
}
template <class T>
float half_of(uint32_t both, int which) {
  return to_float(T{static_cast<uint16_t>(both >> (16 * which))});
}

// A block of threads.
class Block {
 public:
  static constexpr int LANES = 32;

  // Runs `kernel` once for each thread, all threads to the end.
  static void run(int threads, const std::function<void()>& kernel) {
    Block block(threads, kernel);
    current() = &block;
    std::vector<int> warps((threads + LANES - 1) / LANES), lanes(LANES);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    std::mt19937 random(static_cast<unsigned>(order()));
    if (order() < 0) {
      std::reverse(warps.begin(), warps.end());
      std::reverse(lanes.begin(), lanes.end());
    }
    for (int alive = threads; alive > 0;) {
      bool moved = false;
      if (order() > 0) std::shuffle(warps.begin(), warps.end(), random);
      for (const int warp : warps)
        for (bool again = true; again;) {
          again = false;
          if (order() > 0) std::shuffle(lanes.begin(), lanes.end(), random);
          for (const int lane : lanes) {
            const int t = warp * LANES + lane;
            if (t >= threads || block.done_[t] || !block.ready(t)) continue;
            block.thread_ = t;
            swapcontext(&block.home_, &block.contexts_[t]);
            again = moved = true;
            alive -= block.done_[t];
          }
        }
      if (!moved) throw std::logic_error("threads wait for each other in vain: a barrier that not all of them reach");
    }
    current() = nullptr;
  }

  // In which the threads take turns: a warp goes as far as it can, its lanes in turn, then another one. 0: from the first to
  // the last; -1: from the last to the first; above 0: at random, the same for the same number.
  static int& order() {
    static int chosen = 0;
    return chosen;
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  int thread() const { return thread_; }
  int threads() const { return static_cast<int>(contexts_.size()); }

  // Until all threads of the block, or of this thread's warp, have called it as often.
  void wait(bool whole) {
    const int t = thread_;
    ++arrivals_[whole][t];
    waiting_[t] = whole ? WHOLE : WARP;
    while (!ready(t)) swapcontext(&contexts_[t], &home_);
    waiting_[t] = FREE;
  }

  // An asynchronous copy of 16 bytes, or of zeros, by this thread; until it has arrived nothing sensible is there.
  void copy(void* to, const void* from) {
    std::memset(to, 0x7f, 16);
    copies_[thread_].push_back({to, from});
  }
  void arrived() {
    for (const Copy& copy : copies_[thread_]) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    copies_[thread_].clear();
  }

  // What each lane of this thread's warp has put down.
  template <class V>
  const V* put(const V& mine) {
    static_assert(sizeof(V) <= SLOT);
    const int t = thread_, warp = t / LANES * LANES;
    std::memcpy(&slots_[static_cast<size_t>(t) * SLOT], &mine, sizeof(V));
    wait(false);
    for (int lane = 0; lane < LANES; ++lane)
      std::memcpy(&gathered_[static_cast<size_t>(t) * SLOT * LANES + lane * sizeof(V)],
                  &slots_[static_cast<size_t>(warp + lane) * SLOT], sizeof(V));
    wait(false);  // before a slot is written anew
    return reinterpret_cast<const V*>(&gathered_[static_cast<size_t>(t) * SLOT * LANES]);
  }

 private:
  static constexpr size_t SLOT = 64, STACK = 128 << 10;
  enum { FREE, WARP, WHOLE };
  struct Copy {
    void* to;
    const void* from;
  };

  Block(int threads, const std::function<void()>& kernel)
      : kernel_(kernel),
        contexts_(threads),
        stacks_(new char[threads * STACK]),
        done_(threads, false),
        arrivals_{std::vector<int64_t>(threads, 0), std::vector<int64_t>(threads, 0)},
        waiting_(threads, FREE),
        copies_(threads),
        slots_(threads * SLOT),
        gathered_(threads * SLOT * LANES) {
    for (int t = 0; t < threads; ++t) {
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_.get() + t * STACK;
      contexts_[t].uc_stack.ss_size = STACK;
      contexts_[t].uc_link = &home_;
      makecontext(&contexts_[t], &Block::enter, 0);
    }
  }

  static void enter() {
    Block& block = *current();
    const int t = block.thread_;
    block.kernel_();
    block.done_[t] = true;
  }

  // Whether a thread may go on: nobody of the group that it waits for is a barrier behind.
  bool ready(int t) const {
    if (waiting_[t] == FREE) return true;
    const bool whole = waiting_[t] == WHOLE;
    const int first = whole ? 0 : t / LANES * LANES, last = whole ? threads() : first + LANES;
    for (int other = first; other < last; ++other)
      if (arrivals_[whole][other] < arrivals_[whole][t]) return false;
    return true;
  }

  const std::function<void()>& kernel_;
  ucontext_t home_{};
  std::vector<ucontext_t> contexts_;
  std::unique_ptr<char[]> stacks_;  // not filled: most of it is never touched
  std::vector<char> done_;
  std::vector<int64_t> arrivals_[2];  // at barriers of a warp, of the block
  std::vector<int> waiting_;
  std::vector<std::vector<Copy>> copies_;  // under way, a thread's own
  std::vector<char> slots_, gathered_;
  int thread_ = 0;
};

inline int thread() { return Block::current()->thread(); }
inline int threads() { return Block::current()->threads(); }
inline void sync_block() { Block::current()->wait(true); }
inline void sync_warp() { Block::current()->wait(false); }
template <class V>
V exchange(V x, int mask) {
  const int lane = thread() % 32;
  return Block::current()->put(x)[lane ^ mask];
}
template <class V>
V of_lane(V x, int lane) {
  return Block::current()->put(x)[lane];
}
inline bool in_any_lane(bool x) {
  const bool* lanes = Block::current()->put(x);
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane]) return true;
  return false;
}
inline float power_of_2(float x) { return std::exp2(x); }

struct Fragments {
  uint32_t a[4], b[2];
};

template <class T>
void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = thread() % 32;
  const Fragments* all = Block::current()->put(mine);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
      const uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8];
      sum += static_cast<double>(half_of<T>(left, k % 2)) * half_of<T>(right, k % 2);
    }
    sums[e] += static_cast<float>(sum);
  }
}

inline void load_matrices(uint32_t (&into)[4], const void* row) {
  const int lane = thread() % 32;
  const void* const* rows = Block::current()->put(row);
  for (int i = 0; i < 4; ++i)
    std::memcpy(&into[i], static_cast<const char*>(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}
inline void load_matrices_turned(uint32_t (&into)[4], const void* row) {
  const int lane = thread() % 32;
  const void* const* rows = Block::current()->put(row);
  for (int i = 0; i < 4; ++i) {
    uint16_t two[2];
    for (int e = 0; e < 2; ++e)
      std::memcpy(&two[e], static_cast<const char*>(rows[8 * i + lane % 4 * 2 + e]) + lane / 4 * 2, 2);
    into[i] = two[0] | static_cast<uint32_t>(two[1]) << 16;
  }
}

inline void check_16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) std::abort();  // a GPU would stop, too
}
inline void copy_16(void* shared, const void* global, bool there) {
  check_16(shared);
  if (there) check_16(global);
  Block::current()->copy(shared, there ? global : nullptr);
}
inline void arrived() { Block::current()->arrived(); }
inline void load_once(uint32_t (&into)[4], const void* global, bool there) {
  if (there) check_16(global);
  for (uint32_t& word : into) word = 0;
  if (there) std::memcpy(into, global, 16);
}
inline void load_again(uint32_t (&into)[4], const void* global, bool there) { load_once(into, global, there); }

}  // namespace mlmfast::cuda
