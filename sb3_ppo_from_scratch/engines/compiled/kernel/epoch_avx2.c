/* Eight floats at a time, with fused multiply-add. */
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#endif

#define EPOCH epoch_avx2
#define V 8
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define MINIMUM _mm256_min_ps
#define MAXIMUM _mm256_max_ps
#define SQUARE_ROOT _mm256_sqrt_ps
#include "epoch.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
