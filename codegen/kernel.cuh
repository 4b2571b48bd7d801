// What generated kernels are made of: numbers as bits, packs of neighbouring numbers, reductions of a team.
// `real`, TEAM (threads that share a row) and the like are defined by the text that follows.

#define EACH _Pragma("unroll")
#define ONE_BY_ONE _Pragma("unroll 1")
#define HERE __device__ __forceinline__

typedef unsigned long long bits;

HERE float infinity() { return __uint_as_float(0x7f800000u); }
HERE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// --- numbers in memory: `size` in bytes, and the way from bits and back ---------------------------

struct dtype_float64 {
  static const int size = 8;
  static HERE double decode(bits b) { return __longlong_as_double((long long)b); }
  static HERE bits encode(double x) { return (bits)__double_as_longlong(x); }
};

struct dtype_float32 {
  static const int size = 4;
  static HERE float decode(bits b) { return __uint_as_float((unsigned)b); }
  static HERE bits encode(float x) { return __float_as_uint(x); }
};

struct dtype_bfloat16 {
  static const int size = 2;
  static HERE float decode(bits b) { return __uint_as_float((unsigned)b << 16); }
  static HERE bits encode(float x) {
#ifdef __CUDA_ARCH__
    unsigned short b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(x));
    return b;
#else
    return emulated::bfloat16_of(x);
#endif
  }
};

struct dtype_float16 {
  static const int size = 2;
  static HERE float decode(bits b) {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)b));
    return x;
#else
    return emulated::of_float16((unsigned)b);
#endif
  }
  static HERE bits encode(float x) {
#ifdef __CUDA_ARCH__
    unsigned short b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(x));
    return b;
#else
    return emulated::float16_of(x);
#endif
  }
};

struct dtype_int64 {
  static const int size = 8;
  static HERE long long decode(bits b) { return (long long)b; }
  static HERE bits encode(long long x) { return (bits)x; }
};

struct dtype_int32 {
  static const int size = 4;
  static HERE long long decode(bits b) { return (int)(unsigned)b; }
  static HERE bits encode(long long x) { return (unsigned)x; }
};

struct dtype_bool {
  static const int size = 1;
  static HERE bool decode(bits b) { return b != 0; }
  static HERE bits encode(bool x) { return x; }
};

template <int SIZE> HERE bits read_bits(const char* at) {
  if (SIZE == 8) return *(const bits*)at;
  if (SIZE == 4) return *(const unsigned*)at;
  if (SIZE == 2) return *(const unsigned short*)at;
  return *(const unsigned char*)at;
}

template <int SIZE> HERE void write_bits(char* at, bits b) {
  if (SIZE == 8) *(bits*)at = b;
  else if (SIZE == 4) *(unsigned*)at = (unsigned)b;
  else if (SIZE == 2) *(unsigned short*)at = (unsigned short)b;
  else *(unsigned char*)at = (unsigned char)b;
}

template <class D> HERE auto read(const char* at) -> decltype(D::decode(0)) {
  return D::decode(read_bits<D::size>(at));
}

template <class D, class X> HERE void write(char* at, X x) { write_bits<D::size>(at, D::encode(x)); }

// --- N neighbouring numbers, in as few registers and as wide accesses as can be -------------------

template <class D, int N> struct Pack {
  static const int bytes = N * D::size;
  static const int words = (bytes + 3) / 4;
  static const int each = D::size < 4 ? 4 / D::size : 1;  // numbers in a word
  unsigned word[words];

  HERE void clear() {
    EACH for (int w = 0; w < words; ++w) word[w] = 0;
  }

  HERE bits get_bits(int k) const {
    if (D::size == 8) return (bits)word[(2 * k + 1) % words] << 32 | word[2 * k % words];
    if (D::size == 4) return word[k];
    return word[k / each] >> k % each * 8 * D::size & ((1u << 8 * D::size % 32) - 1);
  }

  HERE void set_bits(int k, bits b) {
    if (D::size == 8) word[2 * k % words] = (unsigned)b, word[(2 * k + 1) % words] = (unsigned)(b >> 32);
    else if (D::size == 4) word[k] = (unsigned)b;
    else word[k / each] |= (unsigned)b << k % each * 8 * D::size;
  }

  HERE auto get(int k) const -> decltype(D::decode(0)) { return D::decode(get_bits(k)); }
  template <class X> HERE void set(int k, X x) { set_bits(k, D::encode(x)); }

  // All N, or the first `count` where a row may end within the pack.
  template <bool TAIL> HERE void load(const char* at, long long count) {
    if (TAIL && count < N) {
      load_apart(at, D::size, count);
    } else if (bytes % 16 == 0) {
      EACH for (int w = 0; w < words / 4; ++w) {
        const uint4 four = ((const uint4*)at)[w];
        word[4 * w] = four.x, word[(4 * w + 1) % words] = four.y;
        word[(4 * w + 2) % words] = four.z, word[(4 * w + 3) % words] = four.w;
      }
    } else if (bytes == 8) {
      const uint2 two = *(const uint2*)at;
      word[0] = two.x, word[1 % words] = two.y;
    } else {
      word[0] = (unsigned)read_bits<bytes < 4 ? bytes : 4>(at);
    }
  }

  template <bool TAIL> HERE void store(char* at, long long count) const {
    if (TAIL && count < N) {
      store_apart(at, D::size, count);
    } else if (bytes % 16 == 0) {
      EACH for (int w = 0; w < words / 4; ++w)
        __stwb((uint4*)at + w, make_uint4(word[4 * w], word[(4 * w + 1) % words],
                                          word[(4 * w + 2) % words], word[(4 * w + 3) % words]));
    } else if (bytes == 8) {
      *(uint2*)at = make_uint2(word[0], word[1 % words]);
    } else {
      write_bits<bytes < 4 ? bytes : 4>(at, word[0]);
    }
  }

  // Numbers that stand `step` bytes apart.
  HERE void load_apart(const char* at, long long step, long long count) {
    clear();
    EACH for (int k = 0; k < N; ++k)
      if (k < count) set_bits(k, read_bits<D::size>(at + k * step));
  }

  HERE void store_apart(char* at, long long step, long long count) const {
    EACH for (int k = 0; k < N; ++k)
      if (k < count) write_bits<D::size>(at + k * step, get_bits(k));
  }
};

// --- operators that the language lacks ------------------------------------------------------------

HERE float maximum(float x, float y) {
#ifdef __CUDA_ARCH__
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x > y || x != x ? x : y;
#endif
}

HERE float minimum(float x, float y) {
#ifdef __CUDA_ARCH__
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y || x != x ? x : y;
#endif
}

HERE double maximum(double x, double y) { return x > y || x != x ? x : y; }
HERE double minimum(double x, double y) { return x < y || x != x ? x : y; }

HERE unsigned mix(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

HERE float uniform(bits place, bits seed) {
  const unsigned low = mix((unsigned)place ^ (unsigned)seed);
  const unsigned high = (unsigned)(place >> 32) * 0x9e3779b9u + (unsigned)(seed >> 32);
  return (float)(mix(low + high) >> 8) * 5.9604644775390625e-8f;
}

// --- reductions of the TEAM threads of a row ------------------------------------------------------

struct Sum {
  static HERE real start() { return 0; }
  static HERE real join(real x, real y) { return x + y; }
};

struct Max {
  static HERE real start() { return -infinity(); }
  static HERE real join(real x, real y) { return maximum(x, y); }
};

struct Min {
  static HERE real start() { return infinity(); }
  static HERE real join(real x, real y) { return minimum(x, y); }
};

// The same in all threads of a team. A team beyond a warp is a block, and the next use of the same
// `slots` (one number for each warp) comes after another barrier.
template <class Join, int THREADS> HERE real reduce(real x, real* slots) {
  EACH for (int step = (THREADS < 32 ? THREADS : 32) / 2; step > 0; step /= 2)
    x = Join::join(x, __shfl_xor_sync(0xffffffffu, x, step));
  if (THREADS > 32) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    x = slots[lane % (THREADS / 32 > 0 ? THREADS / 32 : 1)];
    EACH for (int step = THREADS / 64; step > 0; step /= 2)
      x = Join::join(x, __shfl_xor_sync(0xffffffffu, x, step));
  }
  return x;
}
