/* The layout of a team for a given step: what hexmesh/planner/layout_dp.py does, with moving windows for whole tables.

   Tables hold a model's options, a graph the visits of one team and the memory to work in. Both are made from arrays by
   hexmesh/planner/layout_kernel.py, are checked here and never change, and the search runs without the interpreter's
   lock, one call a graph at a time. Stages that fit are closed under taking layers away, so for each start the stops
   that fit are a range, and both of its ends rise with the start; only the first layer (it brings the embedding) and
   the last (the head) need a look of their own. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_LAYERS = 4096, MOST_KINDS = 256, MOST_OPTIONS = 1 << 16, MOST_STATES = 1 << 22 };
enum role { PREFILL, DECODE, MIXED, N_ROLES };

static const double ROUNDING = 1e-11; /* periods that differ by less are one */
static const int MOST_BISECTIONS = 64;
static const int WEIGHTS = 24;        /* of one limit against the other, tried where a layout must keep two */

struct kind { /* of layer */
    double params, expert_params, unused;
};

struct option_kind {
    double kv_s, flop_s, prompt_s; /* of a layer: for each sequence, for each sequence, for a prompt */
};

struct option {
    int tp;
    double read_s; /* for a parameter */
    double layer_s, token_s, step_s, head_read_s, head_flop_s, prompt_head_s;
    const struct option_kind *kinds;
    const double *room; /* by start and stop */
};

struct tables {
    int n_layers, n_kinds, n_options;
    double token_bytes, prompt_tokens, output_tokens, ttft_s;
    const int64_t *kind_of_layer;
    const struct kind *kinds;
    struct option *options;
    int64_t *counts;
    double *figures;
};

struct hop {
    double delay_s, byte_s;
};

struct entry {
    int visit;
    struct hop hop;
};

struct visit {
    bool is_first, has_back;
    int n_devices, n_options, n_entries, first_state;
    const int64_t *options;
    const struct entry *entries;
    double back_s;
};

/* Stages of one option in one step. */
struct stages {
    double *before, *cost; /* [n_layers + 1]: seconds and weighted seconds of the layers before */
    double fixed_s, head_s, fixed_cost, head_cost;
    int16_t *last_stop; /* by start, -1: none fits */
    int16_t *first_start; /* by stop, of starts other than 0 */
    int16_t zero_stop;    /* the last stop below n_layers from start 0 */
    bool is_zero_whole;   /* from start 0 to the end fits */
};

struct placed {
    int visit, tp, start, stop;
};

struct fit {
    int n_stages;
    double slowest_s, around_s, room;
};

struct step {
    enum role role;
    double batch, payload;
};

struct graph {
    const struct tables *tables;
    PyObject *tables_capsule;
    int n_visits, n_states, n_used;
    struct hop inside;
    struct visit *visits;
    struct entry *entries;
    int64_t *counts;
    int *used; /* options */
    struct stages *stages; /* by option */
    double *numbers;
    int16_t *ends;
    /* states */
    int *visit_of, *reach, *came_from, *came_tp;
    double *sums, *entry, *leaving;
    int32_t *entered, *left_by;
    double *rest;                               /* by layer */
    int *need, *row_first, *row_last;           /* by state */
    int *leaving_need, *leaving_first, *leaving_last; /* by visit */
    int16_t *start_of, *tp_of;
    struct placed *stack, *found;
    bool is_busy, is_complete;
};

/* --- seconds --- */

static double payload_of(const struct tables *t, enum role role, double batch)
{
    if (role == PREFILL)
        return t->prompt_tokens * t->token_bytes;
    return batch * (1 + (role == MIXED ? t->prompt_tokens / t->output_tokens : 0.0)) * t->token_bytes;
}

static double prompts_of(const struct tables *t, const struct step *step)
{
    return step->role == PREFILL ? 1.0 : step->role == MIXED ? step->batch / t->output_tokens : 0.0;
}

static double layer_s(const struct tables *t, const struct option *o, const struct step *step, const double *params, int k)
{
    const double batch = step->batch, prompt_s = prompts_of(t, step) * o->kinds[k].prompt_s;
    if (step->role == PREFILL)
        return prompt_s;
    const double memory_s = params[k] * o->read_s + batch * o->kinds[k].kv_s, compute_s = batch * o->kinds[k].flop_s;
    return prompt_s + (memory_s > compute_s ? memory_s : compute_s) + o->layer_s + batch * o->token_s;
}

static double fixed_s(const struct tables *t, const struct option *o, const struct step *step)
{
    return (prompts_of(t, step) + (step->role != PREFILL)) * o->step_s;
}

static double head_s(const struct tables *t, const struct option *o, const struct step *step)
{
    const double prompt_s = prompts_of(t, step) * o->prompt_head_s;
    return step->role == PREFILL ? prompt_s : prompt_s + fmax(o->head_read_s, step->batch * o->head_flop_s);
}

/* Adds `weight` times the step's seconds to the arrays of an option. */
static void add_seconds(const struct tables *t, const struct option *o, const struct step *step, const double *params,
                        double weight, double *before, double *fixed, double *head)
{
    double of_kind[MOST_KINDS], sum = 0;
    for (int k = 0; k < t->n_kinds; k++)
        of_kind[k] = weight * layer_s(t, o, step, params, k);
    for (int l = 0; l < t->n_layers; l++) {
        before[l] += sum;
        sum += of_kind[t->kind_of_layer[l]];
    }
    before[t->n_layers] += sum;
    *fixed += weight * fixed_s(t, o, step);
    *head += weight * head_s(t, o, step);
}

static void look_up_params(const struct tables *t, double batch, double *params)
{
    for (int k = 0; k < t->n_kinds; k++)
        params[k] = t->kinds[k].params - (t->kinds[k].expert_params ? t->kinds[k].expert_params * pow(t->kinds[k].unused, batch) : 0.0);
}

static double seconds_of(const struct stages *s, int n_layers, int start, int stop)
{
    return s->before[stop] - s->before[start] + s->fixed_s + (stop == n_layers ? s->head_s : 0.0);
}

static double cost_of(const struct stages *s, int n_layers, int start, int stop)
{
    return s->cost[stop] - s->cost[start] + s->fixed_cost + (stop == n_layers ? s->head_cost : 0.0);
}

/* --- what fits --- */

static void find_ends(const struct tables *t, const struct option *o, struct stages *s, double resident, double slowest_s)
{
    const int n = t->n_layers;
#define FITS(start, stop) (o->room[(start) * (n + 1) + (stop)] >= resident && seconds_of(s, n, start, stop) <= slowest_s)
    for (int stop = 0; stop <= n; stop++)
        s->first_start[stop] = (int16_t)stop; /* none */
    int stop = 0;
    while (stop + 1 < n && FITS(0, stop + 1))
        stop++;
    s->zero_stop = (int16_t)stop;
    s->is_zero_whole = stop + 1 >= n && FITS(0, n);
    s->last_stop[0] = (int16_t)(s->is_zero_whole ? n : stop > 0 ? stop : -1);
    stop = 1;
    for (int start = 1; start < n; start++) {
        if (stop < start)
            stop = start;
        while (stop + 1 < n && FITS(start, stop + 1))
            s->first_start[++stop] = (int16_t)start;
        s->last_stop[start] = (int16_t)(stop > start ? stop : -1);
    }
    int start = n;
    while (start > 1 && FITS(start - 1, n))
        start--;
    s->first_start[n] = (int16_t)start;
    for (; start < n; start++)
        s->last_stop[start] = (int16_t)n;
#undef FITS
}

static void prepare(struct graph *g, const struct step *step, double *params)
{
    const struct tables *t = g->tables;
    look_up_params(t, step->batch, params);
    for (int i = 0; i < g->n_used; i++) {
        struct stages *s = &g->stages[g->used[i]];
        memset(s->before, 0, sizeof(double) * (t->n_layers + 1));
        s->fixed_s = s->head_s = 0;
        add_seconds(t, &t->options[g->used[i]], step, params, 1.0, s->before, &s->fixed_s, &s->head_s);
    }
}

static void mask(struct graph *g, double resident, double slowest_s)
{
    for (int i = 0; i < g->n_used; i++)
        find_ends(g->tables, &g->tables->options[g->used[i]], &g->stages[g->used[i]], resident, slowest_s);
}

static int option_of(const struct graph *g, const struct placed *placed)
{
    const struct visit *v = &g->visits[placed->visit];
    for (int i = 0; i < v->n_options; i++)
        if (g->tables->options[v->options[i]].tp == placed->tp)
            return (int)v->options[i];
    return 0; /* not reached: degrees come from the options */
}

static struct hop hop_between(const struct graph *g, int src, int dst)
{
    if (src == dst)
        return g->inside;
    const struct visit *v = &g->visits[dst];
    for (int i = 0; i < v->n_entries; i++)
        if (v->entries[i].visit == src)
            return v->entries[i].hop;
    return g->inside; /* not reached: stages come from the entries */
}

/* The figures of the layout in g->stack, which is in reverse order. */
static struct fit figures_of(struct graph *g, const struct step *step, int n_stages)
{
    for (int i = 0; i < n_stages / 2; i++) {
        const struct placed other = g->stack[i];
        g->stack[i] = g->stack[n_stages - 1 - i];
        g->stack[n_stages - 1 - i] = other;
    }
    const int n = g->tables->n_layers;
    struct fit fit = {.n_stages = n_stages, .room = INFINITY};
    for (int i = 0; i < n_stages; i++) {
        const struct placed *p = &g->stack[i];
        const int option = option_of(g, p);
        const double seconds = seconds_of(&g->stages[option], n, p->start, p->stop);
        fit.room = fmin(fit.room, g->tables->options[option].room[p->start * (n + 1) + p->stop]);
        fit.around_s += seconds;
        fit.slowest_s = fmax(fit.slowest_s, seconds);
        if (i) {
            const struct hop hop = hop_between(g, g->stack[i - 1].visit, p->visit);
            fit.around_s += hop.delay_s + hop.byte_s * step->payload;
            fit.slowest_s = fmax(fit.slowest_s, hop.byte_s * step->payload);
        }
    }
    if (n_stages > 1)
        fit.around_s += g->visits[g->stack[n_stages - 1].visit].back_s;
    return fit;
}

/* Of one prompt through the layout in g->stack. */
static double first_token_s(const struct graph *g, int n_stages)
{
    const struct tables *t = g->tables;
    const struct step prompt = {PREFILL, 1.0, payload_of(t, PREFILL, 1.0)};
    double sum = 0, fixed = 0, head = 0;
    for (int i = 0; i < n_stages; i++) {
        const struct placed *p = &g->stack[i];
        const struct option *o = &t->options[option_of(g, p)];
        for (int l = p->start; l < p->stop; l++)
            sum += o->kinds[t->kind_of_layer[l]].prompt_s;
        fixed += o->step_s;
        head += p->stop == t->n_layers ? o->prompt_head_s : 0.0;
        if (i) {
            const struct hop hop = hop_between(g, g->stack[i - 1].visit, p->visit);
            sum += hop.delay_s + hop.byte_s * prompt.payload;
        }
    }
    if (n_stages > 1)
        sum += g->visits[g->stack[n_stages - 1].visit].back_s;
    return sum + fixed + head;
}

/* --- the most layers --- */

/* Being further is never worse if pools that cannot take a layer can be left out. Where a way past them is missing or
   too slow (*has_gaps), a layout may exist all the same; `may_pass` lets pools be passed with no layer, so that none
   exists if that fails, too. A layout is given without `may_pass` only. */
static bool furthest(struct graph *g, const struct step *step, double slowest_s, bool may_pass, bool *has_gaps, struct fit *fit)
{
    const int n = g->tables->n_layers;
    const bool may_stay = g->inside.byte_s * step->payload <= slowest_s;
    for (int at = 0; at < g->n_visits; at++) {
        const struct visit *v = &g->visits[at];
        int start = v->is_first ? 0 : -1, from = -1;
        for (int i = 0; i < v->n_entries; i++) {
            const struct entry *e = &v->entries[i];
            const struct visit *before = &g->visits[e->visit];
            if (e->hop.byte_s * step->payload > slowest_s) {
                *has_gaps = true;
                continue;
            }
            if (may_pass && g->leaving_first[e->visit] > start)
                start = g->leaving_first[e->visit];
            for (int state = before->first_state; state < before->first_state + before->n_devices; state++)
                if (g->reach[state] > start)
                    start = g->reach[state], from = state;
        }
        g->leaving_first[at] = start;
        const int furthest_stop = v->has_back ? n : n - 1; /* others must end it */
        for (int taken = 1; taken <= v->n_devices; taken++) {
            const int state = v->first_state + taken - 1;
            int best = -1;
            for (int i = 0; i < v->n_options; i++) {
                const int tp = g->tables->options[v->options[i]].tp;
                if (tp > taken || (tp < taken && !may_stay))
                    continue;
                const int placed = tp == taken ? start : g->reach[state - tp];
                if (placed < 0 || placed >= n)
                    continue;
                int stop = g->stages[v->options[i]].last_stop[placed];
                stop = stop < furthest_stop ? stop : furthest_stop;
                if (stop > placed && stop > best) {
                    best = stop;
                    g->came_from[state] = tp == taken ? from : state - tp;
                    g->came_tp[state] = tp;
                }
            }
            g->reach[state] = best;
            if (best == n && may_pass)
                return true;
            if (best == n) {
                int n_stages = 0;
                for (int s = state; s >= 0; s = g->came_from[s]) {
                    const int before = g->came_from[s];
                    g->stack[n_stages++] =
                        (struct placed){g->visit_of[s], g->came_tp[s], before < 0 ? 0 : g->reach[before], g->reach[s]};
                }
                *fit = figures_of(g, step, n_stages);
                return true;
            }
        }
    }
    return false;
}

/* --- the least sum --- */

/* The first start, of those after the first layer, from which a stage reaches `need` or further; n + 1: there is none. */
static int start_for(const struct stages *s, int n, int need)
{
    for (int stop = need; stop <= n; stop++)
        if (s->first_start[stop] < stop)
            return s->first_start[stop];
    return n + 1;
}

/* How many layers must be placed at a state so that what follows can place the rest: `furthest` from the other end. A
   stage from the first layer is no part of what follows. */
static void find_needs(struct graph *g, const struct step *step, double slowest_s)
{
    const int n = g->tables->n_layers, never = n + 1;
    const bool may_stay = g->inside.byte_s * step->payload <= slowest_s;
    for (int at = 0; at < g->n_visits; at++)
        g->leaving_need[at] = g->visits[at].has_back ? n : never;
    for (int at = g->n_visits - 1; at >= 0; at--) {
        const struct visit *v = &g->visits[at];
        int entering = never;
        for (int taken = v->n_devices; taken >= 1; taken--) {
            const int state = v->first_state + taken - 1;
            int need = g->leaving_need[at];
            for (int i = 0; may_stay && i < v->n_options; i++) {
                const int tp = g->tables->options[v->options[i]].tp;
                if (taken + tp <= v->n_devices) {
                    const int start = start_for(&g->stages[v->options[i]], n, g->need[state + tp]);
                    need = start < need ? start : need;
                }
            }
            g->need[state] = need;
            for (int i = 0; i < v->n_options; i++)
                if (g->tables->options[v->options[i]].tp == taken) {
                    const int start = start_for(&g->stages[v->options[i]], n, need);
                    entering = start < entering ? start : entering;
                }
        }
        for (int i = 0; i < v->n_entries; i++)
            if (v->entries[i].hop.byte_s * step->payload <= slowest_s && entering < g->leaving_need[v->entries[i].visit])
                g->leaving_need[v->entries[i].visit] = entering;
    }
}

/* Sums by layers placed; those from first to last are set, the others are infinite. */
struct row {
    double *sums;
    int16_t *starts, *tps;
    int first, last;
};

static void lower(struct row *row, int stop, double sum, int start, int tp)
{
    if (stop > row->last) {
        for (int l = row->last + 1; l < stop; l++)
            row->sums[l] = INFINITY;
        row->last = stop;
    } else if (sum >= row->sums[stop]) {
        return;
    }
    row->sums[stop] = sum;
    row->starts[stop] = (int16_t)start;
    row->tps[stop] = (int16_t)tp;
}

/* Lowers a row by stages of one option that begin where `source` ends, at the least for each stop: a moving window.
   `rest` is what all layers from one on cost at least, `limit` the most that a sum may come to. */
static void extend(const struct stages *s, int n, int tp, const double *source, int source_first, int source_last,
                   double hop_cost, const double *rest, double limit, struct row *row)
{
    int16_t starts[MOST_LAYERS + 1];
    double keys[MOST_LAYERS + 1];
    int head = 0, tail = 0;
    if (source_last > n - 1)
        source_last = n - 1;
    if (source_first > source_last)
        return;
    int stop = source_first + 1 > row->first ? source_first + 1 : row->first;
    const int last = s->last_stop[source_last] > source_last ? s->last_stop[source_last] : source_last;
    int start = stop <= n && s->first_start[stop] > source_first ? s->first_start[stop] : source_first;
    for (; stop <= last; stop++) {
        for (; start < stop && start <= source_last; start++) {
            if (source[start] + rest[start] > limit)
                continue;
            const double key = source[start] - s->cost[start];
            while (tail > head && keys[tail - 1] >= key)
                tail--;
            keys[tail] = key;
            starts[tail++] = (int16_t)start;
        }
        while (head < tail && starts[head] < s->first_start[stop])
            head++;
        if (head < tail)
            lower(row, stop, keys[head] + hop_cost + s->cost[stop] + s->fixed_cost + (stop == n ? s->head_cost : 0.0),
                  starts[head], tp);
    }
}

/* The same for the first stage of a pipeline. */
static void begin(const struct stages *s, int n, int tp, struct row *row)
{
    const int last = s->is_zero_whole ? n : s->zero_stop;
    for (int stop = row->first > 1 ? row->first : 1; stop <= last; stop++)
        lower(row, stop, cost_of(s, n, 0, stop), 0, tp);
}

static void weigh(struct graph *g, const struct step *step, const double *params, double step_weight, double prompt_weight)
{
    const struct tables *t = g->tables;
    const struct step prompt = {PREFILL, 1.0, 0.0};
    for (int i = 0; i < g->n_used; i++) {
        struct stages *s = &g->stages[g->used[i]];
        const struct option *o = &t->options[g->used[i]];
        memset(s->cost, 0, sizeof(double) * (t->n_layers + 1));
        s->fixed_cost = s->head_cost = 0;
        if (step_weight)
            add_seconds(t, o, step, params, step_weight, s->cost, &s->fixed_cost, &s->head_cost);
        if (prompt_weight)
            add_seconds(t, o, &prompt, params, prompt_weight, s->cost, &s->fixed_cost, &s->head_cost);
    }
}

static int unwind(struct graph *g, int state, int stop)
{
    const int width = g->tables->n_layers + 1;
    int n_stages = 0;
    while (state >= 0) {
        const int at = g->visit_of[state];
        const struct visit *v = &g->visits[at];
        const int start = g->start_of[state * width + stop], tp = g->tp_of[state * width + stop];
        g->stack[n_stages++] = (struct placed){at, tp, start, stop};
        const int taken = state - v->first_state + 1;
        state = tp < taken ? state - tp : v->is_first ? -1 : g->entered[at * width + start];
        stop = start;
    }
    return n_stages;
}

/* What the layers from each on cost at least, each on the option that takes it soonest. */
static void find_rest(struct graph *g)
{
    const int n = g->tables->n_layers;
    g->rest[n] = 0;
    for (int l = n - 1; l >= 0; l--) {
        double least = INFINITY;
        for (int i = 0; i < g->n_used; i++) {
            const double *cost = g->stages[g->used[i]].cost;
            least = fmin(least, cost[l + 1] - cost[l]);
        }
        g->rest[l] = g->rest[l + 1] + least;
    }
}

/* Costs of entering a visit, by layers placed. Returns the last that is set; the first is *first. */
static int enter(struct graph *g, int at, const struct step *step, double slowest_s, double weight, double bytes, int *first)
{
    const struct visit *v = &g->visits[at];
    const int n = g->tables->n_layers, width = n + 1;
    int32_t *entered = g->entered + (size_t)at * width;
    int last = 0;
    *first = n + 1;
    for (int i = 0; i < v->n_entries; i++) {
        const int before = v->entries[i].visit;
        if (v->entries[i].hop.byte_s * step->payload <= slowest_s && g->leaving_first[before] <= g->leaving_last[before]) {
            *first = *first < g->leaving_first[before] ? *first : g->leaving_first[before];
            last = last > g->leaving_last[before] ? last : g->leaving_last[before];
        }
    }
    for (int l = *first; l <= last; l++)
        g->entry[l] = INFINITY;
    for (int i = 0; i < v->n_entries; i++) {
        const struct entry *e = &v->entries[i];
        if (e->hop.byte_s * step->payload > slowest_s)
            continue;
        const double hop_cost = weight * e->hop.delay_s + bytes * e->hop.byte_s;
        const double *source = g->leaving + (size_t)e->visit * width;
        const int32_t *by = g->left_by + (size_t)e->visit * width;
        for (int l = g->leaving_first[e->visit]; l <= g->leaving_last[e->visit]; l++)
            if (source[l] + hop_cost < g->entry[l])
                g->entry[l] = source[l] + hop_cost, entered[l] = by[l];
    }
    return last;
}

/* The layout with the least weighted sum of the step's way around and of a prompt's, if that is within the limit;
   *least is that sum. */
static bool soonest(struct graph *g, const struct step *step, const double *params, double slowest_s, double step_weight,
                    double prompt_weight, double limit, struct fit *fit, double *least)
{
    const struct tables *t = g->tables;
    const int n = t->n_layers, width = n + 1;
    const double bytes = step_weight * step->payload + prompt_weight * payload_of(t, PREFILL, 1.0);
    const double weight = step_weight + prompt_weight;
    const double inside_cost = weight * g->inside.delay_s + bytes * g->inside.byte_s;
    const bool may_stay = g->inside.byte_s * step->payload <= slowest_s;
    double best = INFINITY, alone = INFINITY;
    int best_state = -1, alone_visit = -1, alone_tp = 0;
    weigh(g, step, params, step_weight, prompt_weight);
    find_rest(g);
    find_needs(g, step, slowest_s);
    for (int at = 0; at < g->n_visits; at++) {
        const struct visit *v = &g->visits[at];
        double *leaving = g->leaving + (size_t)at * width;
        int32_t *left_by = g->left_by + (size_t)at * width;
        int entry_first, leaving_first = n + 1, leaving_last = 0;
        const int entry_last = enter(g, at, step, slowest_s, weight, bytes, &entry_first);
        for (int taken = 1; taken <= v->n_devices; taken++) {
            const int state = v->first_state + taken - 1;
            struct row row = {g->sums + (size_t)state * width, g->start_of + (size_t)state * width,
                              g->tp_of + (size_t)state * width, g->need[state], g->need[state] - 1};
            for (int i = 0; i < v->n_options; i++) {
                const struct stages *s = &g->stages[v->options[i]];
                const int tp = t->options[v->options[i]].tp;
                if (tp == taken && v->is_first) {
                    begin(s, n, tp, &row);
                    if (s->is_zero_whole && cost_of(s, n, 0, n) < alone)
                        alone = cost_of(s, n, 0, n), alone_visit = at, alone_tp = tp;
                } else if (tp == taken) {
                    extend(s, n, tp, g->entry, entry_first, entry_last, 0.0, g->rest, limit, &row);
                } else if (tp < taken && may_stay) {
                    extend(s, n, tp, g->sums + (size_t)(state - tp) * width, g->row_first[state - tp], g->row_last[state - tp],
                           inside_cost, g->rest, limit, &row);
                }
            }
            g->row_first[state] = row.first;
            g->row_last[state] = row.last;
            if (row.first > row.last)
                continue;
            const int low = leaving_first < row.first ? leaving_first : row.first;
            const int high = leaving_last > row.last ? leaving_last : row.last;
            for (int l = low; l <= high; l++)
                if (l < leaving_first || l > leaving_last)
                    leaving[l] = INFINITY;
            leaving_first = low, leaving_last = high;
            for (int l = row.first; l <= row.last; l++)
                if (row.sums[l] < leaving[l])
                    leaving[l] = row.sums[l], left_by[l] = state;
        }
        if (v->has_back && leaving_last == n && leaving[n] + weight * v->back_s < best)
            best = leaving[n] + weight * v->back_s, best_state = left_by[n];
        g->leaving_first[at] = leaving_first;
        g->leaving_last[at] = leaving_last < n ? leaving_last : n - 1;
    }
    *least = fmin(best, alone);
    if (!(*least <= limit) || *least == INFINITY)
        return false;
    int n_stages = 1;
    if (alone <= best)
        g->stack[0] = (struct placed){alone_visit, alone_tp, 0, n};
    else
        n_stages = unwind(g, best_state, n);
    *fit = figures_of(g, step, n_stages);
    return true;
}

/* --- within limits --- */

static bool is_in_time(const struct graph *g, const struct step *step, const struct fit *fit, double around_s)
{
    if (fit->around_s > around_s)
        return false;
    return step->role != MIXED || g->tables->ttft_s == INFINITY || first_token_s(g, fit->n_stages) <= g->tables->ttft_s;
}

/* Both ways in time: the least weighted sum of them, for several weights. */
static bool both_in_time(struct graph *g, const struct step *step, const double *params, double slowest_s, double around_s,
                         struct fit *fit)
{
    double low = 0, high = 1, least;
    const double ttft_s = g->tables->ttft_s;
    if (!soonest(g, step, params, slowest_s, 0.0, 1.0, ttft_s * (1 + ROUNDING), fit, &least))
        return false;
    for (int i = 0; i < WEIGHTS; i++) {
        if (is_in_time(g, step, fit, around_s))
            return true;
        const double weight = (low + high) / 2;
        if (!soonest(g, step, params, slowest_s, (1 - weight) / around_s, weight / ttft_s, 1 + ROUNDING, fit, &least))
            return false; /* no layout keeps both */
        if (fit->around_s <= around_s)
            low = weight;
        else
            high = weight;
    }
    return false;
}

/* All layers on the options that take them soonest: no way around is shorter. */
static double shortest_s(const struct graph *g)
{
    const int n = g->tables->n_layers;
    double sum = 0;
    for (int l = 0; l < n; l++) {
        double least = INFINITY;
        for (int i = 0; i < g->n_used; i++) {
            const double *before = g->stages[g->used[i]].before;
            least = fmin(least, before[l + 1] - before[l]);
        }
        sum += least;
    }
    return sum;
}

static bool find_fit(struct graph *g, const struct step *step, const double *params, double resident, double slowest_s,
                     double around_s, struct fit *fit)
{
    double least;
    if (around_s < INFINITY && shortest_s(g) > around_s)
        return false;
    mask(g, resident, slowest_s);
    bool has_gaps = !g->is_complete;
    if (furthest(g, step, slowest_s, false, &has_gaps, fit)) {
        if (is_in_time(g, step, fit, around_s))
            return true;
    } else if (!has_gaps || !furthest(g, step, slowest_s, true, &has_gaps, fit)) {
        return false;
    }
    if (!soonest(g, step, params, slowest_s, 1.0, 0.0, around_s * (1 + ROUNDING), fit, &least) || fit->around_s > around_s)
        return false;
    return is_in_time(g, step, fit, around_s) || both_in_time(g, step, params, slowest_s, around_s, fit);
}

struct ask {
    struct step step;
    double resident, n_groups, period_s, around_s;
};

static bool run_fit(struct graph *g, const struct ask *ask, struct fit *fit)
{
    double params[MOST_KINDS];
    prepare(g, &ask->step, params);
    if (!find_fit(g, &ask->step, params, ask->resident, ask->period_s, ask->around_s, fit))
        return false;
    memcpy(g->found, g->stack, sizeof *g->found * fit->n_stages);
    return true;
}

static bool run_tightest(struct graph *g, const struct ask *ask, struct fit *fit)
{
    double params[MOST_KINDS];
    prepare(g, &ask->step, params);
    double low = 0, high = INFINITY, period_s = ask->period_s;
    for (int i = 0; i < MOST_BISECTIONS; i++) {
        struct fit found;
        const double around_s = fmin(ask->n_groups * period_s, ask->around_s);
        if (find_fit(g, &ask->step, params, ask->resident, period_s, around_s, &found)) {
            *fit = found;
            memcpy(g->found, g->stack, sizeof *g->found * found.n_stages);
            high = fmax(found.slowest_s, found.around_s / ask->n_groups);
        } else if (high == INFINITY) {
            return false;
        } else {
            low = period_s;
        }
        if (high - low <= ROUNDING * high)
            break;
        period_s = (low + high) / 2;
    }
    return true;
}

static bool run_soonest(struct graph *g, const struct ask *ask, struct fit *fit)
{
    double params[MOST_KINDS], least;
    prepare(g, &ask->step, params);
    mask(g, ask->resident, INFINITY);
    if (!soonest(g, &ask->step, params, INFINITY, ask->n_groups, ask->period_s, INFINITY, fit, &least))
        return false;
    memcpy(g->found, g->stack, sizeof *g->found * fit->n_stages);
    return true;
}

/* --- rates of a given layout, as hexmesh/score/capacity.py has them --- */

struct seat {
    const struct option *option;
    int start, stop;
};

struct pipeline {
    const struct tables *tables;
    int n_seats;
    struct seat *seats;
    const struct hop *hops;
    double back_s;
};

static double period_s(const struct pipeline *p, enum role role, double batch, int n_groups)
{
    const struct tables *t = p->tables;
    const struct step step = {role, batch, payload_of(t, role, batch)};
    double params[MOST_KINDS], around_s = p->back_s, slowest_s = 0;
    look_up_params(t, batch, params);
    for (int i = 0; i < p->n_seats; i++) {
        const struct seat *seat = &p->seats[i];
        double seconds = fixed_s(t, seat->option, &step);
        for (int l = seat->start; l < seat->stop;) {
            const int64_t kind = t->kind_of_layer[l];
            int n_alike = 0;
            for (; l < seat->stop && t->kind_of_layer[l] == kind; l++)
                n_alike++;
            seconds += n_alike * layer_s(t, seat->option, &step, params, (int)kind);
        }
        if (seat->stop == t->n_layers)
            seconds += head_s(t, seat->option, &step);
        around_s += seconds;
        slowest_s = fmax(slowest_s, seconds);
        if (i) {
            around_s += p->hops[i - 1].delay_s + p->hops[i - 1].byte_s * step.payload;
            slowest_s = fmax(slowest_s, p->hops[i - 1].byte_s * step.payload);
        }
    }
    return fmax(slowest_s, around_s / n_groups);
}

/* The largest batch that memory and the limit allow, 0 if there is none. */
static double largest_batch(const struct pipeline *p, enum role role, double most, int n_groups, double limit_s, int bisections)
{
    if (limit_s == INFINITY || n_groups * period_s(p, role, most, n_groups) <= limit_s)
        return most;
    if (n_groups * period_s(p, role, 1.0, n_groups) > limit_s)
        return 0.0;
    double low = 1.0, high = most;
    for (int i = 0; i < bisections; i++) {
        const double middle = (low + high) / 2;
        if (n_groups * period_s(p, role, middle, n_groups) <= limit_s)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* --- from Python --- */

static const char TABLES[] = "hexmesh.native.layout.tables", GRAPH[] = "hexmesh.native.layout.graph";

static void free_tables(PyObject *capsule)
{
    struct tables *t = PyCapsule_GetPointer(capsule, TABLES);
    free(t->options);
    free(t->counts);
    free(t->figures);
    free(t);
}

static void *copied(const Py_buffer *buffer)
{
    void *copy = malloc(buffer->len ? buffer->len : 1);
    if (copy)
        memcpy(copy, buffer->buf, buffer->len);
    return copy;
}

enum { N_SCALARS = 4, N_OPTION_FIGURES = 8 };

PyDoc_STRVAR(tables_doc,
             "tables(counts, figures)\n\ncounts (int64): n_layers, n_kinds, n_options, the kind of each layer.\n"
             "figures (float64): bytes of a token, prompt tokens, output tokens, limit to the first token; of each kind\n"
             "parameters, those of experts, the share that one token leaves unused; of each option its devices, 7 times,\n"
             "and 3 times of each kind; of each option the room by start and stop.");

static PyObject *make_tables(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer counts, figures;
    if (!PyArg_ParseTuple(arguments, "y*y*", &counts, &figures))
        return NULL;
    struct tables *t = calloc(1, sizeof *t);
    PyObject *capsule = NULL;
    if (!t || !(t->counts = copied(&counts)) || !(t->figures = copied(&figures))) {
        PyErr_NoMemory();
        goto done;
    }
    const int64_t n_counts = counts.len / 8, n_figures = figures.len / 8;
    if (n_counts < 3 || t->counts[0] < 1 || t->counts[0] > MOST_LAYERS || t->counts[1] < 1 || t->counts[1] > MOST_KINDS ||
        t->counts[2] < 0 || t->counts[2] > MOST_OPTIONS || n_counts != 3 + t->counts[0]) {
        PyErr_SetString(PyExc_ValueError, "wrong counts");
        goto done;
    }
    t->n_layers = (int)t->counts[0], t->n_kinds = (int)t->counts[1], t->n_options = (int)t->counts[2];
    t->kind_of_layer = t->counts + 3;
    for (int l = 0; l < t->n_layers; l++)
        if (t->kind_of_layer[l] < 0 || t->kind_of_layer[l] >= t->n_kinds) {
            PyErr_SetString(PyExc_ValueError, "a layer of no kind");
            goto done;
        }
    const int64_t cuts = (int64_t)(t->n_layers + 1) * (t->n_layers + 1);
    const int64_t of_option = N_OPTION_FIGURES + 3 * t->n_kinds;
    if (n_figures != N_SCALARS + 3 * t->n_kinds + t->n_options * (of_option + cuts)) {
        PyErr_SetString(PyExc_ValueError, "wrong number of figures");
        goto done;
    }
    const double *next = t->figures;
    t->token_bytes = next[0], t->prompt_tokens = next[1], t->output_tokens = next[2], t->ttft_s = next[3];
    next += N_SCALARS;
    t->kinds = (const struct kind *)next;
    next += 3 * t->n_kinds;
    t->options = calloc(t->n_options ? t->n_options : 1, sizeof *t->options);
    if (!t->options) {
        PyErr_NoMemory();
        goto done;
    }
    for (int i = 0; i < t->n_options; i++, next += of_option)
        t->options[i] = (struct option){
            .tp = (int)next[0],
            .read_s = next[1],
            .layer_s = next[2],
            .token_s = next[3],
            .step_s = next[4],
            .head_read_s = next[5],
            .head_flop_s = next[6],
            .prompt_head_s = next[7],
            .kinds = (const struct option_kind *)(next + N_OPTION_FIGURES),
            .room = t->figures + n_figures - (t->n_options - i) * cuts,
        };
    capsule = PyCapsule_New(t, TABLES, free_tables);
done:
    if (!capsule && t) {
        free(t->options);
        free(t->counts);
        free(t->figures);
        free(t);
    }
    PyBuffer_Release(&counts);
    PyBuffer_Release(&figures);
    return capsule;
}

static void drop_graph(struct graph *g)
{
    void *const owned[] = {g->visits,   g->entries, g->counts,  g->used,    g->stages, g->numbers,
                           g->ends,     g->visit_of, g->reach,  g->came_from, g->came_tp, g->sums,
                           g->entry,    g->leaving, g->entered, g->left_by, g->start_of, g->tp_of,
                           g->stack,    g->found,   g->rest,    g->need,    g->row_first, g->row_last,
                           g->leaving_need, g->leaving_first, g->leaving_last};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
    Py_XDECREF(g->tables_capsule);
    free(g);
}

static void free_graph(PyObject *capsule)
{
    drop_graph(PyCapsule_GetPointer(capsule, GRAPH));
}

/* Reads the visits: is_first, has_back, n_devices, n_options, n_entries, the options, the visits entered from. */
static const char *read_visits(struct graph *g, const int64_t *next, const int64_t *stop, const double *hop, const double *last)
{
    int n_entries = 0;
    for (int at = 0; at < g->n_visits; at++) {
        if (stop - next < 5)
            return "too few counts";
        struct visit *v = &g->visits[at];
        *v = (struct visit){.is_first = next[0] != 0, .has_back = next[1] != 0, .first_state = g->n_states};
        if (next[2] < 1 || next[2] > MOST_LAYERS || next[3] < 0 || next[3] > MOST_OPTIONS || next[4] < 0 || next[4] > at ||
            stop - next < 5 + next[3] + next[4])
            return "wrong counts of a visit";
        v->n_devices = (int)next[2], v->n_options = (int)next[3], v->n_entries = (int)next[4];
        v->options = next + 5;
        v->entries = g->entries + n_entries;
        next += 5;
        for (int i = 0; i < v->n_options; i++, next++)
            if (*next < 0 || *next >= g->tables->n_options || g->tables->options[*next].tp < 1)
                return "no such option";
        if (last - hop < 1 + 2 * v->n_entries)
            return "too few figures";
        v->back_s = *hop++;
        for (int i = 0; i < v->n_entries; i++, next++, hop += 2) {
            if (*next < 0 || *next >= at)
                return "a visit before it was";
            g->entries[n_entries++] = (struct entry){(int)*next, {hop[0], hop[1]}};
        }
        g->n_states += v->n_devices;
        if (g->n_states > MOST_STATES)
            return "too many states";
    }
    return next == stop && hop == last ? NULL : "too many counts or figures";
}

static bool make_room(struct graph *g)
{
    const struct tables *t = g->tables;
    const size_t width = (size_t)t->n_layers + 1, states = (size_t)g->n_states, visits = (size_t)g->n_visits;
    bool *is_used = calloc(t->n_options + 1, sizeof *is_used);
    if (!is_used)
        return false;
    for (int at = 0; at < g->n_visits; at++)
        for (int i = 0; i < g->visits[at].n_options; i++)
            is_used[g->visits[at].options[i]] = true;
    g->used = calloc(t->n_options + 1, sizeof *g->used);
    for (int i = 0; g->used && i < t->n_options; i++)
        if (is_used[i])
            g->used[g->n_used++] = i;
    free(is_used);
    g->stages = calloc(t->n_options + 1, sizeof *g->stages);
    g->numbers = calloc(2 * width * g->n_used + 1, sizeof *g->numbers);
    g->ends = calloc(2 * width * g->n_used + 1, sizeof *g->ends);
    g->visit_of = calloc(states + 1, sizeof *g->visit_of);
    g->reach = calloc(states + 1, sizeof *g->reach);
    g->came_from = calloc(states + 1, sizeof *g->came_from);
    g->came_tp = calloc(states + 1, sizeof *g->came_tp);
    g->sums = calloc(states * width + 1, sizeof *g->sums);
    g->start_of = calloc(states * width + 1, sizeof *g->start_of);
    g->tp_of = calloc(states * width + 1, sizeof *g->tp_of);
    g->entry = calloc(width, sizeof *g->entry);
    g->leaving = calloc(visits * width + 1, sizeof *g->leaving);
    g->entered = calloc(visits * width + 1, sizeof *g->entered);
    g->left_by = calloc(visits * width + 1, sizeof *g->left_by);
    g->rest = calloc(width, sizeof *g->rest);
    g->need = calloc(states + 1, sizeof *g->need);
    g->row_first = calloc(states + 1, sizeof *g->row_first);
    g->row_last = calloc(states + 1, sizeof *g->row_last);
    g->leaving_need = calloc(visits + 1, sizeof *g->leaving_need);
    g->leaving_first = calloc(visits + 1, sizeof *g->leaving_first);
    g->leaving_last = calloc(visits + 1, sizeof *g->leaving_last);
    g->stack = calloc(width, sizeof *g->stack);
    g->found = calloc(width, sizeof *g->found);
    if (!(g->used && g->stages && g->numbers && g->ends && g->visit_of && g->reach && g->came_from && g->came_tp &&
          g->sums && g->start_of && g->tp_of && g->entry && g->leaving && g->entered && g->left_by && g->stack && g->found && g->rest && g->need &&
          g->row_first && g->row_last && g->leaving_need && g->leaving_first && g->leaving_last))
        return false;
    for (int i = 0; i < g->n_used; i++) {
        struct stages *s = &g->stages[g->used[i]];
        s->before = g->numbers + 2 * i * width, s->cost = s->before + width;
        s->last_stop = g->ends + 2 * i * width, s->first_start = s->last_stop + width;
    }
    for (int at = 0; at < g->n_visits; at++)
        for (int i = 0; i < g->visits[at].n_devices; i++)
            g->visit_of[g->visits[at].first_state + i] = at;
    return true;
}

PyDoc_STRVAR(graph_doc,
             "graph(tables, counts, figures)\n\ncounts (int64): the number of visits, whether all have a way to all; of each whether it is a first, has a\n"
             "way back, its devices, options and entries, then which options and which visits before it.\n"
             "figures (float64): delay and seconds a byte inside a pool; of each visit the delay back, then the two of\n"
             "each entry.");

static PyObject *make_graph(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *tables_capsule, *capsule = NULL;
    Py_buffer counts, figures;
    if (!PyArg_ParseTuple(arguments, "Oy*y*", &tables_capsule, &counts, &figures))
        return NULL;
    struct graph *g = NULL;
    const struct tables *t = PyCapsule_GetPointer(tables_capsule, TABLES);
    if (!t)
        goto done;
    if (!(g = calloc(1, sizeof *g))) {
        PyErr_NoMemory();
        goto done;
    }
    g->tables = t;
    g->tables_capsule = Py_NewRef(tables_capsule);
    const int64_t n_counts = counts.len / 8, n_figures = figures.len / 8;
    if (!(g->counts = copied(&counts))) {
        PyErr_NoMemory();
        goto done;
    }
    if (n_counts < 2 || g->counts[0] < 0 || g->counts[0] > n_counts || n_figures < 2) {
        PyErr_SetString(PyExc_ValueError, "wrong counts");
        goto done;
    }
    const double *hops = figures.buf;
    g->n_visits = (int)g->counts[0];
    g->is_complete = g->counts[1] != 0;
    g->inside = (struct hop){hops[0], hops[1]};
    g->visits = calloc(g->n_visits + 1, sizeof *g->visits);
    g->entries = calloc(n_counts, sizeof *g->entries);
    if (!g->visits || !g->entries) {
        PyErr_NoMemory();
        goto done;
    }
    const char *fault = read_visits(g, g->counts + 2, g->counts + n_counts, hops + 2, hops + n_figures);
    if (fault) {
        PyErr_SetString(PyExc_ValueError, fault);
        goto done;
    }
    if (!make_room(g)) {
        PyErr_NoMemory();
        goto done;
    }
    capsule = PyCapsule_New(g, GRAPH, free_graph);
done:
    if (!capsule && g)
        drop_graph(g);
    PyBuffer_Release(&counts);
    PyBuffer_Release(&figures);
    return capsule;
}

/* (slowest_s, around_s, room, visit, tp, start, stop of every stage), or None. */
static PyObject *answer(const struct graph *g, const struct fit *fit)
{
    PyObject *found = PyTuple_New(3 + 4 * (Py_ssize_t)fit->n_stages);
    if (!found)
        return NULL;
    PyTuple_SET_ITEM(found, 0, PyFloat_FromDouble(fit->slowest_s));
    PyTuple_SET_ITEM(found, 1, PyFloat_FromDouble(fit->around_s));
    PyTuple_SET_ITEM(found, 2, PyFloat_FromDouble(fit->room));
    for (int i = 0; i < fit->n_stages; i++) {
        const struct placed *p = &g->found[i];
        const int values[] = {p->visit, p->tp, p->start, p->stop};
        for (int j = 0; j < 4; j++)
            PyTuple_SET_ITEM(found, 3 + 4 * i + j, PyLong_FromLong(values[j]));
    }
    if (PyErr_Occurred())
        Py_CLEAR(found);
    return found;
}

static PyObject *asked(PyObject *const *arguments, Py_ssize_t n, bool (*run)(struct graph *, const struct ask *, struct fit *))
{
    if (n != 7)
        return PyErr_Format(PyExc_TypeError, "takes 7 arguments");
    struct graph *g = PyCapsule_GetPointer(arguments[0], GRAPH);
    if (!g)
        return NULL;
    const long role = PyLong_AsLong(arguments[1]);
    double figures[5];
    for (int i = 0; i < 5; i++)
        figures[i] = PyFloat_AsDouble(arguments[2 + i]);
    if (PyErr_Occurred())
        return NULL;
    if (role < 0 || role >= N_ROLES)
        return PyErr_Format(PyExc_ValueError, "no such role");
    if (g->is_busy)
        return PyErr_Format(PyExc_RuntimeError, "the graph is in use");
    struct ask ask = {
        .step = {(enum role)role, figures[0], payload_of(g->tables, (enum role)role, figures[0])},
        .resident = figures[1],
        .n_groups = figures[2],
        .period_s = figures[3],
        .around_s = figures[4],
    };
    struct fit fit;
    bool is_found;
    g->is_busy = true;
    Py_BEGIN_ALLOW_THREADS
    is_found = run(g, &ask, &fit);
    Py_END_ALLOW_THREADS
    g->is_busy = false;
    if (!is_found)
        Py_RETURN_NONE;
    return answer(g, &fit);
}

PyDoc_STRVAR(fit_doc, "fit(graph, role, batch, resident, 0.0, slowest_s, around_s)\n\nAny layout within both limits.");

static PyObject *fit(PyObject *module, PyObject *const *arguments, Py_ssize_t n)
{
    (void)module;
    return asked(arguments, n, run_fit);
}

PyDoc_STRVAR(tightest_doc, "tightest(graph, role, batch, resident, n_groups, period_s, around_s)\n\nThe layout with the "
                           "least max(slowest, around / n_groups) of those within period_s and around_s.");

static PyObject *tightest(PyObject *module, PyObject *const *arguments, Py_ssize_t n)
{
    (void)module;
    return asked(arguments, n, run_tightest);
}

PyDoc_STRVAR(soonest_doc, "soonest(graph, role, batch, resident, step_weight, prompt_weight, 0.0)\n\nThe layout with the "
                          "least weighted sum of the step's way around and a prompt's.");

static PyObject *soonest_of(PyObject *module, PyObject *const *arguments, Py_ssize_t n)
{
    (void)module;
    return asked(arguments, n, run_soonest);
}

PyDoc_STRVAR(rate_doc, "rate(tables, role, seats, hops, limit_s, most_groups, most_batch, bisections)\n\n"
                       "(batch, n_groups, period_s) of the highest rate of a layout, batch 0 if there is none.\n"
                       "seats (int64): option, start and stop of each; hops (float64): delay and seconds a byte of each,\n"
                       "and the delay back.");

static PyObject *rate(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *capsule, *result = NULL;
    int role, most_groups, bisections;
    double limit_s, most_batch;
    Py_buffer seats, hops;
    if (!PyArg_ParseTuple(arguments, "Oiy*y*didi", &capsule, &role, &seats, &hops, &limit_s, &most_groups, &most_batch,
                          &bisections))
        return NULL;
    const struct tables *t = PyCapsule_GetPointer(capsule, TABLES);
    struct pipeline p = {.tables = t, .n_seats = (int)(seats.len / 24)};
    const int64_t *counts = seats.buf;
    const double *figures = hops.buf;
    if (!t)
        goto done;
    if (role < 0 || role >= N_ROLES || p.n_seats < 1 || p.n_seats > t->n_layers || seats.len % 24 ||
        hops.len != 8 * (2 * (p.n_seats - 1) + 1)) {
        PyErr_SetString(PyExc_ValueError, "wrong counts");
        goto done;
    }
    if (!(p.seats = calloc(p.n_seats, sizeof *p.seats))) {
        PyErr_NoMemory();
        goto done;
    }
    double resident = INFINITY;
    for (int i = 0; i < p.n_seats; i++, counts += 3) {
        if (counts[0] < 0 || counts[0] >= t->n_options || counts[1] < 0 || counts[1] >= counts[2] || counts[2] > t->n_layers) {
            PyErr_SetString(PyExc_ValueError, "no such option or layers");
            goto done;
        }
        p.seats[i] = (struct seat){&t->options[counts[0]], (int)counts[1], (int)counts[2]};
        resident = fmin(resident, p.seats[i].option->room[counts[1] * (t->n_layers + 1) + counts[2]]);
    }
    p.hops = (const struct hop *)figures;
    p.back_s = figures[2 * (p.n_seats - 1)];
    double best = 0, best_batch = 0, best_period_s = 1;
    int best_groups = 1;
    for (int n = 1; n <= most_groups && n <= resident; n++) {
        const double batch = largest_batch(&p, (enum role)role, fmin(resident / n, most_batch), n, limit_s, bisections);
        const double period = period_s(&p, (enum role)role, batch, n);
        if (batch / period > best)
            best = batch / period, best_batch = batch, best_period_s = period, best_groups = n;
    }
    result = Py_BuildValue("did", best_batch, best_groups, best_period_s);
done:
    free(p.seats);
    PyBuffer_Release(&seats);
    PyBuffer_Release(&hops);
    return result;
}

static PyMethodDef METHODS[] = {
    {"rate", rate, METH_VARARGS, rate_doc},
    {"tables", make_tables, METH_VARARGS, tables_doc},
    {"graph", make_graph, METH_VARARGS, graph_doc},
    {"fit", (PyCFunction)(void (*)(void))fit, METH_FASTCALL, fit_doc},
    {"tightest", (PyCFunction)(void (*)(void))tightest, METH_FASTCALL, tightest_doc},
    {"soonest", (PyCFunction)(void (*)(void))soonest_of, METH_FASTCALL, soonest_doc},
    {0},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "hexmesh.native.layout",
    .m_doc = "Layouts of teams, for the planner.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit_layout(void)
{
    return PyModule_Create(&MODULE);
}
