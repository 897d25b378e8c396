/*
 * Distributions over actions, V transitions at a time. z points at the policy head's outputs, [n_outputs, ROWS], and p at memory
 * of that shape, where the gradient by z is left in the end. Formulas: ../../numpy_mlp/heads.py.
 */
#define LOWEST -3.402823466e38f /* stands for a logit of minus infinity, as in torch */
#define MASKED -1e8f             /* for a choice that is not allowed, as in sb3-contrib */
#define LOG_2PI 1.8378770664093453

typedef struct {
    vec log_prob, entropy;
} Choice;

/* z becomes the normalised logits, p the probabilities. */
INLINE Choice categorical(const Update *u, float *z, float *p, const float *actions)
{
    Choice choice = {all(0.0f), all(0.0f)};
    for (int64_t factor = 0; factor < u->n_actions; factor++) {
        const int64_t size = u->sizes[factor];
        vec action = load(actions + factor * ROWS), top = load(z), total = all(0.0f);
        for (int64_t j = 1; j < size; j++)
            top = maximum(top, load(z + j * ROWS));
        for (int64_t j = 0; j < size; j++) {
            vec logit = load(z + j * ROWS) - top, weight = exponential(logit);
            total += weight;
            store(z + j * ROWS, logit);
            store(p + j * ROWS, weight);
        }
        vec log_total = logarithm(total), share = 1.0f / total;
        for (int64_t j = 0; j < size; j++) {
            vec logit = load(z + j * ROWS) - log_total, probability = load(p + j * ROWS) * share;
            choice.log_prob += blend(action == (float)j, logit, all(0.0f));
            choice.entropy -= probability * maximum(all(LOWEST), logit);
            store(z + j * ROWS, logit);
            store(p + j * ROWS, probability);
        }
        z += size * ROWS;
        p += size * ROWS;
    }
    return choice;
}

INLINE void categorical_gradient(const Update *u, const float *z, float *p, const float *actions, vec by_log_prob, vec by_entropy)
{
    for (int64_t factor = 0; factor < u->n_actions; factor++) {
        const int64_t size = u->sizes[factor];
        vec action = load(actions + factor * ROWS), entropy = all(0.0f);
        for (int64_t j = 0; j < size && u->ent_coef != 0; j++)
            entropy -= load(p + j * ROWS) * maximum(all(LOWEST), load(z + j * ROWS));
        for (int64_t j = 0; j < size; j++) {
            vec probability = load(p + j * ROWS);
            vec gradient = blend(action == (float)j, by_log_prob, all(0.0f)) - probability * by_log_prob;
            if (u->ent_coef != 0)
                gradient -= by_entropy * probability * (maximum(all(LOWEST), load(z + j * ROWS)) + entropy);
            store(p + j * ROWS, gradient);
        }
        z += size * ROWS;
        p += size * ROWS;
    }
}

/* p becomes the probabilities of 1. */
INLINE Choice bernoulli(const Update *u, const float *z, float *p, const float *actions)
{
    Choice choice = {all(0.0f), all(0.0f)};
    for (int64_t j = 0; j < u->n_actions; j++) {
        vec logit = load(z + j * ROWS), probability = sigmoid(logit), plus = softplus(logit);
        choice.log_prob += load(actions + j * ROWS) * logit - plus;
        choice.entropy += plus - probability * logit;
        store(p + j * ROWS, probability);
    }
    return choice;
}

INLINE void bernoulli_gradient(const Update *u, const float *z, float *p, const float *actions, vec by_log_prob, vec by_entropy)
{
    for (int64_t j = 0; j < u->n_actions; j++) {
        vec probability = load(p + j * ROWS);
        vec gradient = (load(actions + j * ROWS) - probability) * by_log_prob;
        if (u->ent_coef != 0)
            gradient -= by_entropy * load(z + j * ROWS) * probability * (1.0f - probability);
        store(p + j * ROWS, gradient);
    }
}

/* p becomes the actions' distances from the mean, in standard deviations. The entropy is the same for all. */
INLINE Choice gaussian(const Update *u, const Memory *m, const float *z, float *p, const float *actions)
{
    double log_stds = 0;
    vec squares = all(0.0f);
    for (int64_t j = 0; j < u->n_actions; j++) {
        vec deviation = (load(actions + j * ROWS) - load(z + j * ROWS)) * m->inverse_std[j];
        log_stds += u->parameters[u->log_std + j];
        squares += deviation * deviation;
        store(p + j * ROWS, deviation);
    }
    double n = (double)u->n_actions;
    Choice choice = {-0.5f * squares - (float)(log_stds + n * 0.5 * LOG_2PI), all((float)(log_stds + n * 0.5 * (1 + LOG_2PI)))};
    return choice;
}

INLINE void gaussian_gradient(const Update *u, const Memory *m, float *p, vec by_log_prob, vec by_entropy)
{
    for (int64_t j = 0; j < u->n_actions; j++) {
        vec deviation = load(p + j * ROWS), weighted = deviation * by_log_prob;
        m->gradient[u->log_std + j] += (float)sum(weighted * deviation - by_log_prob + by_entropy);
        store(p + j * ROWS, weighted * m->inverse_std[j]);
    }
}

/* The KL, in nats, of the distribution now from the old one, whose parameters are old, [n_dist_params, ROWS]. */
INLINE vec exact_kl(const Update *u, const float *z, const float *old)
{
    vec kl = all(0.0f);
    const int64_t n = u->distribution == GAUSSIAN ? u->n_actions : u->n_dist_params;
    for (int64_t j = 0; j < n; j++) {
        vec was = load(old + j * ROWS), is = load(z + j * ROWS);
        if (u->distribution == CATEGORICAL) {
            kl += exponential(was) * (maximum(all(LOWEST), was) - maximum(all(LOWEST), is));
        } else if (u->distribution == BERNOULLI) {
            kl += sigmoid(was) * (was - is) + softplus(is) - softplus(was);
        } else {
            vec log_std = all(u->parameters[u->log_std + j]), log_ratio = 2.0f * (load(old + (n + j) * ROWS) - log_std);
            vec distance = (was - is) / exponential(log_std);
            kl += 0.5f * (exponential(log_ratio) + distance * distance - 1.0f - log_ratio);
        }
    }
    return kl;
}
