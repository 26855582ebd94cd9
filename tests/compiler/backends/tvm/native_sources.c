// Runs steps.c and sums.c with sanitizers, without TVM: see test_native_sources.py.

#include "steps.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
size_t belle_pool_bytes(void);
const char *belle_error(void);
void belle_pool_init(void *memory, int32_t threads);
void belle_work(void *pool, int32_t me);
void belle_stop(void *pool);
int64_t belle_walk(void *pool, const void *calls, int64_t count, int64_t *times);
int32_t belle_sum(void *self, const Value *arguments, int32_t count, Value *result);

enum { THREADS = 4, SIZE = 1000, ROUNDS = 200 };

typedef struct { Kernel kernel; const Value *arguments; int64_t count; const char *next; int64_t next_bytes; } Call;
typedef struct { void *pool; int32_t number; } Worker;

static int counts[SIZE];
static const char *parts_of_failure[] = {"task ", NULL, "failed"};

static void *work(void *worker) {
  belle_work(((Worker *)worker)->pool, ((Worker *)worker)->number);
  return NULL;
}

static int32_t count_up(int32_t task, Environment *environment, void *closure) {
  (void)closure;
  for (int i = SIZE * task / environment->tasks; i < SIZE * (task + 1) / environment->tasks; i++) counts[i]++;
  return 0;
}

static int32_t fail(int32_t task, Environment *environment, void *closure) {
  (void)task, (void)environment, (void)closure;
  TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts_of_failure, 3);
  return -1;
}

static int32_t counting(void *self, const Value *arguments, int32_t count, Value *result) {
  (void)self, (void)arguments, (void)count, (void)result;
  return belle_parallel(count_up, NULL, 0);
}

static int32_t failing(void *self, const Value *arguments, int32_t count, Value *result) {
  (void)self, (void)arguments, (void)count, (void)result;
  return belle_parallel(fail, NULL, 0);
}

static void messages(void) {
  char *text = malloc(4096);  // on the heap, where a byte too many is seen
  const char *parts[] = {text, NULL, "", text, "end"};
  TVMFFIErrorSetRaisedFromCStrParts(NULL, parts, 0);
  assert(!strcmp(belle_error(), ": "));
  for (int32_t length = 0; length < 4096; length++) {
    memset(text, 'x', 4095);
    text[length] = 0;
    for (int32_t count = 0; count <= 5; count++) {
      TVMFFIErrorSetRaisedFromCStrParts(text, parts, count);
      assert(strlen(belle_error()) <= 511);
      TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, count);
      assert(!strncmp(belle_error(), "ValueError: ", 12) && strlen(belle_error()) <= 511);
    }
  }
  free(text);
}

static void steps(void) {
  void *pool = aligned_alloc(64, (belle_pool_bytes() + 63) / 64 * 64);
  memset(pool, 0, belle_pool_bytes());
  belle_pool_init(pool, THREADS);
  pthread_t threads[THREADS];
  Worker workers[THREADS];
  for (int32_t i = 1; i < THREADS; i++) {
    workers[i] = (Worker){pool, i};
    pthread_create(&threads[i], NULL, work, &workers[i]);
  }
  char *weights = malloc(1 << 16);
  int64_t times[4];
  Call calls[] = {{counting, NULL, 0, weights, 1 << 16}, {counting, NULL, 0, NULL, 0}, {counting, NULL, 0, weights + 7, 1}};
  for (int round = 0; round < ROUNDS; round++) assert(belle_walk(pool, calls, 3, round % 2 ? times : NULL) == -1);
  for (int i = 0; i < SIZE; i++) assert(counts[i] == 3 * ROUNDS);
  calls[1].kernel = failing;
  assert(belle_walk(pool, calls, 3, NULL) == 1 && !strcmp(belle_error(), "ValueError: task failed"));
  assert(belle_walk(pool, NULL, 0, NULL) == -1);
  belle_stop(pool);
  for (int32_t i = 1; i < THREADS; i++) pthread_join(threads[i], NULL);
  free(weights);
  free(pool);
}

int main(void) {
  messages();
  steps();
  puts("right");
  return 0;
}
