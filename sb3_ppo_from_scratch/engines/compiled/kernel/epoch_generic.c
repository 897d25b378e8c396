/* Four floats at a time, which every compiler makes something of: SSE2, NEON. */
#define EPOCH epoch_generic
#define V 4
#define TILE_ROWS 4
#define TILE_VECTORS 2
#define IS_GENERIC
#include "epoch.h"
