/* A few threads for one loop at a time. They sleep between loops, so that they take nothing from torch's threads.

   The caller works too and never waits for a thread that is still waking up: whoever comes late finds nothing left
   to do. A second caller meanwhile runs its loop alone. */

#ifndef HEXMESH_THREADS_H
#define HEXMESH_THREADS_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

enum { MOST_THREADS = 256 };

typedef void (*loop_body)(void *context, int index);

struct loop {
    loop_body body;
    void *context;
    int n;
    atomic_int next;
    int seats;  /* threads that may still join */
    int active; /* threads that have joined and not left */
};

static struct {
    pthread_mutex_t in_use; /* held by the one caller whose loop it is */
    pthread_mutex_t lock;   /* of what follows */
    pthread_cond_t wake, idle;
    struct loop *loop;
    int n_workers;
} crew = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
          PTHREAD_COND_INITIALIZER,  NULL,                      0};

static void work_on(struct loop *loop)
{
    int index;
    while ((index = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed)) < loop->n)
        loop->body(loop->context, index);
}

static void *crew_member(void *unused)
{
    pthread_mutex_lock(&crew.lock);
    for (;;) {
        while (crew.loop == NULL || crew.loop->seats == 0)
            pthread_cond_wait(&crew.wake, &crew.lock);
        struct loop *loop = crew.loop;
        loop->seats--;
        loop->active++;
        pthread_mutex_unlock(&crew.lock);
        work_on(loop);
        pthread_mutex_lock(&crew.lock);
        if (--loop->active == 0)
            pthread_cond_signal(&crew.idle);
    }
    return unused;
}

/* With the lock held. A thread that cannot be had is done without. */
static void hire(int n_workers)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the interpreter's */
    while (crew.n_workers < n_workers && crew.n_workers < MOST_THREADS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, crew_member, NULL) != 0)
            break;
        pthread_detach(thread);
        crew.n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* body(context, 0 .. n - 1), each once, on up to n_threads threads; what they wrote is visible on return. */
static void run_loop(loop_body body, void *context, int n, int n_threads)
{
    struct loop loop = {.body = body, .context = context, .n = n};
    const int n_others = (n_threads < n ? n_threads : n) - 1;
    if (n_others < 1 || pthread_mutex_trylock(&crew.in_use) != 0) {
        work_on(&loop);
        return;
    }
    pthread_mutex_lock(&crew.lock);
    hire(n_others);
    loop.seats = n_others;
    crew.loop = &loop;
    for (int i = 0; i < n_others; i++)
        pthread_cond_signal(&crew.wake);
    pthread_mutex_unlock(&crew.lock);
    work_on(&loop);
    pthread_mutex_lock(&crew.lock);
    crew.loop = NULL;
    while (loop.active > 0)
        pthread_cond_wait(&crew.idle, &crew.lock);
    pthread_mutex_unlock(&crew.lock);
    pthread_mutex_unlock(&crew.in_use);
}

/* A forked child has none of its parent's threads, and its locks may be in any state. */
static void forget_crew(void)
{
    pthread_mutex_init(&crew.in_use, NULL);
    pthread_mutex_init(&crew.lock, NULL);
    pthread_cond_init(&crew.wake, NULL);
    pthread_cond_init(&crew.idle, NULL);
    crew.loop = NULL;
    crew.n_workers = 0;
}

static bool prepare_crew(void)
{
    return pthread_atfork(NULL, NULL, forget_crew) == 0;
}

#endif
