// Vectors of DS_ALIGN_VECTOR_BYTES in the extensions that GCC and clang share: loads, stores, exp
// and tanh. logprob_cpu.cpp includes this file once for each instruction set, inside a namespace of
// its own.

template <typename Acc>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(DS_ALIGN_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(DS_ALIGN_VECTOR_BYTES)));
  static constexpr int kCount = DS_ALIGN_VECTOR_BYTES / 4;
};

// float64 serves exact tests, not speed: one number at a time, through the same row functions.
template <>
struct Lanes<double> {
  typedef double Vector;
  static constexpr int kCount = 1;
};

using Floats = Lanes<float>::Vector;
using Words = Lanes<float>::Integers;
typedef uint16_t HalfWords __attribute__((vector_size(DS_ALIGN_VECTOR_BYTES / 2)));

DS_ALIGN_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
DS_ALIGN_INLINE float to_float(float value) { return value; }
DS_ALIGN_INLINE double to_float(double value) { return value; }

DS_ALIGN_INLINE void put(float* out, float value) { *out = value; }
DS_ALIGN_INLINE void put(double* out, double value) { *out = value; }
DS_ALIGN_INLINE void put(BFloat16* out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

DS_ALIGN_INLINE Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
DS_ALIGN_INLINE double load(const double* from) { return *from; }
DS_ALIGN_INLINE Floats load(const BFloat16* from) {
  HalfWords bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Words wide = __builtin_convertvector(bits, Words) << 16;
  return (Floats)wide;
}

DS_ALIGN_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }
DS_ALIGN_INLINE void store(double* to, double value) { *to = value; }
DS_ALIGN_INLINE void store(BFloat16* to, Floats value) {
  typedef uint32_t Bits __attribute__((vector_size(DS_ALIGN_VECTOR_BYTES)));
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (Bits)((Words){} + 0x7fc0);
  const HalfWords halves = __builtin_convertvector(value != value ? quiet : rounded, HalfWords);
  std::memcpy(to, &halves, sizeof(halves));
}

template <typename Element>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};

// The first `count` elements, then `fill`: for the end of a row.
template <typename Element>
DS_ALIGN_INLINE auto load_part(const Element* from, int64_t count,
                               typename Accumulation<Element>::Type fill) {
  constexpr int kCount = Lanes<typename Accumulation<Element>::Type>::kCount;
  Element padded[kCount];
  for (Element& element : padded) put(&element, fill);
  for (int64_t j = 0; j < count && j < kCount; ++j) padded[j] = from[j];
  return load(padded);
}

template <typename Element, typename Vector>
DS_ALIGN_INLINE void store_part(Element* to, Vector value, int64_t count) {
  constexpr int kCount = Lanes<typename Accumulation<Element>::Type>::kCount;
  Element padded[kCount];
  store(padded, value);
  for (int64_t j = 0; j < count && j < kCount; ++j) to[j] = padded[j];
}

// exp(x) to 1 ulp for x <= 88; 0 below the smallest normal number; NaN stays.
DS_ALIGN_INLINE Floats exponential(Floats x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.0f;
  const Words vanishes = x < kLowest;
  x = vanishes ? (Floats){} + kLowest : x;
  x = x > kHighest ? (Floats){} + kHighest : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRounder = 12582912.0f;
  const Floats shifted = x * 1.44269504f + kRounder;
  const Floats count = shifted - kRounder;
  const Floats power = (Floats)(((Words)shifted << 23) + (127 << 23));
  const Floats r = (x - count * 0.693359375f) + count * 2.12194440e-4f;
  // Relative minimax fit of exp on [-ln 2 / 2, ln 2 / 2] with 1 + r fixed: error 3e-9 before
  // rounding.
  Floats tail = r * 1.3814535e-3f + 8.3687454e-3f;
  tail = tail * r + 4.1668393e-2f;
  tail = tail * r + 1.6666521e-1f;
  tail = tail * r + 0.49999994f;
  const Floats result = (tail * (r * r) + r + 1.0f) * power;
  return vanishes ? (Floats){} : result;
}
DS_ALIGN_INLINE double exponential(double x) { return std::exp(x); }

DS_ALIGN_INLINE Floats hyperbolic_tangent(Floats z) {
  const Floats size = z < 0.0f ? -z : z;
  const Floats decay = exponential(-2.0f * size);
  const Floats large = (1.0f - decay) / (1.0f + decay);
  // Near 0 that difference would cancel; a relative minimax fit takes over below 0.7.
  const Floats square = z * z;
  Floats series = square * (-0.0051360317f) + 0.020089131f;
  series = series * square + (-0.053557817f);
  series = series * square + 0.13329096f;
  series = series * square + (-0.33333188f);
  const Floats small = size + size * square * series;
  const Floats result = size < 0.7f ? small : large;
  return z < 0.0f ? -result : result;
}
DS_ALIGN_INLINE double hyperbolic_tangent(double z) { return std::tanh(z); }

DS_ALIGN_INLINE float sum_of_lanes(Floats value) {
  float lanes[Lanes<float>::kCount];
  store(lanes, value);
  for (int width = Lanes<float>::kCount / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}
DS_ALIGN_INLINE double sum_of_lanes(double value) { return value; }

DS_ALIGN_INLINE float maximum_of_lanes(Floats value) {
  float lanes[Lanes<float>::kCount];
  store(lanes, value);
  float result = lanes[0];
  for (const float lane : lanes) result = lane > result ? lane : result;
  return result;
}
DS_ALIGN_INLINE double maximum_of_lanes(double value) { return value; }
