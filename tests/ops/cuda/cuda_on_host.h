// CUDA's words for a C++ compiler: kernels of csrc/ run on a CPU, thread by thread, as their blocks and
// barriers say.
//
// A thread is a context of its own that runs until a barrier; blocks run one after another. So a barrier that
// is missing shows as a value nobody has written yet (shared memory starts as NaN), the more surely as
// threads may be taken in either order; one that not all threads reach ends the program's launch with an
// error. Asynchronous copies are made when they are waited for. What a fragment's lanes hold is not modelled:
// the first lane holds and multiplies all of it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::shared.data

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Barrier {
  int size = 0, arrived = 0, passed = 0;
};

struct Thread {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool begun = false, done = false;
  Barrier* waits = nullptr;
  int until = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> committed;
};

struct Shared {
  alignas(128) unsigned char data[256 * 1024];
};

inline Shared shared;
inline std::vector<Thread> threads;
inline std::vector<Barrier> warps;
inline std::vector<std::vector<uint64_t>> exchanged;
inline Barrier block;
inline int current = 0;
inline bool backwards = false;  // in which order threads are taken
inline std::function<void()> body;
inline jmp_buf scheduler;
inline std::exception_ptr failure;  // of a thread: it cannot leave the thread's own stack

inline void yield() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

inline void reach(Barrier& barrier) {
  Thread& thread = threads[current];
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  thread.waits = &barrier;
  thread.until = barrier.passed + 1;
  yield();
}

inline void run_thread() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  threads[current].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int number) {
  current = number;
  threadIdx = dim3(number);
  Thread& thread = threads[number];
  thread.waits = nullptr;
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.start);
}

inline void start_block(int count) {
  constexpr size_t STACK = 128 * 1024;
  if (int(threads.size()) < count) threads.resize(count);
  block = Barrier{count, 0, 0};
  warps.assign(count / 32, Barrier{32, 0, 0});
  exchanged.assign(count / 32, std::vector<uint64_t>(32));
  std::memset(shared.data, 0xFF, sizeof shared.data);  // NaN
  for (int number = 0; number < count; ++number) {
    Thread& thread = threads[number];
    if (!thread.stack) thread.stack.reset(new char[STACK]);
    thread.begun = thread.done = false;
    thread.waits = nullptr;
    thread.copies.clear();
    thread.committed.clear();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = STACK;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run_thread, 0);
  }
}

inline void run_block(int count) {
  start_block(count);
  for (int done = 0; done < count;) {
    bool moved = false;
    for (volatile int step = 0; step < count;
         step = step + 1) {  // volatile: kept across the jumps of `resume`
      const int number = backwards ? count - 1 - step : step;
      Thread& thread = threads[number];
      if (thread.done || (thread.waits && thread.waits->passed < thread.until)) continue;
      resume(number);
      moved = true;
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    if (!moved) throw std::runtime_error("a barrier is not reached by all threads");
    done =
        int(std::count_if(threads.begin(), threads.begin() + count, [](const Thread& t) { return t.done; }));
  }
}

inline int lane() {
  return threadIdx.x % 32;
}
inline Barrier& warp() {
  return warps[threadIdx.x / 32];
}

// What every lane of the warp gave.
template <typename T>
std::vector<T> all_lanes(T mine) {
  std::vector<uint64_t>& slots = exchanged[threadIdx.x / 32];
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  slots[lane()] = bits;
  reach(warp());
  std::vector<T> found(32);
  for (int other = 0; other < 32; ++other) std::memcpy(&found[other], &slots[other], sizeof mine);
  reach(warp());
  return found;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::reach(cuda_on_host::block);
}
inline void __syncwarp() {
  cuda_on_host::reach(cuda_on_host::warp());
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  unsigned bits = 0, bit = 1;
  for (int vote : cuda_on_host::all_lanes<int>(mine)) {
    if (vote) bits |= bit;
    bit <<= 1;
  }
  return bits;
}

template <typename T>
T __shfl_sync(unsigned, T mine, int from) {
  return cuda_on_host::all_lanes(mine)[from % 32];
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __clz(unsigned bits) {
  return bits ? __builtin_clz(bits) : 32;
}
inline int __ffs(unsigned bits) {
  return __builtin_ffs(int(bits));
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) throw std::runtime_error("a copy is not aligned");
  cuda_on_host::threads[cuda_on_host::current].copies.push_back({to, from, bytes, zeros});
}

inline void __pipeline_commit() {
  cuda_on_host::Thread& thread = cuda_on_host::threads[cuda_on_host::current];
  thread.committed.push_back(std::move(thread.copies));
  thread.copies.clear();
}

inline void __pipeline_wait_prior(size_t pending) {
  auto& committed = cuda_on_host::threads[cuda_on_host::current].committed;
  for (; committed.size() > pending; committed.pop_front())
    for (const cuda_on_host::Copy& copy : committed.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
}

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };
namespace precision {
struct tf32 {};
}  // namespace precision

template <typename T>
struct Held {
  using type = T;
};
template <>
struct Held<precision::tf32> {
  using type = float;
};

// x: row by row of the 16 x K, K x 16 or 16 x 16 matrix.
template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int num_elements = (std::is_same_v<Use, accumulator> ? N : K) * 16;
  typename Held<T>::type x[num_elements];
};

inline float __float_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x1000) & ~0x1FFFu;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename F>
void fill_fragment(F& f, float value) {
  std::fill(f.x, f.x + F::num_elements, value);
}

inline void expect_alignment(const void* from, size_t pitch_bytes) {
  if (uintptr_t(from) % 32 || pitch_bytes % 16)
    throw std::runtime_error("a matrix in shared memory is not aligned");
}

template <int M, int N, int K, typename T, typename Element>
void load_matrix_sync(fragment<matrix_a, M, N, K, T, row_major>& f, const Element* from, unsigned pitch) {
  expect_alignment(from, pitch * sizeof(Element));
  if (cuda_on_host::lane()) return;
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k) f.x[m * K + k] = from[m * pitch + k];
}

template <int M, int N, int K, typename T, typename Element>
void load_matrix_sync(fragment<matrix_b, M, N, K, T, col_major>& f, const Element* from, unsigned pitch) {
  expect_alignment(from, pitch * sizeof(Element));
  if (cuda_on_host::lane()) return;
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < 16; ++n) f.x[k * 16 + n] = from[n * pitch + k];
}

template <int M, int N, int K, typename T, typename Out>
void mma_sync(Out& d, const fragment<matrix_a, M, N, K, T, row_major>& a,
              const fragment<matrix_b, M, N, K, T, col_major>& b, const Out& c) {
  if (cuda_on_host::lane()) return;
  for (int m = 0; m < 16; ++m) {
    float sums[16] = {};
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 16; ++n) sums[n] += float(a.x[m * K + k]) * float(b.x[k * 16 + n]);
    for (int n = 0; n < 16; ++n) d.x[m * 16 + n] = c.x[m * 16 + n] + sums[n];
  }
}

template <typename F>
void store_matrix_sync(float* to, const F& f, unsigned pitch, layout_t) {
  expect_alignment(to, pitch * sizeof(float));
  if (cuda_on_host::lane()) return;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) to[m * pitch + n] = f.x[m * 16 + n];
}

}  // namespace nvcuda::wmma

namespace discovla {

template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t bytes, cudaStream_t,
            Arguments arguments) {
  if (bytes > 163 * 1024) throw std::runtime_error("more shared memory than an A100 has");
  if (threads % 32 || threads > 1024) throw std::runtime_error("expected whole warps, at most 32");
  gridDim = grid, blockDim = dim3(threads);
  cuda_on_host::body = [=] { kernel(arguments); };
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_host::run_block(threads);
    }
}

}  // namespace discovla
