/*
 * What the kernel and its caller share. Each structure is repeated in ../library.py, field by field; all fields take eight
 * bytes, so that there is no padding to agree about. Whoever changes one raises KERNEL_VERSION, here and there.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include <stdint.h>

#define KERNEL_VERSION 2
#define MAX_LAYERS 64
#define LOG_COLUMNS 9 /* the six of PPOLoss, the gradient's norm, the exact KL, whether a step was taken */

enum { IDENTITY, TANH, RELU, LEAKY_RELU, ELU, SILU };
enum { CATEGORICAL, BERNOULLI, GAUSSIAN };
enum { GENERIC, AVX2, AVX512, N_INSTRUCTION_SETS };

/* What an epoch returns instead of its number of minibatches. */
enum { INVALID_ACTION = -1, UNKNOWN_INSTRUCTION_SET = -2 };

/* A fully connected layer, y = f(W x + b). */
typedef struct {
    int64_t source; /* the layer that it comes after, -1 for the observations */
    int64_t inputs, outputs;
    int64_t activation;
    double coefficient; /* LeakyReLU's slope, ELU's alpha */
    int64_t weight;     /* where [outputs, inputs] begins in the vector of parameters */
    int64_t bias;       /* where [outputs] begins */
} Layer;

/* One update: network, memory, transitions, coefficients. Nothing is written to but the memory and step. */
typedef struct {
    /* the network: layers in the order of computation, the last but one the policy's head, the last the critic's */
    const Layer *layers;
    int64_t n_layers;
    int64_t distribution;
    const int64_t *sizes; /* [n_actions], of a categorical's factors */
    int64_t n_actions;    /* numbers that an action consists of */
    int64_t log_std;      /* where a Gaussian's [n_actions] begin in the vector of parameters */
    /* the memory: vectors of n_parameters, and what scratch_size asks for, which begins at a multiple of 64 bytes */
    int64_t n_parameters;
    float *parameters, *gradient, *exp_avg, *exp_avg_sq;
    float *max_exp_avg_sq; /* NULL for no AMSGrad */
    float *scratch;
    /* transitions, row by row */
    int64_t n_features, n_dist_params;
    const float *observations, *actions, *old_values, *old_log_prob, *advantages, *returns;
    const float *dist_params;  /* NULL where they are not known */
    const float *action_masks; /* of a categorical's choices, 1 where it is allowed, or else 0; NULL where all are */
    /* coefficients of the update, see UpdateConfig */
    int64_t batch_size, normalize_advantage, clips_values, raises;
    double clip_range, clip_range_vf, ent_coef, vf_coef, max_grad_norm, kl_limit;
    /* Adam */
    int64_t step; /* how many have been taken */
    int64_t decoupled, maximize;
    double learning_rate, beta1, beta2, epsilon, weight_decay;
} Update;

/*
 * Where an update keeps what it computes, in the same place for all instruction sets. Transitions are worked on in blocks of
 * ROWS, and lie feature by feature, [width, ROWS]: a vector holds one feature of neighbouring transitions, so that no width of a
 * layer is better than another. What a gradient of weights takes lies row by row too: [ROWS, padded(width)].
 */
#define ROWS 64

typedef struct {
    float *outputs, *gradient; /* [padded(outputs), ROWS], the gradient by the outputs */
    float *derivative;         /* of the activation, where the outputs do not tell it */
    float *transposed;         /* [ROWS, padded(outputs)] */
} LayerMemory;

typedef struct {
    LayerMemory layers[MAX_LAYERS];
    float *features, *features_transposed;
    float *actions, *dist_params, *action_masks; /* [n, ROWS] */
    float *old_values, *old_log_prob, *returns;  /* [ROWS] */
    float *advantages;                           /* [batch_size], of a whole minibatch */
    float *gradient;                             /* [n_parameters] */
    float *inverse_std;                          /* [n_actions] */
} Memory;

/* A width rounded up to whole vectors of any instruction set. */
static inline int64_t padded(int64_t width)
{
    return (width + 15) / 16 * 16;
}

typedef int64_t Epoch(Update *update, const int64_t *order, int64_t n, int64_t wants_kl, float *log);

#pragma GCC visibility push(hidden)
Epoch epoch_generic;
Epoch epoch_avx2;
Epoch epoch_avx512;

/* Cut the scratch memory into pieces. Returns how many floats that takes; the pieces of a scratch memory that is NULL are not to be used. */
int64_t lay_out(const Update *update, Memory *memory);
#pragma GCC visibility pop

#endif
