/* Attention over paged KV: stores a step's new keys and values in the pool and answers all its queries from there.

   Addresses come as integers and are trusted to hold what the counts beside them say; block tables and rows are checked
   against the pool, so that a wrong one is an error and never a stray access. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "attention.h"
#include "threads.h"

enum {
    WORTH_THREADS = 1 << 20, /* multiplications from which on waking a thread gains */
    PIECES_A_THREAD = 8,     /* more even, but what comes next is known only within a piece */
    STORE_TOKENS = 64,       /* new tokens that are stored as one piece of work */
};

#define JOIN(a, b) a##b

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_SETS 1

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define LANES 16
#define ROWS 6
#define COLUMNS 4
#define EACH_LANE(f, w)                                                                                                \
    f(w, 0), f(w, 1), f(w, 2), f(w, 3), f(w, 4), f(w, 5), f(w, 6), f(w, 7), f(w, 8), f(w, 9), f(w, 10), f(w, 11),      \
        f(w, 12), f(w, 13), f(w, 14), f(w, 15)
#define NAME(name) JOIN(avx512_, name)
#include "attention_kernel.h"
#undef LANES
#undef ROWS
#undef COLUMNS
#undef EACH_LANE
#undef NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define ROWS 6
#define COLUMNS 2
#define EACH_LANE(f, w) f(w, 0), f(w, 1), f(w, 2), f(w, 3), f(w, 4), f(w, 5), f(w, 6), f(w, 7)
#define NAME(name) JOIN(avx2_, name)
#include "attention_kernel.h"
#undef LANES
#undef ROWS
#undef COLUMNS
#undef EACH_LANE
#undef NAME
#pragma GCC pop_options
#endif

#define LANES 4
#define ROWS 4
#define COLUMNS 2
#define EACH_LANE(f, w) f(w, 0), f(w, 1), f(w, 2), f(w, 3)
#define NAME(name) JOIN(generic_, name)
#include "attention_kernel.h"

struct kernel {
    const char *name;
    int lanes;
    size_t (*item_floats)(const struct call *, int n_rows);
    void (*run_item)(const struct call *, const struct item *, const struct item *next, float *room);
    bool is_supported;
};

/* Best first; a kernel also needs dimensions of as many elements as it has lanes. */
static struct kernel KERNELS[] = {
#ifdef HAS_X86_SETS
    {"avx512", 16, avx512_item_floats, avx512_run_item, false},
    {"avx2", 8, avx2_item_floats, avx2_run_item, false},
#endif
    {"generic", LANES, generic_item_floats, generic_run_item, true},
};
enum { N_KERNELS = sizeof KERNELS / sizeof *KERNELS };
static int best = 0; /* the first kernel that may be used */

static void look_at_cpu(void)
{
#ifdef HAS_X86_SETS
    __builtin_cpu_init();
    KERNELS[0].is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    KERNELS[1].is_supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    while (!KERNELS[best].is_supported)
        best++;
}

static const struct kernel *kernel_for(const struct call *call)
{
    for (int i = best; i < N_KERNELS; i++)
        if (KERNELS[i].is_supported && KERNELS[i].lanes <= least(call->k_dim, call->v_dim))
            return &KERNELS[i];
    return NULL;
}

/* Memory of the calling thread, kept from call to call. NULL where there is none to be had. */
static pthread_key_t thread_memory;
static _Thread_local struct {
    float *at;
    size_t n;
} memory;

static float *thread_floats(size_t n)
{
    if (n > memory.n) {
        free(memory.at);
        memory.at = aligned_alloc(ALIGNMENT, (n * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        memory.n = memory.at ? n : 0;
        pthread_setspecific(thread_memory, memory.at); /* freed when the thread ends */
    }
    return memory.at;
}

/* One call at work. */
struct work {
    struct call call;
    const struct kernel *kernel;
    struct item *items;
    int n_items, most_rows;
    int *pieces; /* first item of each piece, and n_items */
    atomic_bool is_out_of_memory;
};

/* One sequence's overflow must not reach others, also after its blocks have become theirs: a NaN or an infinity is
   stored as 0. */
static void copy_finite(const void *from, void *to, int n, bool is_bf16)
{
    if (is_bf16)
        for (int i = 0; i < n; i++) {
            const uint16_t bits = ((const uint16_t *)from)[i];
            ((uint16_t *)to)[i] = (bits & 0x7f80) == 0x7f80 ? 0 : bits;
        }
    else
        for (int i = 0; i < n; i++) {
            const uint32_t bits = ((const uint32_t *)from)[i];
            ((uint32_t *)to)[i] = (bits & 0x7f800000) == 0x7f800000 ? 0 : bits;
        }
}

static void store_head(
    const struct call *call, const struct heads *new, void *pool, int dim, size_t slot, int token, int head)
{
    const size_t size = call->is_bf16 ? 2 : 4;
    const ptrdiff_t from = token * new->token_stride + head * new->head_stride;
    copy_finite((const char *)new->at + from * (ptrdiff_t)size, (char *)pool + slot * dim * size, dim, call->is_bf16);
}

/* Put STORE_TOKENS tokens of each row into their slots. */
static void store_piece(void *context, int piece)
{
    const struct call *call = &((struct work *)context)->call;
    for (int r = 0; r < call->n_rows; r++) {
        const struct row *row = call->rows + r;
        const int stop = least(row->n_tokens, (piece + 1) * STORE_TOKENS);
        for (int t = piece * STORE_TOKENS; t < stop; t++)
            for (int head = 0; head < call->n_kv_heads; head++) {
                const size_t slot = slot_of(call, row, head, row->position + t);
                store_head(call, &call->key, call->k_pool, call->k_dim, slot, row->first_token + t, head);
                store_head(call, &call->value, call->v_pool, call->v_dim, slot, row->first_token + t, head);
            }
    }
}

static void attend_piece(void *context, int piece)
{
    struct work *work = context;
    float *room = thread_floats(work->kernel->item_floats(&work->call, work->most_rows));
    if (!room) {
        work->is_out_of_memory = true;
        return;
    }
    const struct item *last = work->items + work->pieces[piece + 1] - 1;
    for (const struct item *item = work->items + work->pieces[piece]; item <= last; item++)
        work->kernel->run_item(&work->call, item, item < last ? item + 1 : NULL, room);
}

/* How a row is cut into items: blocks of queries, and parts of the context where the rows of scores are few. */
struct cut {
    int n_queries, n_blocks;
};

static struct cut cut_of(const struct call *call, const struct row *row)
{
    const int n_queries = least(row->n_tokens, most(1, MOST_ROWS / heads_per_kv(call)));
    return (struct cut){n_queries, (row->n_tokens + n_queries - 1) / n_queries};
}

/* The context of a block of queries, as an item for no head yet. */
static struct item block_of(const struct call *call, int row, struct cut cut, int block)
{
    const struct row *of = call->rows + row;
    const int first = block * cut.n_queries, n = least(cut.n_queries, of->n_tokens - first);
    return (struct item){
        .row = row,
        .first = first,
        .n_queries = n,
        .start = first_seen(call, of->position + first),
        .stop = of->position + first + n,
        .partial = -1,
    };
}

/* Parts are of a fixed size, so that an answer does not depend on threads or on the rest of the batch. */
static int parts_of(const struct call *call, const struct item *block)
{
    if (block->n_queries * heads_per_kv(call) > FEW_ROWS)
        return 1;
    return (block->stop - block->start + PART_TOKENS - 1) / PART_TOKENS;
}

/* Items of all heads over a block's context; returns how many, and counts `n_partial` on. Nothing is written where
   `to` is NULL. */
static int add_items(const struct call *call, struct item block, int head, struct item *to, ptrdiff_t *n_partial)
{
    const int n_parts = parts_of(call, &block), stop = block.stop;
    block.kv_head = head;
    for (int part = 0; part < n_parts; part++, block.start += PART_TOKENS) {
        block.stop = n_parts == 1 ? stop : least(stop, block.start + PART_TOKENS);
        if (n_parts > 1) {
            block.partial = *n_partial;
            *n_partial += block.n_queries * heads_per_kv(call) * (call->v_dim + 2);
        }
        if (to)
            to[part] = block;
    }
    return n_parts;
}

/* All items, or their number alone; a head's keys and values are kept in cache over its blocks of queries, the longest
   of which come first. */
static int list_items(const struct call *call, struct item *items, ptrdiff_t *n_partial)
{
    int n = 0;
    *n_partial = 0;
    for (int row = 0; row < call->n_rows; row++) {
        const struct cut cut = cut_of(call, call->rows + row);
        for (int head = 0; head < call->n_kv_heads; head++)
            for (int block = cut.n_blocks - 1; block >= 0; block--)
                n += add_items(call, block_of(call, row, cut, block), head, items ? items + n : NULL, n_partial);
    }
    return n;
}

static bool is_same_block(const struct item *a, const struct item *b)
{
    return a->row == b->row && a->kv_head == b->kv_head && a->first == b->first;
}

/* Put the parts of one context together. */
static void merge(const struct call *call, const struct item *parts, int n_parts)
{
    const int group = heads_per_kv(call), width = call->v_dim + 2;
    for (int r = 0; r < parts->n_queries * group; r++) {
        float *first = call->partial + parts->partial + (ptrdiff_t)r * width;
        for (int part = 1; part < n_parts; part++) {
            const float *other = call->partial + parts[part].partial + (ptrdiff_t)r * width;
            const float peak = other[0] > first[0] ? other[0] : first[0];
            const float own_share = exp2f(first[0] - peak), share = exp2f(other[0] - peak);
            first[0] = peak;
            for (int i = 1; i < width; i++)
                first[i] = first[i] * own_share + other[i] * share;
        }
        finish(call, first + 2, first[0], first[1],
               call->rows[parts->row].first_token + parts->first + r / group, parts->kv_head * group + r % group);
    }
}

static void merge_all(const struct work *work)
{
    int n_parts;
    for (int i = 0; i < work->n_items; i += n_parts) {
        n_parts = 1;
        while (i + n_parts < work->n_items && is_same_block(work->items + i, work->items + i + n_parts))
            n_parts++;
        if (work->items[i].partial >= 0)
            merge(&work->call, work->items + i, n_parts);
    }
}

static int threads_for(const struct work *work, double multiplications)
{
    return multiplications < WORTH_THREADS ? 1 : work->call.n_threads;
}

static double multiplications(const struct call *call, const struct item *item)
{
    const double n_scores = (double)(item->stop - item->start) * item->n_queries * heads_per_kv(call);
    return n_scores * (call->k_dim + call->v_dim);
}

/* Cut the items into runs of about equal work, a few for each thread; returns how many. */
static int cut_pieces(struct work *work, int n_threads, double all)
{
    const double share = all / (n_threads == 1 ? 1 : n_threads * PIECES_A_THREAD);
    double held = 0;
    int n = 0;
    work->pieces[0] = 0;
    for (int i = 0; i < work->n_items; i++) {
        held += multiplications(&work->call, work->items + i);
        if (held >= share || i == work->n_items - 1) {
            work->pieces[++n] = i + 1;
            held = 0;
        }
    }
    return n;
}

static void attend_all(struct work *work)
{
    double all = 0;
    for (int i = 0; i < work->n_items; i++) {
        all += multiplications(&work->call, work->items + i);
        work->most_rows = most(work->most_rows, work->items[i].n_queries * heads_per_kv(&work->call));
    }
    const int n_threads = threads_for(work, all);
    run_loop(attend_piece, work, cut_pieces(work, n_threads, all), n_threads);
}

static void store_all(struct work *work)
{
    const struct call *call = &work->call;
    int longest = 0;
    double n_elements = 0;
    for (int r = 0; r < call->n_rows; r++) {
        longest = most(longest, call->rows[r].n_tokens);
        n_elements += (double)call->rows[r].n_tokens * call->n_kv_heads * (call->k_dim + call->v_dim);
    }
    run_loop(store_piece, work, (longest + STORE_TOKENS - 1) / STORE_TOKENS, threads_for(work, n_elements));
}

/* False where memory is short; then the pool is written and the answer is not. */
static bool run(struct work *work)
{
    struct call *call = &work->call;
    ptrdiff_t n_partial;
    store_all(work);
    work->n_items = list_items(call, NULL, &n_partial);
    work->items = malloc(sizeof *work->items * (size_t)work->n_items);
    work->pieces = malloc(sizeof *work->pieces * ((size_t)work->n_items + 1));
    call->partial = malloc(sizeof *call->partial * (size_t)n_partial + 1);
    if (work->items && work->pieces && call->partial) {
        list_items(call, work->items, &n_partial);
        attend_all(work);
        if (!work->is_out_of_memory)
            merge_all(work);
    } else
        work->is_out_of_memory = true;
    free(work->items);
    free(work->pieces);
    free(call->partial);
    return !work->is_out_of_memory;
}

/* What is wrong with the call; NULL if nothing is. */
static const char *fault_of(const struct call *call, Py_ssize_t n_tokens)
{
    if (least(call->k_dim, call->v_dim) < KERNELS[N_KERNELS - 1].lanes)
        return "heads are too narrow for these kernels";
    if (call->n_kv_heads < 1 || call->n_heads < 1 || call->n_heads % call->n_kv_heads)
        return "query heads are no multiple of the KV heads";
    if (call->block_tokens < 1 || call->n_threads < 1 || call->window < 0)
        return "a count is out of range";
    for (int i = 0; i < call->n_table; i++)
        if (call->tables[i] < 0 || call->tables[i] >= call->n_blocks)
            return "a block is outside the pool";
    for (int r = 0; r < call->n_rows; r++) {
        const struct row *row = call->rows + r;
        if (row->first_token < 0 || row->n_tokens < 1 || row->position < 0 || row->table_at < 0 || row->n_blocks < 0)
            return "a row is out of range";
        if ((Py_ssize_t)row->first_token + row->n_tokens > n_tokens)
            return "a row is outside the batch";
        if ((Py_ssize_t)row->table_at + row->n_blocks > call->n_table)
            return "a row's block table is outside the tables";
        if ((Py_ssize_t)row->position + row->n_tokens > (Py_ssize_t)row->n_blocks * call->block_tokens)
            return "a row is longer than its blocks";
    }
    return NULL;
}

PyDoc_STRVAR(
    attend_doc,
    "attend(k_pool, v_pool, element_bytes, n_blocks, n_kv_heads, block_tokens, k_dim, v_dim, rows, n_rows, tables, "
    "n_table, n_tokens, query, query_head_stride, query_token_stride, key, key_head_stride, key_token_stride, value, "
    "value_head_stride, value_token_stride, out, n_heads, scaling, window, softcap, sinks, n_threads)\n\n"
    "Store the new keys and values (n_kv_heads, n_tokens, dim) in the pools (n_blocks, n_kv_heads, block_tokens, dim), "
    "then write the attention of the queries (n_heads, n_tokens, k_dim) to out (n_tokens, n_heads, v_dim). All are "
    "float32 (element_bytes 4) or bfloat16 (2); last dimensions are dense, strides are in elements. rows: int32 "
    "(n_rows, 5) of first token in the batch, n_tokens, position, begin of the block table in tables, its length. "
    "window, softcap and sinks (float32 (n_heads,)) may be 0.");

enum { N_ARGUMENTS = 29 };

static PyObject *attend(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    (void)module;
    if (n_arguments != N_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "attend() takes %d arguments", N_ARGUMENTS);
    PyObject *const *next = arguments;
#define COUNT() ((int)PyLong_AsLong(*next++))
#define LENGTH() ((ptrdiff_t)PyLong_AsSsize_t(*next++))
#define ADDRESS() (PyLong_AsVoidPtr(*next++))
    struct work work = {0};
    struct call *call = &work.call;
    call->k_pool = ADDRESS();
    call->v_pool = ADDRESS();
    call->is_bf16 = COUNT() == 2;
    call->n_blocks = COUNT();
    call->n_kv_heads = COUNT();
    call->block_tokens = COUNT();
    call->k_dim = COUNT();
    call->v_dim = COUNT();
    call->rows = ADDRESS();
    call->n_rows = COUNT();
    call->tables = ADDRESS();
    call->n_table = COUNT();
    const Py_ssize_t n_tokens = LENGTH();
    struct heads *const tensors[] = {&call->query, &call->key, &call->value};
    for (int i = 0; i < 3; i++) {
        tensors[i]->at = ADDRESS();
        tensors[i]->head_stride = LENGTH();
        tensors[i]->token_stride = LENGTH();
    }
    call->out = ADDRESS();
    call->n_heads = COUNT();
    call->scaling = (float)PyFloat_AsDouble(*next++);
    call->window = COUNT();
    call->softcap = (float)PyFloat_AsDouble(*next++);
    call->sinks = ADDRESS();
    call->n_threads = COUNT();
    if (PyErr_Occurred())
        return NULL;
    const char *fault = fault_of(call, n_tokens);
    if (fault) {
        PyErr_SetString(PyExc_ValueError, fault);
        return NULL;
    }
    work.kernel = kernel_for(call);
    bool is_done;
    Py_BEGIN_ALLOW_THREADS
    is_done = run(&work);
    Py_END_ALLOW_THREADS
    if (!is_done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(instruction_sets_doc, "instruction_sets()\n\nNames of those that this CPU has kernels for, best first.");

static PyObject *instruction_sets(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < N_KERNELS; i++) {
        PyObject *name = KERNELS[i].is_supported ? PyUnicode_FromString(KERNELS[i].name) : NULL;
        if (name && PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyDoc_STRVAR(use_doc, "use(name)\n\nLet kernels of no better instruction set than this one run, for tests.");

static PyObject *use(PyObject *module, PyObject *name)
{
    (void)module;
    for (int i = 0; i < N_KERNELS; i++)
        if (KERNELS[i].is_supported && PyUnicode_Check(name) && !PyUnicode_CompareWithASCIIString(name, KERNELS[i].name)) {
            best = i;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "no kernels for %R here", name);
}

static PyMethodDef METHODS[] = {
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc},
    {"instruction_sets", instruction_sets, METH_NOARGS, instruction_sets_doc},
    {"use", use, METH_O, use_doc},
    {0},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "hexmesh.native.attention",
    .m_doc = "Attention over paged KV on CPUs.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit_attention(void)
{
    look_at_cpu();
    if (pthread_key_create(&thread_memory, free) != 0 || !prepare_crew())
        return PyErr_NoMemory();
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "LEAST_DIM", KERNELS[N_KERNELS - 1].lanes) < 0)
        Py_CLEAR(module);
    return module;
}
