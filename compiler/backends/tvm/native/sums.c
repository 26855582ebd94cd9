// Sums over the ranks of one host, through memory that all of them map (runtime/distributed/shared_sums.py creates it).
//
// Values in the ranks' arenas are added up in place. When all ranks have published where their values are, each rank adds up
// its share of them, in the order of ranks, and writes the result to all arenas: so all ranks have the same bits. They continue
// when all have published that they are done. The threads of a rank divide its share among them.
//
// For other values, every rank copies its values to its slot, raises its flag, waits for all flags, and adds all slots up in
// the order of ranks. There are two slots per rank: a rank that reaches sum n + 2 knows that all have raised the flag for
// n + 1, and so have read the slots of n, which are overwritten only now.

#define _GNU_SOURCE
#include "steps.h"

#include <sched.h>
#include <stddef.h>
#include <string.h>

enum {
  ALONE = 8 * 1024,  // floats of a share; fewer are added by one thread before others would have begun
  SPINS = 1000,      // polls of a flag before the thread yields its core between polls
  WIDE = 16,         // floats that are added at once
  BLOCK = 512,       // floats whose sum over ranks is kept on the stack
};

typedef struct {             // flags of a rank, in a cache line of their own
  _Atomic int64_t ready;     // number of the sum that its values are ready for
  _Atomic int64_t done;      // number of the sum that it has done its share of
  _Atomic int64_t place;     // where its values are, in bytes from the beginning of its arena
} Line;

typedef struct {             // made by the runtime; `lines`, `slots` and `arenas` have one address per rank
  int64_t rank, ranks;
  int64_t count;             // sums so far
  Line **lines;
  float **slots;             // 2 * slot_floats each
  int64_t slot_floats;
  char **arenas;             // NULL: no arenas are shared
  int64_t arena_bytes;       // of this rank's own
} Sums;

typedef float Wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

static void wait_for(const Sums *sums, int64_t count, int done) {
  for (int64_t rank = 0; rank < sums->ranks; rank++) {
    _Atomic int64_t *flag = done ? &sums->lines[rank]->done : &sums->lines[rank]->ready;
    for (int64_t spin = 0; atomic_load_explicit(flag, memory_order_acquire) < count; spin++)
      if (spin < SPINS) belle_idle(); else sched_yield();
  }
}

// to = a + b
static void add(float *to, const float *a, const float *b, int64_t count) {
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) *(Wide *)(to + i) = *(const Wide *)(a + i) + *(const Wide *)(b + i);
  for (; i < count; i++) to[i] = a[i] + b[i];
}

// Adds up rows of at most slot_floats values altogether.
static void add_slots(Sums *sums, float *values, int64_t rows, int64_t width, int64_t stride) {
  int64_t count = ++sums->count, half = (count & 1) * sums->slot_floats;
  float *own = sums->slots[sums->rank] + half;
  for (int64_t row = 0; row < rows; row++) memcpy(own + row * width, values + row * stride, 4 * width);
  atomic_store_explicit(&sums->lines[sums->rank]->ready, count, memory_order_release);
  wait_for(sums, count, 0);
  for (int64_t row = 0; row < rows; row++) {
    float *to = values + row * stride;
    add(to, sums->slots[0] + half + row * width, sums->slots[1] + half + row * width, width);
    for (int64_t rank = 2; rank < sums->ranks; rank++) add(to, to, sums->slots[rank] + half + row * width, width);
  }
}

typedef struct { const Sums *sums; int64_t first, last, width, stride; } Share;  // values first..last - 1 of all rows

static int32_t add_share(int32_t task, Environment *environment, void *closure) {
  const Share *share = closure;
  const Sums *sums = share->sums;
  int64_t size = share->last - share->first, ranks = sums->ranks;
  int64_t at = share->first + size * task / environment->tasks, end = share->first + size * (task + 1) / environment->tasks;
  float *parts[ranks], total[BLOCK];
  for (int64_t rank = 0; rank < ranks; rank++)
    parts[rank] = (float *)(sums->arenas[rank] + atomic_load_explicit(&sums->lines[rank]->place, memory_order_relaxed));
  while (at < end) {
    int64_t column = at % share->width, place = at / share->width * share->stride + column;
    int64_t count = share->width - column;
    if (count > BLOCK) count = BLOCK;
    if (count > end - at) count = end - at;
    add(total, parts[0] + place, parts[1] + place, count);
    for (int64_t rank = 2; rank < ranks; rank++) add(total, total, parts[rank] + place, count);
    for (int64_t rank = 0; rank < ranks; rank++) memcpy(parts[rank] + place, total, 4 * count);
    at += count;
  }
  return 0;
}

static int32_t add_in_place(Sums *sums, int64_t place, int64_t rows, int64_t width, int64_t stride) {
  Line *own = sums->lines[sums->rank];
  int64_t count = ++sums->count, size = rows * width, ranks = sums->ranks, rank = sums->rank;
  atomic_store_explicit(&own->place, place, memory_order_relaxed);
  atomic_store_explicit(&own->ready, count, memory_order_release);
  wait_for(sums, count, 0);
  Share share = {sums, size * rank / ranks, size * (rank + 1) / ranks, width, stride};
  Environment alone = {NULL, 1};
  int32_t failed = share.last - share.first < ALONE ? add_share(0, &alone, &share) : belle_parallel(add_share, &share, 0);
  atomic_store_explicit(&own->done, count, memory_order_release);
  wait_for(sums, count, 1);
  return failed;
}

// Called like a kernel: replaces float32 rows, of `width` values each and `stride` apart, by the sum of those of all ranks.
// Arguments: Sums, the first value, the number of rows (int32), width, stride.
API int32_t belle_sum(void *self, const Value *arguments, int32_t count, Value *result) {
  (void)self, (void)count, (void)result;
  Sums *sums = arguments[0].as.pointer;
  float *values = arguments[1].as.pointer;
  int64_t rows = *(const int32_t *)arguments[2].as.pointer, width = arguments[3].as.integer, stride = arguments[4].as.integer;
  if (sums->arenas) {
    int64_t place = (char *)values - sums->arenas[sums->rank];
    if (place >= 0 && place + 4 * ((rows - 1) * stride + width) <= sums->arena_bytes)
      return add_in_place(sums, place, rows, width, stride);
  }
  int64_t most = sums->slot_floats / width;
  if (most < 1) most = 1;
  for (int64_t row = 0; row < rows; row += most) {
    int64_t height = rows - row < most ? rows - row : most;
    for (int64_t column = 0; column < width; column += sums->slot_floats) {
      int64_t part = width - column < sums->slot_floats ? width - column : sums->slot_floats;
      add_slots(sums, values + row * stride + column, height, part, stride);
    }
  }
  return 0;
}
