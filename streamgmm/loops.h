/* The inner loops of the E-step, for one kind of float; included by loops_kinds.h once for each.

   REAL: the kind of float that features, joint densities and their products are made in. BITS: an unsigned integer as
   wide. NAME(x), V3(x), V4(x): x with an ending of its own, the last two for generations of x86 vector instructions.

   Matrices are feature-major, (m, b) with rows LINE numbers apart. Rounding is that of IEEE arithmetic in the order that
   is written here, but that a product and a sum may be one instruction. */

/* exp(x) for LOG_FLOOR <= x <= 0, to 3 units in the last place: 2^n e^r with |r| <= ln 2 / 2. ln 2 comes in two parts,
   the first with so few digits that n times it is exact (Cody & Waite 1980). */
static INLINE REAL NAME(exponential)(REAL x) {
    REAL shifted = x * (REAL)1.4426950408889634 + ROUNDING;
    REAL n = shifted - ROUNDING;
    REAL r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    REAL p = EXP_SERIES(r);
    BITS bits, power;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&power, &shifted, sizeof power);
    bits += power << MANTISSA;
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* log(x) for 1 <= x < 2^100, to 2 units in the last place: n ln 2 + 2 artanh(s) with |s| < 0.172. */
static INLINE REAL NAME(logarithm)(REAL x) {
    BITS bits, exponent, shifted;
    REAL m, n;
    memcpy(&bits, &x, sizeof bits);
    exponent = (bits - HALF_ROOT) >> MANTISSA;
    bits -= exponent << MANTISSA;
    memcpy(&m, &bits, sizeof m);
    shifted = exponent + ROUNDING_BITS;
    memcpy(&n, &shifted, sizeof n);
    n -= ROUNDING;
    REAL s = (m - 1) / (m + 1), q = s * s;
    return n * LN_2_HIGH + (n * LN_2_LOW + (2 * s + 2 * s * (q * LOG_SERIES(q))));
}

/* z = (x - shift) * scale of rows (b, d), and far (b,) = sum reach z^2, which is NaN where a row has NaN,
   and not finite where it has an infinity. */
CLONES static void NAME(standardise)(const double *rows, Index b, const Lens *lens, REAL *z, double *far) {
    Index d = lens->d;
    for (Index first = 0; first < b; first += STRIP) { /* a strip of rows stays in the cache for all its features */
        Index last = first + STRIP < b ? first + STRIP : b;
        for (Index i = first; i < last; i++) far[i] = 0.0;
        for (Index q = 0; q < d; q++) {
            double shift = lens->shift[q], scale = lens->scale[q], reach = lens->reach[q];
            for (Index i = first; i < last; i++) {
                double value = (rows[i * d + q] - shift) * scale;
                z[q * LINE + i] = (REAL)value;
                far[i] += reach * (value * value);
            }
        }
    }
}

/* After standardise: rows with NaN become zero with weight zero; returns their number. Where one has an infinity as
   well, its place in far stays NaN. */
static Index NAME(leave_out)(Index b, Index d, REAL *z, double *far, double *weights) {
    Index n_left_out = 0;
    for (Index i = 0; i < b; i++) {
        if (far[i] == far[i]) continue;
        int missing = 0;
        double rest = 0.0;
        for (Index q = 0; q < d; q++) {
            double value = z[q * LINE + i];
            if (value != value) missing = 1;
            else rest += value * 0.0;
        }
        if (!missing) continue;
        n_left_out++;
        far[i] = rest;
        weights[i] = 0.0;
        for (Index q = 0; q < d; q++) z[q * LINE + i] = 0;
    }
    return n_left_out;
}

/* Products (q, b) of z (d, b): the sum of z[left] z[right] over consecutive terms with the same ``into``. */
CLONES static void NAME(expand)(const REAL *z, Index line, Index b, const Terms *terms, REAL *products) {
    int64_t previous = -1;
    for (Index t = 0; t < terms->n; t++) {
        const REAL *left = z + terms->left[t] * line, *right = z + terms->right[t] * line;
        REAL *out = products + terms->into[t] * line;
        if (terms->into[t] != previous)
            for (Index i = 0; i < b; i++) out[i] = left[i] * right[i];
        else
            for (Index i = 0; i < b; i++) out[i] += left[i] * right[i];
        previous = terms->into[t];
    }
}

/* Log joint densities (k, b) become responsibilities. density (b,): their log sums.  factor (b,): scratch space. */
CLONES static void NAME(softmax)(REAL *joint, Index line, Index k, Index b, REAL *density, REAL *factor) {
    for (Index i = 0; i < b; i++) density[i] = joint[i];
    for (Index j = 1; j < k; j++)
        for (Index i = 0; i < b; i++) {
            REAL value = joint[j * line + i];
            density[i] = value > density[i] ? value : density[i];
        }
    for (Index i = 0; i < b; i++) factor[i] = 0;
    for (Index j = 0; j < k; j++)
        for (Index i = 0; i < b; i++) {
            REAL value = joint[j * line + i] - density[i];
            value = value < LOG_FLOOR ? LOG_FLOOR : value; /* NaN stays NaN */
            value = NAME(exponential)(value);
            joint[j * line + i] = value;
            factor[i] += value;
        }
    for (Index i = 0; i < b; i++) {
        REAL total = factor[i];
        density[i] += NAME(logarithm)(total) + (total - total); /* NaN stays NaN, whose logarithm is nonsense */
        factor[i] = 1 / total;
    }
    for (Index j = 0; j < k; j++)
        for (Index i = 0; i < b; i++) joint[j * line + i] *= factor[i];
}

CLONES static void NAME(weigh)(const REAL *matrix, Index m, Index b, const double *weights, REAL *out) {
    for (Index j = 0; j < m; j++)
        for (Index i = 0; i < b; i++) out[j * LINE + i] = matrix[j * LINE + i] * (REAL)weights[i];
}

/* Half the squared length of whitened rows (d, b), off their log densities. */
CLONES static void NAME(subtract_half_squares)(const REAL *whitened, Index d, Index b, REAL *density) {
    for (Index q = 0; q < d; q++)
        for (Index i = 0; i < b; i++) density[i] -= (REAL)0.5 * whitened[q * LINE + i] * whitened[q * LINE + i];
}

/* Adds up log densities (b,) into totals: w log p, w (log p)^2 and w. Returns 0 where one of them cannot be trusted.
   Numbers are added in LANES sums of their own, so there must be room for a multiple of that many. */
CLONES static int NAME(add_densities)(REAL *density, Index b, double *counts, double *totals) {
    double sums[LANES] = {0}, squares[LANES] = {0}, weights[LANES] = {0};
    int outside = 0;
    for (Index i = b; i % LANES; i++) density[i] = 0, counts[i] = 0.0;
    for (Index i = 0; i < b; i += LANES)
        for (Index lane = 0; lane < LANES; lane++) {
            double value = density[i + lane], weighted = counts[i + lane] * value;
            outside |= !(FAR < value) | !(value < -FAR);
            sums[lane] += weighted;
            squares[lane] += weighted * value;
            weights[lane] += counts[i + lane];
        }
    for (Index lane = 0; lane < LANES && !outside; lane++) {
        totals[0] += sums[lane];
        totals[1] += squares[lane];
        totals[2] += weights[lane];
    }
    return !outside;
}

/* out (m, b) = a (m, l) @ features (l, b) */
static void NAME(product)(NAME(Gemm) gemm, int m, int l, int b, const REAL *a, const REAL *features, REAL *out) {
    REAL one = 1, zero = 0;
    int line = LINE;
    gemm("N", "N", &b, &m, &l, &one, (REAL *)features, &line, (REAL *)a, &l, &zero, out, &line);
}

/* sums (m, l) += a (m, b) @ features (l, b)^T.  part (m, l): scratch space. */
static void NAME(add_product_with_transpose)(NAME(Gemm) gemm, int m, int l, int b, const REAL *a, const REAL *features,
                                             REAL *part, double *sums) {
    int line = LINE, in_place = sizeof(REAL) == sizeof(double);
    REAL one = 1, kept = in_place, *out = in_place ? (REAL *)sums : part;
    gemm("T", "N", &l, &m, &b, &one, (REAL *)features, &line, (REAL *)a, &line, &kept, out, &l);
    if (!in_place)
        for (Index i = 0; i < (Index)m * l; i++) sums[i] += part[i];
}

#if HAS_FUSED
#define TARGET __attribute__((target("arch=x86-64-v4")))
#define WIDTH 64
#define TOGETHER 8
#define ROWS 2
#define FUSED V4
#include "loops_fused.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#undef ROWS
#undef FUSED
#define TARGET __attribute__((target("arch=x86-64-v3")))
#define WIDTH 32
#define TOGETHER 4
#define ROWS 3
#define FUSED V3
#include "loops_fused.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#undef ROWS
#undef FUSED
#endif

/* The fused products for the machine whose groups have so many components. */
static void NAME(densities)(int together, const REAL *augmented, Index b, const Pairs *pairs,
                            const REAL *eta, REAL *joint) {
#if HAS_FUSED
    (together == 8 ? V4(densities) : V3(densities))(augmented, b, pairs, eta, joint);
#endif
}

static void NAME(add_moments)(int together, const REAL *augmented, Index b, const Pairs *pairs,
                              const REAL *resp, double *tally) {
#if HAS_FUSED
    (together == 8 ? V4(add_moments) : V3(add_moments))(augmented, b, pairs, resp, tally);
#endif
}

/* Columns [b, LINE) of a matrix (m, b) become zero, for fused products read whole vectors. */
static void NAME(clear_beyond)(Index m, Index b, REAL *matrix) {
    for (Index j = 0; j < m; j++) memset(matrix + j * LINE + b, 0, (LINE - b) * sizeof(REAL));
}

/* Adds what rows (n, d) with weights (n,), or NULL where each counts once, tell of a model with natural parameters
   eta (k, F). gemm: BLAS's matrix product for REAL.  whitener: (d, d) W where half the squared length of W z is common
   to all components, else NULL.

   tally: the moments (k, F).  common (d, d): sum w z z^T, with a whitener.  totals (4,): sums of w log p(z), of its
   square, of w, and of rows left out. Where there are pairs, products are fused, for groups of ``together`` components;
   then eta and tally are (groups, n, together).

   Returns how many rows were learned: it ends before the first panel that has a row which needs more care than these
   loops take, one that is far out or has a value that is not finite. */
static Index NAME(learn)(void *gemm, const double *rows, Index n, const double *weights, int omits_nan,
                       const Lens *lens, Index k, const REAL *eta, const REAL *whitener, const Pairs *pairs,
                       int together, REAL *scratch, double *tally, double *common, double *totals) {
    Index d = lens->d, n_moments = lens->n_moments, first = 0, all_k = pairs ? pairs->groups * together : k;
    _Alignas(CACHE_LINE) double far[PANEL];
    _Alignas(CACHE_LINE) double counts[PANEL];
    REAL *features = scratch, *joint = features + LINE * n_moments;
    REAL *density = joint + LINE * all_k, *factor = density + LINE;
    REAL *whitened = factor + LINE, *part = whitened + (whitener ? LINE * d : 0), *z = features + LINE;
    for (Index i = 0; i < LINE; i++) features[i] = 1;
    if (pairs) NAME(clear_beyond)(d, 0, z);
    for (; first < n; first += PANEL) {
        Index b = first + PANEL < n ? PANEL : n - first;
        NAME(standardise)(rows + first * d, b, lens, z, far);
        for (Index i = 0; i < b; i++) counts[i] = 1.0;
        if (weights) memcpy(counts, weights + first, b * sizeof(double));
        Index n_left_out = omits_nan ? NAME(leave_out)(b, d, z, far, counts) : 0;
        if (!all_at_most(far, b, lens->limit)) break;
        if (sizeof(REAL) < sizeof(double) && weights && !all_moderate(counts, b)) break;
        if (pairs) {
            if (b < PANEL) NAME(clear_beyond)(d, b, z);
            NAME(densities)(together, features, b, pairs, eta, joint);
        } else {
            NAME(expand)(z, LINE, b, &lens->terms, z + LINE * d);
            NAME(product)(gemm, k, n_moments, b, eta, features, joint);
        }
        NAME(softmax)(joint, LINE, k, b, density, factor);
        if (whitener) {
            NAME(product)(gemm, d, d, b, whitener, z, whitened);
            NAME(subtract_half_squares)(whitened, d, b, density);
        }
        if (!NAME(add_densities)(density, b, counts, totals)) break;
        totals[3] += n_left_out;
        if (weights || omits_nan) NAME(weigh)(joint, k, b, counts, joint);
        if (pairs) {
            if (b < PANEL) NAME(clear_beyond)(all_k, b, joint);
            NAME(add_moments)(together, features, b, pairs, joint, tally);
        } else
            NAME(add_product_with_transpose)(gemm, k, n_moments, b, joint, features, part, tally);
        if (whitener) {
            NAME(weigh)(z, d, b, counts, whitened);
            NAME(add_product_with_transpose)(gemm, d, d, b, whitened, z, part, common);
        }
    }
    return first < n ? first : n;
}
