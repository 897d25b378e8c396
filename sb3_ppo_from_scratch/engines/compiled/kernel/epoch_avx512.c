/* Sixteen floats at a time. */
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#endif

#define EPOCH epoch_avx512
#define V 16
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define MINIMUM _mm512_min_ps
#define MAXIMUM _mm512_max_ps
#define SQUARE_ROOT _mm512_sqrt_ps
#include "epoch.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
