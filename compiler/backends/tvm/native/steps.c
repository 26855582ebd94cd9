// Linked into every kernel library: runs the calls of a step and divides the loops in them among threads.
//
// Kernels, as TVM compiles them, are C functions that take an array of tagged values. They call two functions of their host:
// one that runs a parallel loop, and one that reports an error. Both are here, so a library needs nothing but libc. Threads
// belong to the caller, which lends them to a pool by calling belle_work on each (runtime/executors/native.py). A thread that
// waits prefetches its share of the weights that are read next.

#define _GNU_SOURCE
#include "steps.h"

#include <linux/futex.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  MOST_THREADS = 256,
  SHARES = 8,          // tasks per thread: threads that finish early take tasks that others have not begun
  SPINS = 4000,        // polls of a value before the thread yields its core between polls
  YIELDS = 3000,       // polls of a worker between loops, with yields, before it sleeps: about a millisecond
  FETCHED = 8,         // cache lines of weights that are prefetched between two polls
  USUAL_CACHE = 512 * 1024,
  POOL_LAYOUT = 1,     // to be raised when Pool changes, or what a thread does with it: libraries that agree can share a pool
};

typedef struct {
  Kernel kernel;
  const Value *arguments;
  int64_t count;
  const char *next;        // weights that are read next after this call, or NULL
  int64_t next_bytes;
} Call;

// A thread's tasks first..end-1 of a loop and the number of the loop, in one word, so that a claimed task belongs to that loop.
typedef struct { LINE _Atomic uint64_t word; } Share;

typedef struct {
  int32_t threads;
  LINE _Atomic uint32_t loop;      // number of the current loop; workers wait for the next
  _Atomic uint32_t stopped;
  _Atomic(Body) body;
  _Atomic(void *) closure;
  Environment environment;
  LINE _Atomic(const char *) next; // of the current call
  _Atomic int64_t next_bytes;
  int64_t most_fetched;            // bytes for which a thread's L2 cache has room beside what a loop needs
  LINE _Atomic int32_t done;       // tasks of the current loop that have ended
  _Atomic int32_t failure;         // what a task returned, if not 0
  LINE _Atomic int32_t sleepers;
  Share shares[MOST_THREADS];
} Pool;

static __thread Pool *current;     // of the step whose calls this thread runs
static __thread struct { const char *next, *at, *end; } fetched;  // weights, and which of them this thread has yet to prefetch
static char message[512];          // of the last error
static atomic_flag writing = ATOMIC_FLAG_INIT;

static uint64_t pack(uint32_t loop, uint32_t first, uint32_t end) { return (uint64_t)loop << 32 | first << 16 | end; }

// The next task of a share from its front (its owner) or its back (others); -1 if none is left or the loop has ended.
static int32_t claim(Share *share, uint32_t loop, int front) {
  uint64_t word = atomic_load_explicit(&share->word, memory_order_relaxed);
  for (;;) {
    uint32_t first = word >> 16 & 0xffff, end = word & 0xffff;
    if ((uint32_t)(word >> 32) != loop || first >= end) return -1;
    uint64_t rest = front ? pack(loop, first + 1, end) : pack(loop, first, end - 1);
    if (atomic_compare_exchange_weak_explicit(&share->word, &word, rest, memory_order_acquire, memory_order_relaxed))
      return front ? (int32_t)first : (int32_t)end - 1;
  }
}

static void run_tasks(Pool *pool, int32_t me, uint32_t loop) {
  // Read before a claim and used only if the claim succeeds: then the loop had not ended, and these belong to it.
  Body body = atomic_load_explicit(&pool->body, memory_order_relaxed);
  void *closure = atomic_load_explicit(&pool->closure, memory_order_relaxed);
  int32_t ended = 0, failure = 0;
  for (int32_t i = 0; i < pool->threads; i++) {
    int32_t owner = me + i < pool->threads ? me + i : me + i - pool->threads;
    for (int32_t task; (task = claim(&pool->shares[owner], loop, i == 0)) >= 0; ended++) {
      int32_t status = body(task, &pool->environment, closure);
      if (status) failure = status;
    }
  }
  if (failure) atomic_store_explicit(&pool->failure, failure, memory_order_relaxed);
  if (ended) atomic_fetch_add_explicit(&pool->done, ended, memory_order_release);
}

// Thread `me` calls this between two polls: it prefetches the beginning of its share of the next weights. The two words may
// belong to different calls; then other memory is prefetched, which does no harm.
static void idle(const Pool *pool, int32_t me) {
  const char *next = atomic_load_explicit(&pool->next, memory_order_relaxed);
  if (next != fetched.next) {
    int64_t bytes = atomic_load_explicit(&pool->next_bytes, memory_order_relaxed);
    int64_t first = bytes * me / pool->threads, size = bytes * (me + 1) / pool->threads - first;
    fetched.next = fetched.at = fetched.end = next;
    if (next) {
      fetched.at = next + first;
      fetched.end = fetched.at + (size < pool->most_fetched ? size : pool->most_fetched);
    }
  }
  if (fetched.at >= fetched.end) {
    pause_once();
    return;
  }
  for (int32_t i = 0; i < FETCHED; i++, fetched.at += 64) __builtin_prefetch(fetched.at, 0, 2);
}

HIDDEN void belle_idle(void) {
  if (current) idle(current, 0); else pause_once();
}

HIDDEN int32_t belle_parallel(Body body, void *closure, int32_t tasks) {
  Pool *pool = current;
  if (!pool || pool->threads == 1) {
    Environment alone = {NULL, 1};
    return body(0, &alone, closure);
  }
  int32_t threads = pool->threads;
  if (tasks <= 0 || tasks > 0xffff) tasks = threads * SHARES;
  uint32_t loop = atomic_load_explicit(&pool->loop, memory_order_relaxed) + 1;
  atomic_store_explicit(&pool->body, body, memory_order_relaxed);
  atomic_store_explicit(&pool->closure, closure, memory_order_relaxed);
  pool->environment = (Environment){NULL, tasks};
  atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
  atomic_store_explicit(&pool->failure, 0, memory_order_relaxed);
  atomic_thread_fence(memory_order_release);
  for (int32_t i = 0; i < threads; i++)
    atomic_store_explicit(&pool->shares[i].word, pack(loop, tasks * i / threads, tasks * (i + 1) / threads), memory_order_release);
  atomic_store(&pool->loop, loop);
  if (atomic_load(&pool->sleepers)) syscall(SYS_futex, &pool->loop, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
  current = NULL;  // a loop inside a task runs in that task
  run_tasks(pool, 0, loop);
  current = pool;
  for (int32_t spin = 0; atomic_load_explicit(&pool->done, memory_order_acquire) < tasks; spin++)
    if (spin < SPINS) idle(pool, 0); else sched_yield();
  return atomic_load_explicit(&pool->failure, memory_order_relaxed);
}

// The names that TVM's code refers to; hidden, so that TVM's own loader does not replace them.
HIDDEN int32_t (*__TVMBackendParallelLaunch)(Body, void *, int32_t) = belle_parallel;

// Adds a piece of text to the message, as much of it as there is room for beside the final zero.
static size_t append(size_t used, const char *part) {
  size_t length = part ? strlen(part) : 0, room = sizeof message - 1 - used;
  if (length > room) length = room;
  if (length) memcpy(message + used, part, length);
  return used + length;
}

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  while (atomic_flag_test_and_set_explicit(&writing, memory_order_acquire)) pause_once();  // several threads may fail at once
  size_t used = append(append(0, kind), ": ");
  for (int32_t i = 0; i < count; i++) used = append(used, parts[i]);
  message[used] = 0;
  atomic_flag_clear_explicit(&writing, memory_order_release);
}

API size_t belle_pool_bytes(void) { return sizeof(Pool); }
API int32_t belle_most_threads(void) { return MOST_THREADS; }
API int32_t belle_pool_layout(void) { return POOL_LAYOUT; }
API const char *belle_error(void) { return message; }

// `memory` has belle_pool_bytes() zeros and starts at a multiple of 64.
API void belle_pool_init(Pool *memory, int32_t threads) {
  int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  memory->threads = threads;
  memory->most_fetched = (cache > 0 ? cache : USUAL_CACHE) / 2;
}

// The work of a pool's thread number `me`, 1..threads-1; returns after belle_stop.
API void belle_work(Pool *pool, int32_t me) {
  uint32_t seen = 0;
  while (!atomic_load(&pool->stopped)) {
    uint32_t loop = seen;
    for (int32_t spin = 0; spin < SPINS + YIELDS && (loop = atomic_load_explicit(&pool->loop, memory_order_acquire)) == seen; spin++)
      if (spin < SPINS) idle(pool, me); else sched_yield();
    if (loop == seen) {
      atomic_fetch_add(&pool->sleepers, 1);
      if (atomic_load(&pool->loop) == seen && !atomic_load(&pool->stopped))
        syscall(SYS_futex, &pool->loop, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
      atomic_fetch_sub(&pool->sleepers, 1);
      continue;
    }
    seen = loop;
    run_tasks(pool, me, loop);
  }
}

API void belle_stop(Pool *pool) {
  atomic_store(&pool->stopped, 1);
  atomic_fetch_add(&pool->loop, 1);
  syscall(SYS_futex, &pool->loop, FUTEX_WAKE_PRIVATE, MOST_THREADS, NULL, NULL, 0);
}

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Runs calls in order; returns the index of the first that failed, or -1. If `times` is not NULL, it gets nanoseconds: when the
// first call began, and when each call ended.
API int64_t belle_walk(Pool *pool, const Call *calls, int64_t count, int64_t *times) {
  int64_t failed = -1;
  current = pool;
  if (times) *times++ = now();
  for (int64_t i = 0; i < count && failed < 0; i++) {
    Value result = {0};
    atomic_store_explicit(&pool->next, calls[i].next, memory_order_relaxed);
    atomic_store_explicit(&pool->next_bytes, calls[i].next_bytes, memory_order_relaxed);
    if (calls[i].kernel(NULL, calls[i].arguments, (int32_t)calls[i].count, &result)) failed = i;
    if (times) *times++ = now();
  }
  current = NULL;
  return failed;
}
