# cython: language_level=3, boundscheck=False, wraparound=False
"""The inner loops of the E-step as machine code, which holds no lock: what NumPy needs many sweeps for.

The loops themselves are in loops.h and loops_fused.h. Here is what Python sees of them; every array is checked before it
gets there.
"""

from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport int64_t

import numpy as np
from scipy.linalg import cython_blas


cdef extern from "loops_kinds.h" nogil:
    ctypedef Py_ssize_t Index
    ctypedef struct CTerms "Terms":
        const int64_t *left
        const int64_t *right
        const int64_t *into
        Index n
    ctypedef struct CLens "Lens":
        const double *shift
        const double *scale
        const double *reach
        double limit
        Index d
        Index n_moments
        CTerms terms
    ctypedef struct CPairs "Pairs":
        const int64_t *left
        const int64_t *right
        Index n
        Index groups
    const double LOWEST "FAR"
    const int PANEL
    const int CACHE_LINE
    const int MOMENTS
    const int MOST_TOGETHER
    int components_together()
    Index learn_64(void *, const double *, Index, const double *, int, const CLens *, Index, const double *,
                 const double *, const CPairs *, int, double *, double *, double *, double *)
    Index learn_32(void *, const double *, Index, const double *, int, const CLens *, Index, const float *,
                 const float *, const CPairs *, int, float *, double *, double *, double *)
    Index scratch_size(Index, Index, Index, int)
    void softmax_64(double *, Index, Index, Index, double *, double *)
    void expand_64(const double *, Index, Index, const CTerms *, double *)


cdef void *_blas(str name):
    """The address of a routine of the BLAS that SciPy brings. ImportError where its whole numbers are no int."""
    capsule = cython_blas.__pyx_capi__[name]
    cdef const char *signature = PyCapsule_GetName(capsule)
    if not signature.startswith(b"void (char *, char *, int *, int *, int *, "):
        raise ImportError(f"SciPy's {name} is {signature.decode()}, which streamgmm was not made for.")
    return PyCapsule_GetPointer(capsule, signature)


cdef void *dgemm = _blas("dgemm")
cdef void *sgemm = _blas("sgemm")

FAR = LOWEST
PANEL_ROWS = PANEL
#: Components of a group of the fused products on this machine; 0 where it has none.
TOGETHER = components_together()
#: The same at most, on any machine.
GROUP = MOST_TOGETHER
#: With more components BLAS is as fast, or faster.
MOST_FUSED = 24


def scratch_numbers(Index d, Index k, Index n_moments, bint shared):
    """How many numbers of its kind a Lens needs as scratch space."""
    return scratch_size(d, k, n_moments, shared)


cdef class Lens:
    """What rows are seen through: coordinates, products, and the natural parameters of a model.

    shift, scale: (d,) z = (x - shift) * scale.  terms: (left, right, into), (t,) each, of q products.  eta: (k, F).
    whitener: (d, d) W where half the squared length of W z is a term common to all components, else None.
    reach: (d,) rows with sum reach * z^2 above ``limit`` are not for these loops.  dtype: float64 or float32, that of
    features, densities and products; coordinates and sums are float64.

    eta and whitener can be read as they are used, in ``dtype``; fused says whether products are. A lens holds scratch space, so one thread at a time may
    use it.
    """

    cdef const double[::1] shift, scale, reach
    cdef const int64_t[::1] left, right, into
    cdef const double[:, ::1] eta_64, whitener_64
    cdef const float[:, ::1] eta_32, whitener_32
    cdef double[::1] scratch
    cdef float[::1] scratch_32
    cdef const int64_t[::1] pair_left, pair_right
    cdef readonly object eta, whitener
    cdef tuple tally_shape
    cdef readonly bint fused
    cdef bint single, shared
    cdef Index k
    cdef int together
    cdef CLens c
    cdef CPairs pairs

    def __cinit__(self, shift, scale, terms, eta, whitener, reach, double limit, dtype=np.float64):
        d, k, n_moments = len(shift), len(eta), eta.shape[1]
        _require(n_moments >= 1 + d, "eta")
        _require(len(scale) == d and len(reach) == d and d > 0 and k > 0, "shift, scale, reach or eta")
        _require(whitener is None or whitener.shape == (d, d), "the whitener")
        self.shift, self.scale, self.reach = shift, scale, reach
        self.left, self.right, self.into = terms
        self.k, self.shared, self.single = k, whitener is not None, dtype == np.float32
        self.c.terms = _terms(self.left, self.right, self.into, d, n_moments - 1 - d)
        self.c.shift, self.c.scale, self.c.reach = &self.shift[0], &self.scale[0], &self.reach[0]
        self.c.limit, self.c.d, self.c.n_moments = limit, d, n_moments
        scratch = _aligned(scratch_size(d, k, n_moments, self.shared), dtype)
        self.eta = np.ascontiguousarray(eta, dtype=dtype)
        # a product that sums several terms, as the squared length of spherical components does, stays with BLAS
        self.fused = 0 < TOGETHER and k <= MOST_FUSED and len(self.left) == n_moments - 1 - d
        eta = np.ascontiguousarray(self._fuse(self.eta), dtype=dtype) if self.fused else self.eta
        self.tally_shape = eta.shape
        self.whitener = whitener = None if whitener is None else np.ascontiguousarray(whitener, dtype=dtype)
        if self.single:
            self.eta_32, self.whitener_32, self.scratch_32 = eta, whitener, scratch
        else:
            self.eta_64, self.whitener_64, self.scratch = eta, whitener, scratch

    def _fuse(self, eta):
        """Prepares the fused products; returns eta as they read it, (groups * n, together): zero beyond F and k."""
        d, (k, n_moments) = self.c.d, eta.shape
        together, groups, n = TOGETHER, -(-k // TOGETHER), -(-n_moments // MOMENTS) * MOMENTS
        left, right = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)  # of [1; z]
        right[1 : 1 + d] = np.arange(1, 1 + d)
        left[1 + d : n_moments], right[1 + d : n_moments] = 1 + np.asarray(self.left), 1 + np.asarray(self.right)
        self.pair_left, self.pair_right, self.together = left, right, together
        self.pairs.left, self.pairs.right = &self.pair_left[0], &self.pair_right[0]
        self.pairs.n, self.pairs.groups = n, groups
        padded = np.zeros((groups * together, n))
        padded[:k, :n_moments] = eta
        return padded.reshape(groups, together, n).transpose(0, 2, 1).reshape(groups * n, together)

    def tally(self):
        """Zeros, in which the moments are added up."""
        return np.zeros(self.tally_shape)

    def moments(self, tally):
        """The moments (k, F) that were added up in a tally."""
        if not self.fused:
            return tally
        each = tally.reshape(self.pairs.groups, self.pairs.n, self.together).transpose(0, 2, 1)
        return each.reshape(-1, self.pairs.n)[: self.k, : self.c.n_moments]

    def learn(self, const double[:, ::1] rows, const double[::1] weights, bint omits_nan, double[:, ::1] tally,
              double[:, ::1] common, double[::1] totals):
        """Add what rows (n, d) with weights (n,), or None where each counts once, tell of the model.

        tally: as ``tally`` makes it; see ``moments``.  common: (d, d) sum w z z^T where there is a whitener, else None.
        totals: (4,) sums of w log p(z), of w (log p(z))^2, of w, and of rows with NaN, which are left out where
        ``omits_nan``.

        Returns how many rows were learned. It ends before the first of the panels of ``PANEL_ROWS`` that has a row which
        needs more care than these loops take, one that is far out or has a value that is not finite.
        """
        cdef Index n = rows.shape[0]
        _require(rows.shape[1] == self.c.d and (weights is None or len(weights) == n), "rows or weights")
        _require((tally.shape[0], tally.shape[1]) == self.tally_shape and len(totals) == 4, "the sums")
        if self.shared:
            _require(common is not None and common.shape[0] == self.c.d == common.shape[1], "the common sums")
        if n == 0:
            return 0
        cdef const double *counts = NULL if weights is None else &weights[0]
        cdef double *squares = &common[0, 0] if self.shared else NULL
        cdef const double *whitener = NULL
        cdef const float *whitener_32 = NULL
        cdef const CPairs *pairs = &self.pairs if self.fused else NULL
        cdef Index learned
        if self.single:
            whitener_32 = &self.whitener_32[0, 0] if self.shared else NULL
            with nogil:
                learned = learn_32(sgemm, &rows[0, 0], n, counts, omits_nan, &self.c, self.k, &self.eta_32[0, 0],
                                   whitener_32, pairs, self.together, &self.scratch_32[0], &tally[0, 0], squares,
                                   &totals[0])
        else:
            whitener = &self.whitener_64[0, 0] if self.shared else NULL
            with nogil:
                learned = learn_64(dgemm, &rows[0, 0], n, counts, omits_nan, &self.c, self.k, &self.eta_64[0, 0],
                                   whitener, pairs, self.together, &self.scratch[0], &tally[0, 0], squares,
                                   &totals[0])
        return learned


def softmax(double[:, ::1] joint):
    """Log joint densities (k, b) become responsibilities; returns their log sums (b,)."""
    cdef Index k = joint.shape[0], b = joint.shape[1]
    _require(k > 0, "the joint densities")
    density, factor = np.empty(b), np.empty(b)
    cdef double[::1] out = density, scratch = factor
    if b:
        with nogil:
            softmax_64(&joint[0, 0], b, k, b, &out[0], &scratch[0])
    return density


def expand(const double[:, ::1] z, const int64_t[::1] left, const int64_t[::1] right, const int64_t[::1] into,
           double[:, ::1] products):
    """Products (q, b) of z (d, b): the sum of z[left] z[right] over consecutive terms with the same ``into``."""
    cdef Index b = z.shape[1]
    cdef CTerms terms = _terms(left, right, into, z.shape[0], products.shape[0])
    _require(products.shape[1] == b, "the products")
    if b and terms.n:
        with nogil:
            expand_64(&z[0, 0], b, b, &terms, &products[0, 0])


cdef _aligned(Index size, dtype):
    """An array that begins with a cache line: else most vectors would lie across two."""
    raw = np.empty(size + CACHE_LINE // np.dtype(dtype).itemsize, dtype=dtype)
    first = -raw.ctypes.data % CACHE_LINE // raw.itemsize
    return raw[first : first + size]


cdef CTerms _terms(const int64_t[::1] left, const int64_t[::1] right, const int64_t[::1] into, Index d, Index q):
    cdef CTerms terms = CTerms(NULL, NULL, NULL, left.shape[0])
    cdef Index t
    _require(right.shape[0] == terms.n and into.shape[0] == terms.n, "the terms")
    cdef int64_t previous = -1
    for t in range(terms.n):
        if not (0 <= left[t] < d and 0 <= right[t] < d and 0 <= into[t] < q):
            raise ValueError(f"Term {t} is outside of {d} features and {q} products.")
        if into[t] != previous and into[t] != previous + 1:
            raise ValueError(f"Term {t} is of product {into[t]}, after one of {previous}: they must be in order.")
        previous = into[t]
    if previous != q - 1:
        raise ValueError(f"The terms make {previous + 1} products of {q}.")
    if terms.n:
        terms.left, terms.right, terms.into = &left[0], &right[0], &into[0]
    return terms


cdef _require(bint right, str what):
    if not right:
        raise ValueError(f"The shape of {what} does not fit the others.")
