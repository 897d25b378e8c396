/*
 * An epoch of PPO: for each minibatch the loss, its gradient, and a step of Adam. Included once per instruction set, which says
 * what EPOCH is called, how many floats a vector has (V), and how large a tile of a product fits its registers.
 */
#include "kernel.h"
#include "vectors.h"
#include "products.h"
#include "heads.h"

/* Sums over a minibatch's transitions. */
typedef struct {
    double policy, value, entropy, approx_kl, outside, exact_kl;
} Sums;

/* ------------------------------------------------------------------ gathering */

/* Rows of a table become [columns, ROWS]. */
static void gather_columns(const float *table, int64_t columns, const int64_t *order, int64_t n, float *to)
{
    for (int64_t row = 0; row < n; row++)
        for (int64_t j = 0; j < columns; j++)
            to[j * ROWS + row] = table[order[row] * columns + j];
}

static void gather_features(const Update *u, const Memory *m, const int64_t *order, int64_t n)
{
    const int64_t width = padded(u->n_features);
    for (int64_t row = 0; row < n; row++) {
        const float *from = u->observations + order[row] * u->n_features;
        float *to = m->features_transposed + row * width;
        for (int64_t j = 0; j < u->n_features; j++)
            to[j] = from[j];
    }
    transpose(m->features_transposed, width, n, width, m->features, ROWS);
}

/* Returns 0 if the actions of a categorical distribution are not among its choices. */
static int gather_actions(const Update *u, const Memory *m, const int64_t *order, int64_t n)
{
    gather_columns(u->actions, u->n_actions, order, n, m->actions);
    if (u->distribution != CATEGORICAL)
        return 1;
    for (int64_t factor = 0; factor < u->n_actions; factor++)
        for (int64_t row = 0; row < n; row++) {
            float *action = &m->actions[factor * ROWS + row];
            if (!(*action > -1.0f && *action < (float)u->sizes[factor]))
                return 0;
            *action = (float)(int64_t)*action;
        }
    return 1;
}

/* To mean 0 and standard deviation 1, as advantages.normalize_advantages does. */
static void gather_advantages(const Update *u, const Memory *m, const int64_t *order, int64_t n)
{
    float *advantages = m->advantages;
    double total = 0, squares = 0;
    for (int64_t row = 0; row < n; row++)
        total += advantages[row] = u->advantages[order[row]];
    if (!u->normalize_advantage || n <= 1)
        return;
    const double mean = total / (double)n;
    for (int64_t row = 0; row < n; row++)
        squares += (advantages[row] - mean) * (advantages[row] - mean);
    const double scale = 1 / (sqrt(squares / (double)(n - 1)) + 1e-8);
    for (int64_t row = 0; row < n; row++)
        advantages[row] = (float)((advantages[row] - mean) * scale);
}

/* --------------------------------------------------------------------- layers */

static void activate(const Layer *layer, const LayerMemory *m, int64_t width)
{
    for (int64_t i = 0; i < layer->outputs; i++)
        for (int64_t j = i * ROWS; j < i * ROWS + width; j += V) {
            vec x = load(m->outputs + j), y = x, slope = all((float)layer->coefficient), derivative;
            switch (layer->activation) {
            case TANH:
                y = hyperbolic_tangent(x);
                break;
            case RELU:
                y = maximum(all(0.0f), x);
                break;
            case LEAKY_RELU:
                y = blend(x <= 0.0f, slope * x, x);
                store(m->derivative + j, blend(x <= 0.0f, slope, all(1.0f)));
                break;
            case ELU:
                derivative = slope * exponential(minimum(all(0.0f), x));
                y = blend(x <= 0.0f, derivative - slope, x);
                store(m->derivative + j, blend(x <= 0.0f, derivative, all(1.0f)));
                break;
            case SILU:
                derivative = sigmoid(x);
                y = x * derivative;
                store(m->derivative + j, derivative + y * (1.0f - derivative));
                break;
            }
            store(m->outputs + j, y);
        }
}

static void forward(const Update *u, const Memory *m, int64_t n)
{
    const int64_t width = (n + V - 1) / V * V;
    for (int64_t i = 0; i < u->n_layers; i++) {
        const Layer *layer = &u->layers[i];
        const float *below = layer->source < 0 ? m->features : m->layers[layer->source].outputs;
        Product product = {.a = u->parameters + layer->weight, .a_row = layer->inputs, .a_column = 1, .x = below, .x_row = ROWS,
            .c = m->layers[i].outputs, .c_row = ROWS, .rows = layer->outputs, .depth = layer->inputs, .columns = width,
            .bias = u->parameters + layer->bias};
        multiply(&product);
        if (layer->activation != IDENTITY)
            activate(layer, &m->layers[i], width);
        if (i < u->n_layers - 2)
            transpose(m->layers[i].outputs, ROWS, padded(layer->outputs), width, m->layers[i].transposed, padded(layer->outputs));
    }
}

/* Choices that are not allowed get an output that makes their probability, and all that depends on it, exactly 0. */
static void mask_out(const Update *u, const Memory *m, int64_t n)
{
    float *z = m->layers[u->n_layers - 2].outputs;
    for (int64_t i = 0; i < u->n_dist_params; i++)
        for (int64_t j = i * ROWS; j < i * ROWS + n; j += V)
            store(z + j, blend(load(m->action_masks + j) != 0.0f, load(z + j), all(MASKED)));
}

/* The gradient by a layer's outputs becomes that by what its activation was given; its sums are the gradient by the bias. */
static void activation_gradient(const Layer *layer, const LayerMemory *m, int64_t n, float *bias_gradient)
{
    for (int64_t i = 0; i < layer->outputs; i++) {
        vec total = all(0.0f);
        for (int64_t j = 0; j < n; j += V) {
            vec y = load(m->outputs + i * ROWS + j), gradient = load(m->gradient + i * ROWS + j);
            if (layer->activation == TANH)
                gradient *= 1.0f - y * y;
            else if (layer->activation == RELU)
                gradient = blend(y > 0.0f, gradient, all(0.0f));
            else if (layer->activation != IDENTITY)
                gradient *= load(m->derivative + i * ROWS + j);
            store(m->gradient + i * ROWS + j, gradient);
            total += n - j >= V ? gradient : blend(first_lanes(n - j), gradient, all(0.0f));
        }
        bias_gradient[i] += (float)sum(total);
    }
}

/* Adds a block's gradient to that of its minibatch. */
static void backward(const Update *u, const Memory *m, int64_t n, int64_t is_first)
{
    const int64_t width = (n + V - 1) / V * V;
    int64_t has_gradient[MAX_LAYERS] = {0};
    for (int64_t i = u->n_layers - 1; i >= 0; i--) {
        const Layer *layer = &u->layers[i];
        const float *gradient = m->layers[i].gradient;
        const int64_t source = layer->source, features = padded(source < 0 ? u->n_features : u->layers[source].outputs);
        activation_gradient(layer, &m->layers[i], n, m->gradient + layer->bias);
        Product by_weight = {.a = gradient, .a_row = ROWS, .a_column = 1,
            .x = source < 0 ? m->features_transposed : m->layers[source].transposed, .x_row = features,
            .c = m->gradient + layer->weight, .c_row = layer->inputs, .rows = layer->outputs, .depth = n,
            .columns = layer->inputs, .accumulates = !is_first};
        multiply(&by_weight);
        if (source < 0)
            continue;
        Product by_input = {.a = u->parameters + layer->weight, .a_row = 1, .a_column = layer->inputs, .x = gradient,
            .x_row = ROWS, .c = m->layers[source].gradient, .c_row = ROWS, .rows = layer->inputs, .depth = layer->outputs,
            .columns = width, .accumulates = has_gradient[source]};
        multiply(&by_input);
        has_gradient[source] = 1;
    }
}

/* ----------------------------------------------------------------------- loss */

/* A block's loss, and its gradient by the heads' outputs; see numpy_mlp/loss.py for the formulas. */
static void loss(const Update *u, const Memory *m, const float *advantages, int64_t n, double size, int64_t wants_kl, Sums *sums)
{
    const LayerMemory *policy_head = &m->layers[u->n_layers - 2], *value_head = &m->layers[u->n_layers - 1];
    const float low = (float)(1 - u->clip_range), high = (float)(1 + u->clip_range), range = (float)u->clip_range_vf;
    const vec zero = all(0.0f);
    for (int64_t j = 0; j < n; j += V) {
        const ivec real = first_lanes(n - j);
        float *z = policy_head->outputs + j, *p = policy_head->gradient + j, *actions = m->actions + j;
        Choice choice = u->distribution == CATEGORICAL ? categorical(u, z, p, actions)
                        : u->distribution == BERNOULLI ? bernoulli(u, z, p, actions)
                                                       : gaussian(u, m, z, p, actions);
        vec log_ratio = choice.log_prob - load(m->old_log_prob + j), ratio = exponential(log_ratio), advantage = load(advantages + j);
        vec unclipped = advantage * ratio, clipped = advantage * minimum(all(high), maximum(all(low), ratio));
        vec by_log_prob = blend(unclipped <= clipped, unclipped * (float)(-1 / size), zero);
        vec outside = blend(absolute(ratio - 1.0f) > (float)u->clip_range, all(1.0f), zero);

        vec value = load(value_head->outputs + j), old_value = load(m->old_values + j), error, by_value;
        if (u->clips_values) {
            vec change = value - old_value;
            error = old_value + minimum(all(range), maximum(all(-range), change)) - load(m->returns + j);
            by_value = blend((change >= -range) & (change <= range), error * (float)(2 * u->vf_coef / size), zero);
        } else {
            error = value - load(m->returns + j);
            by_value = error * (float)(2 * u->vf_coef / size);
        }
        store(value_head->gradient + j, blend(real, by_value, zero));
        by_log_prob = blend(real, by_log_prob, zero);
        vec by_entropy = blend(real, all((float)(-u->ent_coef / size)), zero);

        sums->policy += sum(blend(real, minimum(unclipped, clipped), zero));
        sums->value += sum(blend(real, error * error, zero));
        sums->entropy += sum(blend(real, choice.entropy, zero));
        sums->approx_kl += sum(blend(real, (ratio - 1.0f) - log_ratio, zero));
        sums->outside += sum(blend(real, outside, zero));
        if (wants_kl)
            sums->exact_kl += sum(blend(real, exact_kl(u, z, m->dist_params + j), zero));

        if (u->distribution == CATEGORICAL)
            categorical_gradient(u, z, p, actions, by_log_prob, by_entropy);
        else if (u->distribution == BERNOULLI)
            bernoulli_gradient(u, z, p, actions, by_log_prob, by_entropy);
        else
            gaussian_gradient(u, m, p, by_log_prob, by_entropy);
    }
}

/* ----------------------------------------------------------------------- step */

static float norm_of(const float *x, int64_t n)
{
    double total = 0;
    for (int64_t i = 0; i < n;) {
        vec squares = all(0.0f);
        for (const int64_t stop = i + 64 * V; i < stop && i < n; i += V) {
            vec part = load_part(x + i, n - i);
            squares += part * part;
        }
        total += sum(squares);
    }
    return sqrtf((float)total); /* which overflows where torch's does */
}

/* A step along the clipped gradient, which is left in u->gradient; see adam_step in numpy_mlp/flat.py. */
static void clip_and_step(Update *u, const Memory *m, float norm)
{
    u->step++;
    const double root = sqrt(1 - pow(u->beta2, (double)u->step)), clip = u->max_grad_norm / (norm + 1e-6);
    const float scale = clip < 1 ? (float)clip : 1.0f, sign = u->maximize ? -1.0f : 1.0f;
    const float rate = (float)(u->learning_rate * root / (1 - pow(u->beta1, (double)u->step)));
    const float keep1 = (float)(1 - u->beta1), keep2 = (float)(1 - u->beta2), beta2 = (float)u->beta2;
    const float shrink = u->decoupled ? (float)(1 - u->learning_rate * u->weight_decay) : 1.0f;
    const float decay = u->decoupled ? 0.0f : (float)u->weight_decay, epsilon = (float)(u->epsilon * root);
    for (int64_t i = 0; i < u->n_parameters; i += V) {
        const int64_t left = u->n_parameters - i;
        vec clipped = load_part(m->gradient + i, left) * scale, parameter = load_part(u->parameters + i, left);
        vec mean = load_part(u->exp_avg + i, left), square = load_part(u->exp_avg_sq + i, left);
        vec gradient = clipped * sign + parameter * decay;
        mean += (gradient - mean) * keep1;
        square = square * beta2 + gradient * gradient * keep2;
        store_part(u->gradient + i, clipped, left);
        store_part(u->exp_avg + i, mean, left);
        store_part(u->exp_avg_sq + i, square, left);
        if (u->max_exp_avg_sq != NULL) {
            square = maximum(load_part(u->max_exp_avg_sq + i, left), square);
            store_part(u->max_exp_avg_sq + i, square, left);
        }
        parameter = parameter * shrink - mean / (square_root(square) + epsilon) * rate;
        store_part(u->parameters + i, parameter, left);
    }
}

/* ------------------------------------------------------------------ minibatch */

enum { GOES_ON, ENDS };

static int invalid(float x)
{
    return !(x - x == 0.0f);
}

/* One minibatch of n transitions. Returns whether the update goes on after it, or INVALID_ACTION. */
static int minibatch(Update *u, const Memory *m, const int64_t *order, int64_t n, int64_t wants_kl, float *row)
{
    Sums sums = {0};
    const double size = (double)n;
    for (int64_t i = 0; i < u->n_layers; i++) /* weights' are written, not added to */
        memset(m->gradient + u->layers[i].bias, 0, (size_t)u->layers[i].outputs * sizeof(float));
    if (u->distribution == GAUSSIAN)
        for (int64_t j = 0; j < u->n_actions; j++) {
            m->gradient[u->log_std + j] = 0;
            m->inverse_std[j] = expf(-u->parameters[u->log_std + j]);
        }
    gather_advantages(u, m, order, n);
    for (int64_t first = 0; first < n; first += ROWS) {
        const int64_t rows = n - first < ROWS ? n - first : ROWS;
        const int64_t *numbers = order + first;
        if (!gather_actions(u, m, numbers, rows))
            return INVALID_ACTION;
        gather_features(u, m, numbers, rows);
        gather_columns(u->old_values, 1, numbers, rows, m->old_values);
        gather_columns(u->old_log_prob, 1, numbers, rows, m->old_log_prob);
        gather_columns(u->returns, 1, numbers, rows, m->returns);
        if (wants_kl)
            gather_columns(u->dist_params, u->n_dist_params, numbers, rows, m->dist_params);
        forward(u, m, rows);
        if (u->action_masks != NULL) {
            gather_columns(u->action_masks, u->n_dist_params, numbers, rows, m->action_masks);
            mask_out(u, m, rows);
        }
        loss(u, m, m->advantages + first, rows, size, wants_kl, &sums);
        backward(u, m, rows, first == 0);
    }
    const double policy = -sums.policy / size, value = sums.value / size, entropy = -sums.entropy / size;
    row[0] = (float)(policy + u->ent_coef * entropy + u->vf_coef * value);
    row[1] = (float)policy;
    row[2] = (float)value;
    row[3] = (float)entropy;
    row[4] = (float)(sums.approx_kl / size);
    row[5] = (float)(sums.outside / size);
    row[6] = NAN;
    row[7] = wants_kl ? (float)(sums.exact_kl / size) : NAN;
    row[8] = 0;
    if (invalid(row[0]))
        return u->raises ? ENDS : GOES_ON;
    if (row[4] > (float)u->kl_limit)
        return ENDS;
    row[6] = norm_of(m->gradient, u->n_parameters);
    if (invalid(row[6]))
        return u->raises ? ENDS : GOES_ON;
    clip_and_step(u, m, row[6]);
    row[8] = 1;
    return GOES_ON;
}

int64_t EPOCH(Update *u, const int64_t *order, int64_t n, int64_t wants_kl, float *log)
{
    Memory memory;
    lay_out(u, &memory);
    int64_t done = 0, first = 0;
    do { /* a minibatch of no transitions has a loss of NaN */
        const int64_t rows = n - first < u->batch_size ? n - first : u->batch_size;
        const int status = minibatch(u, &memory, order + first, rows, wants_kl, log + LOG_COLUMNS * done++);
        if (status == INVALID_ACTION)
            return INVALID_ACTION;
        if (status == ENDS)
            break;
        first += rows;
    } while (first < n);
    return done;
}
