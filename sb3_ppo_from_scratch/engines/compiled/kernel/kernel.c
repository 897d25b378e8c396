/* What the caller calls: which instruction sets there are, and an epoch on one of them. */
#include "kernel.h"

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* Of the interface: the version, then the sizes of the structures. */
EXPORTED int64_t kernel_interface(int64_t which)
{
    return which == 0 ? KERNEL_VERSION : which == 1 ? (int64_t)sizeof(Layer) : (int64_t)sizeof(Update);
}

/* Whether this machine has what an instruction set's code needs. */
EXPORTED int64_t kernel_runs_on(int64_t instruction_set)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (instruction_set == AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (instruction_set == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
    return instruction_set == GENERIC;
}

static float *take(float *scratch, int64_t *used, int64_t n)
{
    float *piece = scratch == 0 ? 0 : scratch + *used;
    *used += padded(n);
    return piece;
}

int64_t lay_out(const Update *update, Memory *memory)
{
    int64_t used = 0;
    float *scratch = update->scratch;
    for (int64_t i = 0; i < update->n_layers; i++) {
        int64_t size = padded(update->layers[i].outputs) * ROWS, activation = update->layers[i].activation;
        LayerMemory *layer = &memory->layers[i];
        layer->outputs = take(scratch, &used, size);
        layer->gradient = take(scratch, &used, size);
        layer->derivative = take(scratch, &used, activation >= LEAKY_RELU ? size : 0);
        layer->transposed = take(scratch, &used, i < update->n_layers - 2 ? size : 0);
    }
    memory->features = take(scratch, &used, padded(update->n_features) * ROWS);
    memory->features_transposed = take(scratch, &used, padded(update->n_features) * ROWS);
    memory->actions = take(scratch, &used, update->n_actions * ROWS);
    memory->dist_params = take(scratch, &used, update->n_dist_params * ROWS);
    memory->action_masks = take(scratch, &used, update->action_masks == 0 ? 0 : update->n_dist_params * ROWS);
    memory->old_values = take(scratch, &used, ROWS);
    memory->old_log_prob = take(scratch, &used, ROWS);
    memory->returns = take(scratch, &used, ROWS);
    memory->advantages = take(scratch, &used, update->batch_size + ROWS);
    memory->gradient = take(scratch, &used, update->n_parameters);
    memory->inverse_std = take(scratch, &used, update->n_actions);
    return used;
}

/* Floats of scratch memory, zeros at first, that an update needs. */
EXPORTED int64_t kernel_scratch_size(const Update *update)
{
    Memory memory;
    Update without = *update;
    without.scratch = 0;
    return lay_out(&without, &memory);
}

/*
 * Step on the minibatches of one epoch, until one of them ends the update.
 *
 * order: [n], numbers of the rows; wants_kl: whether to compute the exact KL; log: [ceil(n / batch_size), LOG_COLUMNS].
 * Returns how many minibatches were begun, or why none was.
 */
EXPORTED int64_t kernel_epoch(Update *update, int64_t instruction_set, const int64_t *order, int64_t n, int64_t wants_kl, float *log)
{
    if (!kernel_runs_on(instruction_set))
        return UNKNOWN_INSTRUCTION_SET;
#if defined(__x86_64__)
    if (instruction_set == AVX512)
        return epoch_avx512(update, order, n, wants_kl, log);
    if (instruction_set == AVX2)
        return epoch_avx2(update, order, n, wants_kl, log);
#endif
    return epoch_generic(update, order, n, wants_kl, log);
}
