/* What loops.h is made for: double and single precision, on whatever vector instructions the machine has. */
#include <stdint.h>
#include <string.h>

typedef ptrdiff_t Index;

/* PANEL: rows that are worked on together, in the cache. STRIP: of these, rows that are moved and scaled together.
   LANES: sums that are added up side by side. CACHE_LINE: bytes, to which scratch space is aligned. */
enum { LANES = 8, PANEL = 256, STRIP = 64, CACHE_LINE = 64 };

/* Of the fused products: components that a group has at most, and moments that are added up together. */
enum { MOST_TOGETHER = 8, MOMENTS = 3 };

/* A log density below this has lost what tells components apart to rounding: eps times it is 2e-4. */
static const double FAR = -1e12;

/* Numbers that ``learn`` needs as scratch space, of either kind. */
static Index scratch_size(Index d, Index k, Index n_moments, int shared) {
    enum { LINE = PANEL + CACHE_LINE / sizeof(float) };
    k += MOST_TOGETHER - 1;
    Index part = shared && d * d > k * n_moments ? d * d : k * n_moments;
    return LINE * (n_moments + k + 2 + (shared ? d : 0)) + part;
}

/* The products of a row: see AbstractQuadratic.terms. */
typedef struct {
    const int64_t *left, *right, *into;
    Index n;
} Terms;

/* What rows are seen through: z = (x - shift) * scale, and rows with sum reach z^2 above the limit are far. */
typedef struct {
    const double *shift, *scale, *reach;
    double limit;
    Index d, n_moments;
    Terms terms;
} Lens;

/* Every moment as a product of two rows of [1; z], n of them, a multiple of MOMENTS; and groups of components. */
typedef struct {
    const int64_t *left, *right;
    Index n, groups;
} Pairs;

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

/* A function for each generation of x86 vector instructions; the loader takes the best that the machine has. */
#if __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define HAS_FUSED 1
#define UNROLLED _Pragma("GCC unroll 16")
#else
#define CLONES
#define HAS_FUSED 0
#endif

/* Components of a group of the fused products on this machine; 0 where there are none. */
static int components_together(void) {
#if HAS_FUSED
    if (__builtin_cpu_supports("x86-64-v4")) return 8;
    if (__builtin_cpu_supports("x86-64-v3")) return 4;
#endif
    return 0;
}

/* Whether all numbers are at most the limit: NaN is not. */
CLONES static int all_at_most(const double *numbers, Index n, double limit) {
    int beyond = 0;
    for (Index i = 0; i < n; i++) beyond |= !(numbers[i] <= limit);
    return !beyond;
}

/* Whether all weights are zero or of a size that single precision can multiply responsibilities with. */
static int all_moderate(const double *weights, Index n) {
    for (Index i = 0; i < n; i++)
        if (weights[i] != 0.0 && !(1e-15 < weights[i] && weights[i] < 1e15)) return 0;
    return 1;
}

typedef void (*Gemm_64)(char *, char *, int *, int *, int *, double *, double *, int *, double *, int *, double *,
                        double *, int *);
typedef void (*Gemm_32)(char *, char *, int *, int *, int *, float *, float *, int *, float *, int *, float *, float *,
                        int *);

/* LINE: how far the rows of a panel's matrices are apart, a cache line more than PANEL numbers: with a power of two all
   would meet in the same few sets of the cache.
   LOG_FLOOR: where log responsibilities are clipped; below about -708 and -87 results would be denormal, and slow.
   ROUNDING: added to a small number, it leaves that number rounded to a whole one in the last bits.
   HALF_ROOT: the bits of sqrt(1/2). The series are those of Taylor for exp(r) and for (artanh(s) / s - 1) / s^2. */
#define REAL double
#define BITS uint64_t
#define NAME(x) x##_64
#define V3(x) x##_64_v3
#define V4(x) x##_64_v4
#define LINE 264
#define MANTISSA 52
#define LOG_FLOOR -690.0
#define ROUNDING 6755399441055744.0
#define ROUNDING_BITS 0x4338000000000000u
#define HALF_ROOT 0x3fe6a09e667f3bcdu
#define LN_2_HIGH 6.93147180369123816490e-01
#define LN_2_LOW 1.90821492927058770002e-10
#define EXP_SERIES(r) \
    (1.0 + r * (1.0 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 + r * (1.0 / 5040 + r * ( \
    1.0 / 40320 + r * (1.0 / 362880 + r * (1.0 / 3628800 + r * (1.0 / 39916800 + r * (1.0 / 479001600)))))))))))))
#define LOG_SERIES(q) \
    (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15 + q * ( \
    1.0 / 17 + q * (1.0 / 19 + q * (1.0 / 21))))))))))
#include "loops.h"
#undef REAL
#undef BITS
#undef NAME
#undef V3
#undef V4
#undef LINE
#undef MANTISSA
#undef LOG_FLOOR
#undef ROUNDING
#undef ROUNDING_BITS
#undef HALF_ROOT
#undef LN_2_HIGH
#undef LN_2_LOW
#undef EXP_SERIES
#undef LOG_SERIES

#define REAL float
#define BITS uint32_t
#define NAME(x) x##_32
#define V3(x) x##_32_v3
#define V4(x) x##_32_v4
#define LINE 272
#define MANTISSA 23
#define LOG_FLOOR -80.0f
#define ROUNDING 12582912.0f
#define ROUNDING_BITS 0x4b400000u
#define HALF_ROOT 0x3f3504f3u
#define LN_2_HIGH 0.693359375f
#define LN_2_LOW -2.12194440e-4f
#define EXP_SERIES(r) \
    (1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720)))))))
#define LOG_SERIES(q) (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9))))
#include "loops.h"
