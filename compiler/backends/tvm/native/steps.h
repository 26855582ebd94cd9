// Declarations that steps.c and sums.c share.

#pragma once

#include <stdatomic.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#define LINE __attribute__((aligned(64)))

typedef struct { int32_t type; uint32_t zero; union { void *pointer; int64_t integer; } as; } Value;  // TVMFFIAny
typedef int32_t (*Kernel)(void *self, const Value *arguments, int32_t count, Value *result);

typedef struct { void *sync_handle; int32_t tasks; } Environment;  // TVMParallelGroupEnv
typedef int32_t (*Body)(int32_t task, Environment *environment, void *closure);

// Runs a kernel's parallel loop. Tasks are contiguous pieces of the loop; the body divides its range by their number.
HIDDEN int32_t belle_parallel(Body body, void *closure, int32_t tasks);

// Called between two polls of a value that a thread waits for.
HIDDEN void belle_idle(void);

static inline void pause_once(void) { __builtin_ia32_pause(); }
