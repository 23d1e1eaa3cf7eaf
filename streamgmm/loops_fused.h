/* Both matrix products of the E-step without the features: each is the product of two numbers of the augmented row
   [1; z], and made where it is needed. For mixtures of few components, where BLAS spends much of its time on packing.

   Included by loops.h once for each width of vectors. FUSED(x): x with an ending of its own.
   TARGET: the machine that it is made for. WIDTH: bytes of a vector. What is added up stays in registers: of ROWS
   vectors of rows and TOGETHER components, and of MOMENTS moments and TOGETHER components. */

typedef REAL FUSED(Vector) __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias));

/* joint (k, b) = eta (k, F) @ features, for b rows and those up to the next multiple of ROWS vectors. */
TARGET static void FUSED(densities)(const REAL *augmented, Index b, const Pairs *pairs, const REAL *eta, REAL *joint) {
    enum { LANE = WIDTH / sizeof(REAL), STEP = ROWS * LANE };
    _Static_assert((PANEL + STEP - 1) / STEP * STEP <= LINE, "strips of rows end within the line");
    _Static_assert(TOGETHER <= MOST_TOGETHER, "there is room for a whole group");
    for (Index group = 0; group < pairs->groups; group++, eta += pairs->n * TOGETHER, joint += TOGETHER * LINE)
        for (Index i = 0; i < b; i += STEP) {
            FUSED(Vector) sums[TOGETHER][ROWS] = {0};
            for (Index t = 0; t < pairs->n; t++) {
                const REAL *left = augmented + pairs->left[t] * LINE + i;
                const REAL *right = augmented + pairs->right[t] * LINE + i;
                const REAL *factor = eta + t * TOGETHER;
                FUSED(Vector) feature[ROWS];
                UNROLLED for (int r = 0; r < ROWS; r++)
                    feature[r] = *(const FUSED(Vector) *)(left + r * LANE) * *(const FUSED(Vector) *)(right + r * LANE);
                UNROLLED for (int j = 0; j < TOGETHER; j++)
                    UNROLLED for (int r = 0; r < ROWS; r++) sums[j][r] += factor[j] * feature[r];
            }
            UNROLLED for (int j = 0; j < TOGETHER; j++)
                UNROLLED for (int r = 0; r < ROWS; r++)
                    *(FUSED(Vector) *)(joint + j * LINE + i + r * LANE) = sums[j][r];
        }
}

/* tally += responsibilities (k, b) @ features^T, for b rows and those up to the next whole vector. */
TARGET static void FUSED(add_moments)(const REAL *augmented, Index b, const Pairs *pairs, const REAL *resp,
                                      double *tally) {
    enum { LANE = WIDTH / sizeof(REAL) };
    _Static_assert(PANEL % LANE == 0, "a panel is made of whole vectors");
    for (Index t = 0; t < pairs->n; t += MOMENTS)
        for (Index group = 0; group < pairs->groups; group++) {
            const REAL *left[MOMENTS], *right[MOMENTS], *mine = resp + group * TOGETHER * LINE;
            FUSED(Vector) sums[MOMENTS][TOGETHER] = {0};
            UNROLLED for (int s = 0; s < MOMENTS; s++) {
                left[s] = augmented + pairs->left[t + s] * LINE;
                right[s] = augmented + pairs->right[t + s] * LINE;
            }
            for (Index i = 0; i < b; i += LANE) {
                FUSED(Vector) feature[MOMENTS];
                UNROLLED for (int s = 0; s < MOMENTS; s++)
                    feature[s] = *(const FUSED(Vector) *)(left[s] + i) * *(const FUSED(Vector) *)(right[s] + i);
                UNROLLED for (int j = 0; j < TOGETHER; j++) {
                    FUSED(Vector) share = *(const FUSED(Vector) *)(mine + j * LINE + i);
                    UNROLLED for (int s = 0; s < MOMENTS; s++) sums[s][j] += share * feature[s];
                }
            }
            double *into = tally + (group * pairs->n + t) * TOGETHER;
            UNROLLED for (int s = 0; s < MOMENTS; s++)
                UNROLLED for (int j = 0; j < TOGETHER; j++) {
                    double total = 0.0;
                    UNROLLED for (int lane = 0; lane < LANE; lane += 2)
                        total += (double)sums[s][j][lane] + (double)sums[s][j][lane + 1];
                    into[s * TOGETHER + j] += total;
                }
        }
}
