// Linked into the kernel libraries of engines for PyTorch: makes every kernel an operator of libtorch.
//
// operators.py writes two macros before this text: NAMESPACE, a string, and OPERATORS(X), which is one X(kernel, schema, kinds)
// for each kernel. The kinds tell what each argument of an operator is, one letter each:
//   a  the arena, a tensor      k  the KV cache, a tensor      t  a tensor, whose data is the kernel's next argument
//   o  a byte offset in the arena, the kernel's next argument   c  a byte offset in the cache, the kernel's next argument
//
// All that is used of libtorch is its C interface for extensions, which later versions keep. It is looked up when the library is
// loaded, so a host has to load libtorch first. Loops are divided among the threads of libtorch.

#define _GNU_SOURCE
#include "steps.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>

typedef uint64_t Cell;  // StableIValue: an integer, or a Tensor that the called function owns
typedef void *Tensor;   // AtenTensorHandle
typedef void *Library;  // TorchLibraryHandle

enum { MOST_ARGUMENTS = 32, OPAQUE_POINTER = 4 };  // the latter is TVM's tag of an argument that is an address

static struct {
  int32_t (*init_fragment)(const char *, const char *, uint32_t, Library *);
  int32_t (*init_impl)(const char *, const char *, const char *, uint32_t, Library *);
  int32_t (*define)(Library, const char *);
  int32_t (*implement)(Library, const char *, void (*)(Cell *, uint64_t, uint64_t));
  int32_t (*data)(Tensor, void **);
  int32_t (*release)(Tensor);
  int32_t (*threads)(uint32_t *);
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *);
  void (*check)(bool, const char *, const char *, uint32_t, const char *);
} torch;

static const struct { const char *name; size_t place; } FUNCTIONS[] = {
  {"aoti_torch_library_init_fragment", offsetof(__typeof__(torch), init_fragment)},
  {"aoti_torch_library_init_impl", offsetof(__typeof__(torch), init_impl)},
  {"aoti_torch_library_def", offsetof(__typeof__(torch), define)},
  {"aoti_torch_library_impl", offsetof(__typeof__(torch), implement)},
  {"aoti_torch_get_data_ptr", offsetof(__typeof__(torch), data)},
  {"aoti_torch_delete_tensor_object", offsetof(__typeof__(torch), release)},
  {"torch_get_num_threads", offsetof(__typeof__(torch), threads)},
  {"torch_parallel_for", offsetof(__typeof__(torch), parallel_for)},
  {"aoti_torch_check", offsetof(__typeof__(torch), check)},
};

extern int32_t (*__TVMBackendParallelLaunch)(Body, void *, int32_t);
API const char *belle_error(void);

typedef struct {
  Body body;
  void *closure;
  Environment environment;
  _Atomic int32_t failure;  // what a task returned, if not 0
} Loop;

static void run_tasks(int64_t first, int64_t end, void *context) {
  Loop *loop = context;
  for (int64_t task = first; task < end; task++) {
    int32_t status = loop->body((int32_t)task, &loop->environment, loop->closure);
    if (status) atomic_store_explicit(&loop->failure, status, memory_order_relaxed);
  }
}

// A loop inside a task runs in that task, as libtorch has it.
static int32_t parallel(Body body, void *closure, int32_t tasks) {
  uint32_t threads = 1;
  torch.threads(&threads);
  if (threads == 1) tasks = 1;
  else if (tasks <= 0) tasks = (int32_t)threads;
  Loop loop = {body, closure, {NULL, tasks}, 0};
  if (tasks == 1) run_tasks(0, 1, &loop);
  else torch.parallel_for(0, tasks, 1, run_tasks, &loop);
  return atomic_load_explicit(&loop.failure, memory_order_relaxed);
}

static void run(Kernel kernel, const char *kinds, Cell *stack, uint64_t count) {
  Value arguments[MOST_ARGUMENTS], result = {0};
  char *arena = NULL, *cache = NULL;
  int32_t used = 0;
  for (uint64_t i = 0; i < count; i++) {
    void *data = NULL;
    char kind = kinds[i];
    if (kind == 'o') data = arena + stack[i];
    else if (kind == 'c') data = cache + stack[i];
    else torch.data((Tensor)stack[i], &data);
    if (kind == 'a') arena = data;
    else if (kind == 'k') cache = data;
    else arguments[used++] = (Value){OPAQUE_POINTER, 0, {data}};
  }
  int32_t status = kernel(NULL, arguments, used, &result);
  for (uint64_t i = 0; i < count; i++)
    if (kinds[i] == 'a' || kinds[i] == 'k' || kinds[i] == 't') torch.release((Tensor)stack[i]);
  if (status) torch.check(false, "run", NAMESPACE, 0, belle_error());
}

#define DEFINE(kernel, schema, kinds) \
  extern int32_t __tvm_ffi_##kernel(void *, const Value *, int32_t, Value *); \
  static void run_##kernel(Cell *stack, uint64_t count, uint64_t results) { (void)results; run(__tvm_ffi_##kernel, kinds, stack, count); }
OPERATORS(DEFINE)

static const struct { const char *name, *schema; void (*function)(Cell *, uint64_t, uint64_t); } operators[] = {
#define ENTRY(kernel, schema, kinds) {#kernel, schema, run_##kernel},
  OPERATORS(ENTRY)
};

// Where libtorch is not there, or too old, nothing is registered, and it does not know the operators of a module.
__attribute__((constructor)) static void register_operators(void) {
  void *library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return;
  for (size_t i = 0; i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++) {
    void *function = dlsym(library, FUNCTIONS[i].name);
    if (!function) return;
    *(void **)((char *)&torch + FUNCTIONS[i].place) = function;
  }
  Library schemas, functions;  // kept for as long as the process runs
  if (torch.init_fragment(NAMESPACE, __FILE__, __LINE__, &schemas)) return;
  if (torch.init_impl(NAMESPACE, "CPU", __FILE__, __LINE__, &functions)) return;
  for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
    if (torch.define(schemas, operators[i].schema) || torch.implement(functions, operators[i].name, operators[i].function)) return;
  __TVMBackendParallelLaunch = parallel;
}
