// CUDA C on a CPU, for tests: blocks one after the other, each thread of a block a fiber of its own.
//
// A fiber runs until it waits: at a barrier for its block, at a shuffle for its warp. Then the next one
// runs, in rising or in falling order, so that a missing barrier shows as different results. Where no
// fiber can go on, the barrier was not reached by all, and the process ends with a message. Neither real
// races nor a memory model are imitated. Warps are full: a block has a multiple of 32 threads.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SWITCH_START(save, to, size) __sanitizer_start_switch_fiber(save, to, size)
#define SWITCH_FINISH(save) __sanitizer_finish_switch_fiber(save, 0, 0)
#else
#define SWITCH_START(save, to, size) (void)0
#define SWITCH_FINISH(save) (void)0
#endif

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; } __attribute__((aligned(8)));
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct uint3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { uint2 v = {x, y}; return v; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { uint4 v = {x, y, z, w}; return v; }

namespace emulated {

enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
  ucontext_t context;
  char* stack;
  void* fake_stack;
  State state;
  uint3 thread;
  unsigned number, shuffles;
};

const unsigned MOST = 1024, STACK = 1 << 16;
static Fiber fibers[MOST];
static Fiber* current;
static ucontext_t scheduler;
static void* scheduler_fake_stack;
static const void* scheduler_stack;
static size_t scheduler_size;
static uint3 grid, block, block_index;
static double exchanged[2][MOST];  // what lanes show one another, in turns
static void (*body)(void**);
static void** arguments;

inline void wait(State state) {
  Fiber* own = current;
  own->state = state;
  SWITCH_START(&own->fake_stack, scheduler_stack, scheduler_size);
  swapcontext(&own->context, &scheduler);
  SWITCH_FINISH(own->fake_stack);
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(0, &scheduler_stack, &scheduler_size);
#endif
  body(arguments);
  current->state = DONE;
  SWITCH_START(0, scheduler_stack, scheduler_size);
  swapcontext(&current->context, &scheduler);
}

inline void resume(Fiber* fiber) {
  current = fiber;
  SWITCH_START(&scheduler_fake_stack, fiber->stack, STACK);
  swapcontext(&scheduler, &fiber->context);
  SWITCH_FINISH(scheduler_fake_stack);
}

inline void begin(Fiber* fiber, unsigned number) {
  if (!fiber->stack) fiber->stack = (char*)malloc(STACK);
  fiber->number = number, fiber->shuffles = 0, fiber->state = READY;
  fiber->thread.x = number % block.x, fiber->thread.y = number / block.x, fiber->thread.z = 0;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = STACK;
  fiber->context.uc_link = 0;
  makecontext(&fiber->context, (void (*)())enter, 0);
}

// Lets go the fibers from `first` to `last` if all of them wait, or some of them do and the rest is done.
inline bool release(unsigned first, unsigned last, State state) {
  unsigned waiting = 0;
  for (unsigned n = first; n < last; ++n) {
    if (fibers[n].state != state && fibers[n].state != DONE) return false;
    waiting += fibers[n].state == state;
  }
  for (unsigned n = first; n < last; ++n)
    if (fibers[n].state == state) fibers[n].state = READY;
  return waiting > 0;
}

inline void run_block(bool falling) {
  const unsigned threads = block.x * block.y;
  for (unsigned n = 0; n < threads; ++n) begin(&fibers[n], n);
  for (;;) {
    bool moved = false, alive = false;
    for (unsigned n = 0; n < threads; ++n) {
      Fiber* fiber = &fibers[falling ? threads - 1 - n : n];
      if (fiber->state == READY) resume(fiber), moved = true;
    }
    for (unsigned n = 0; n < threads; ++n) alive |= fibers[n].state != DONE;
    if (!alive) return;
    for (unsigned n = 0; n < threads; n += 32) moved |= release(n, n + 32, AT_WARP);
    moved |= release(0, threads, AT_BLOCK);
    if (!moved) {
      fprintf(stderr, "a barrier is not reached by all threads of block %u\n", block_index.x);
      abort();
    }
  }
}

inline void run(const unsigned* sizes, bool falling, void (*kernel)(void**), void** given) {
  grid.x = sizes[0], grid.y = sizes[1], grid.z = 1;
  block.x = sizes[2], block.y = sizes[3], block.z = 1;
  body = kernel, arguments = given;
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(falling);
}

template <class X> inline X shuffle_xor(X x, int lanes) {
  const unsigned turn = current->shuffles++ % 2;
  exchanged[turn][current->number] = x;  // floats and doubles both fit
  wait(AT_WARP);
  return (X)exchanged[turn][current->number ^ (unsigned)lanes];
}

template <class To, class From> inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "numbers of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline unsigned bfloat16_of(float x) {
  const unsigned b = same_bits<unsigned>(x);
  if (x != x) return 0x7fff;
  return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

inline float of_float16(unsigned b) {
  const unsigned sign = b & 0x8000, exponent = b >> 10 & 31, fraction = b & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? ldexpf((float)(fraction + 1024), (int)exponent - 25)
                                    : ldexpf((float)fraction, -24);
  return sign ? -size : size;
}

inline unsigned float16_of(float x) {
  const unsigned sign = same_bits<unsigned>(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(size, &exponent);  // size = m * 2**exponent, m from 0.5 to 1
  const int last = exponent < -13 ? -24 : exponent - 11;
  const unsigned units = (unsigned)nearbyintf(ldexpf(size, -last));  // to even, the default rounding
  return sign | (last == -24 ? units : ((unsigned)(last + 24) << 10) + units);
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx emulated::block_index
#define blockDim emulated::block
#define gridDim emulated::grid

inline void __syncthreads() { emulated::wait(emulated::AT_BLOCK); }
inline float __shfl_xor_sync(unsigned, float x, int lanes) { return emulated::shuffle_xor(x, lanes); }
inline double __shfl_xor_sync(unsigned, double x, int lanes) { return emulated::shuffle_xor(x, lanes); }
inline float __uint_as_float(unsigned x) { return emulated::same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated::same_bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emulated::same_bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulated::same_bits<long long>(x); }
inline void __stwb(uint4* at, uint4 x) { *at = x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
