/*
 * Matrix products. All three of a layer (its outputs, the gradient by its inputs, and that by its weights) have one form:
 * C[i, j] = sum over k of A[i, k] X[k, j], with j along vectors, and single numbers of A multiplied with vectors of X.
 */
typedef struct {
    const float *a;
    int64_t a_row, a_column; /* distances between A's neighbours, so that it may lie either way */
    const float *x;
    int64_t x_row;
    float *c;
    int64_t c_row;
    int64_t rows, depth, columns; /* columns of X and C beyond a whole number of vectors: X must have them, C is not written */
    const float *bias;            /* [rows], added to each row; NULL for none */
    int64_t accumulates;          /* whether the product is added to what C holds */
} Product;

/* A tile of C stays in registers, whole vectors of it; mr rows and nr vectors are known when this is compiled. */
INLINE void tile(const int mr, const int nr, const Product *p, int64_t i, int64_t j, float *c, int64_t c_row, int64_t accumulates)
{
    vec sums[TILE_ROWS][TILE_VECTORS];
    const float *a = p->a + i * p->a_row, *x = p->x + j;
    const int64_t a_row = p->a_row, a_column = p->a_column, x_row = p->x_row;
#pragma GCC unroll 8
    for (int m = 0; m < mr; m++) {
        vec start = all(p->bias == NULL ? 0.0f : p->bias[i + m]);
#pragma GCC unroll 8
        for (int n = 0; n < nr; n++)
            sums[m][n] = accumulates ? load(c + m * c_row + n * V) : start;
    }
    for (int64_t k = 0; k < p->depth; k++) {
        vec line[TILE_VECTORS];
#pragma GCC unroll 8
        for (int n = 0; n < nr; n++)
            line[n] = load(x + n * V);
#pragma GCC unroll 8
        for (int m = 0; m < mr; m++) {
            vec weight = all(a[m * a_row]);
#pragma GCC unroll 8
            for (int n = 0; n < nr; n++)
                sums[m][n] += weight * line[n];
        }
        a += a_column;
        x += x_row;
    }
#pragma GCC unroll 8
    for (int m = 0; m < mr; m++) {
#pragma GCC unroll 8
        for (int n = 0; n < nr; n++)
            store(c + m * c_row + n * V, sums[m][n]);
    }
}

#define TILE(m, n) \
    case 4 * m + n - 1: \
        tile(m, n <= TILE_VECTORS ? n : 1, p, i, j, c, c_row, accumulates); \
        break;
#define TILES_OF(m) TILE(m, 1) TILE(m, 2) TILE(m, 3) TILE(m, 4)

static void any_tile(int64_t mr, int64_t nr, const Product *p, int64_t i, int64_t j, float *c, int64_t c_row, int64_t accumulates)
{
    switch (4 * mr + nr - 1) {
        TILES_OF(1)
        TILES_OF(2)
        TILES_OF(3)
        TILES_OF(4)
#if TILE_ROWS > 4
        TILES_OF(5)
        TILES_OF(6)
#endif
#if TILE_ROWS > 6
        TILES_OF(7)
        TILES_OF(8)
#endif
    }
}

/* A tile at the right edge, which ends within a vector. */
static void edge_tile(int64_t mr, int64_t nr, const Product *p, int64_t i, int64_t j)
{
    float whole[TILE_ROWS * TILE_VECTORS * V];
    any_tile(mr, nr, p, i, j, whole, nr * V, 0);
    for (int64_t m = 0; m < mr; m++) {
        float *c = p->c + (i + m) * p->c_row + j;
        const float *row = whole + m * nr * V;
        for (int64_t n = 0; n < p->columns - j; n++)
            c[n] = p->accumulates ? c[n] + row[n] : row[n];
    }
}

static void multiply(const Product *p)
{
    for (int64_t j = 0; j < p->columns; j += TILE_VECTORS * V) {
        const int64_t left = (p->columns - j + V - 1) / V, nr = left < TILE_VECTORS ? left : TILE_VECTORS;
        for (int64_t i = 0; i < p->rows; i += TILE_ROWS) {
            const int64_t mr = p->rows - i < TILE_ROWS ? p->rows - i : TILE_ROWS;
            if (j + nr * V <= p->columns)
                any_tile(mr, nr, p, i, j, p->c + i * p->c_row + j, p->c_row, p->accumulates);
            else
                edge_tile(mr, nr, p, i, j);
        }
    }
}
