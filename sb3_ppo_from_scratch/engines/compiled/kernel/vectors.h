/*
 * Vectors of V floats, and functions of them. Nothing here depends on the rounding mode or on errno, and NaN comes out wherever
 * it went in. The coefficients are least maximum fits in double precision, made for this file.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vec __attribute__((vector_size(4 * V)));
typedef int32_t ivec __attribute__((vector_size(4 * V)));
typedef uint32_t uvec __attribute__((vector_size(4 * V)));

INLINE vec load(const float *from)
{
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vec x)
{
    memcpy(to, &x, sizeof x);
}

/* The first n floats, zeros after them. */
INLINE vec load_part(const float *from, int64_t n)
{
    if (n >= V)
        return load(from);
    float part[V] = {0};
    for (int64_t i = 0; i < n; i++)
        part[i] = from[i];
    return load(part);
}

INLINE void store_part(float *to, vec x, int64_t n)
{
    if (n >= V) {
        store(to, x);
        return;
    }
    float part[V];
    store(part, x);
    for (int64_t i = 0; i < n; i++)
        to[i] = part[i];
}

INLINE vec all(float x)
{
    return x - (vec){0};
}

/* x where the mask is all ones, y where it is 0. */
INLINE vec blend(ivec mask, vec x, vec y)
{
    return (vec)(((ivec)x & mask) | ((ivec)y & ~mask));
}

/* Ones in the first n lanes. */
INLINE ivec first_lanes(int64_t n)
{
    ivec lane;
    for (int i = 0; i < V; i++)
        lane[i] = i;
    return lane < (ivec)(uvec){0} + (int32_t)(n < V ? n : V);
}

/* The smaller and the larger one; y if either is NaN. */
INLINE vec minimum(vec x, vec y)
{
#ifdef MINIMUM
    return (vec)MINIMUM(x, y);
#else
    return blend(x < y, x, y);
#endif
}

INLINE vec maximum(vec x, vec y)
{
#ifdef MAXIMUM
    return (vec)MAXIMUM(x, y);
#else
    return blend(x > y, x, y);
#endif
}

INLINE vec square_root(vec x)
{
#ifdef SQUARE_ROOT
    return (vec)SQUARE_ROOT(x);
#else
    for (int i = 0; i < V; i++)
        x[i] = sqrtf(x[i]);
    return x;
#endif
}

INLINE vec absolute(vec x)
{
    return (vec)((uvec)x & 0x7fffffffu);
}

INLINE double sum(vec x)
{
    double total = 0;
    for (int i = 0; i < V; i++)
        total += x[i];
    return total;
}

/* ---------------------------------------------------------------- transposing */

/* Two vectors' lanes in turns: the first halves', the second halves'. */
#if V == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#elif V == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#if defined(__clang__)
#define ZIP(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define ZIP(x, y, ...) __builtin_shuffle(x, y, (ivec){__VA_ARGS__})
#endif

/* V x V floats; as often as V can be halved, the lines of the two halves are zipped. */
INLINE void transpose_square(const float *from, int64_t from_row, float *to, int64_t to_row)
{
    vec lines[V], zipped[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
        lines[i] = load(from + i * from_row);
#pragma GCC unroll 4
    for (int width = 1; width < V; width *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < V / 2; i++) {
            zipped[2 * i] = ZIP(lines[i], lines[i + V / 2], LOW);
            zipped[2 * i + 1] = ZIP(lines[i], lines[i + V / 2], HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V; i++)
            lines[i] = zipped[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
        store(to + i * to_row, lines[i]);
}

/* [rows, columns], both up to whole vectors, becomes [columns, rows]. */
static void transpose(const float *from, int64_t from_row, int64_t rows, int64_t columns, float *to, int64_t to_row)
{
    for (int64_t i = 0; i < rows; i += V)
        for (int64_t j = 0; j < columns; j += V)
            transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

/* ------------------------------------------------------------------ functions */

/*
 * e^x = 2^n e^r with n the nearest integer to x / log 2; r = x - n log 2 in two steps, since log 2 has no short mantissa.
 * Two factors make 2^n, so that results may be infinite, or smaller than the smallest normal number.
 */
INLINE vec exponential(vec x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: added to it, a number is rounded to an integer */
    x = minimum(all(89.0f), maximum(all(-104.0f), x));
    vec shifted = x * 1.44269504f + shift, n = shifted - shift;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.381459860e-3f + 8.368716883e-3f;
    p = p * r + 4.166838805e-2f;
    p = p * r + 1.666652063e-1f;
    p = p * r + 4.999999345e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = (ivec)((uvec)shifted - (uvec)(all(shift))), half = power >> 1;
    vec first = (vec)(((uvec)half + 127u) << 23), second = (vec)(((uvec)(power - half) + 127u) << 23);
    return p * first * second;
}

/*
 * log x for positive normal x: the exponent's share, and for the mantissa m in [sqrt(1/2), sqrt(2)] a polynomial of m - 1.
 * Of 0 and of negative numbers, which do not come here, it makes numbers; of infinity and NaN, these.
 */
INLINE vec logarithm(vec x)
{
    uvec bits = (uvec)x - 0x3f3504f3u; /* sqrt(1/2) */
    ivec exponent = (ivec)bits >> 23;
    vec m = (vec)((bits & 0x007fffffu) + 0x3f3504f3u);
    vec n = __builtin_convertvector(exponent, vec), u = m - 1.0f;
    vec p = u * -7.634487159e-2f + 1.276196258e-1f;
    p = p * u + -1.316036412e-1f;
    p = p * u + 1.420171901e-1f;
    p = p * u + -1.662333611e-1f;
    p = p * u + 2.000122778e-1f;
    p = p * u + -2.500082161e-1f;
    p = p * u + 3.333333171e-1f;
    vec square = u * u;
    p = p * (square * u) + n * -2.12194440e-4f - square * 0.5f + u + n * 0.693359375f;
    return blend(x < INFINITY, p, x);
}

/* log(1 + x) for x in [0, 1]; what rounding took from 1 + x is put back. */
INLINE vec logarithm_1p(vec x)
{
    vec y = x + 1.0f;
    return logarithm(y) + (x - (y - 1.0f)) / y;
}

/* x P(x^2) / Q(x^2), beyond 9.02 the last value before; relative error 6e-7 at most. */
INLINE vec hyperbolic_tangent(vec x)
{
    x = minimum(all(9.02f), maximum(all(-9.02f), x));
    vec t = x * x;
    vec p = t * 1.331910686e-8f + 2.058350895e-5f;
    vec q = t * 7.762034462e-7f + 3.283095694e-4f;
    p = p * t + 3.494036354e-3f;
    q = q * t + 2.587108015e-2f;
    p = p * t + 1.337971949e-1f;
    q = q * t + 4.671303474e-1f;
    p = p * t + 9.999999790e-1f;
    q = q * t + 1.0f;
    return minimum(all(1.0f), maximum(all(-1.0f), x * p / q));
}

/* 1 / (1 + e^-x) */
INLINE vec sigmoid(vec x)
{
    vec e = exponential(-absolute(x));
    return blend(x < 0.0f, e, all(1.0f)) / (e + 1.0f);
}

/* log(1 + e^x) */
INLINE vec softplus(vec x)
{
    return maximum(all(0.0f), x) + logarithm_1p(exponential(-absolute(x)));
}
