/* NVIDIA's libraries as far as ONNX Runtime's CUDA provider needs an answer to go on: one GPU, whose memory is the host's. Kernels
   and products do nothing. Functions that are not here do nothing either, and report success; see __main__.py.

   With STAND_IN_TRACE set, copies between host and device and products of integers are printed. */

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAJOR = 75, MINOR = 76, MULTIPROCESSORS = 16, OPTIN_SHARED = 97, SHARED = 8, MOST_THREADS = 1 }; /* cudaDeviceAttr */
enum { TO_DEVICE = 1, TO_HOST = 2 };                                                                     /* cudaMemcpyKind */
enum { INT8 = 3 };                                                                                       /* cudaDataType */

static char handle[64]; /* of streams, events, libraries */

static void trace(const char *format, ...) {
  va_list arguments;
  if (!getenv("STAND_IN_TRACE")) return;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
}

static int capability(void) {
  const char *arch = getenv("STAND_IN_ARCH"); /* 80 for 8.0 */
  return arch ? atoi(arch) : 80;
}

int cudaMalloc(void **place, size_t size) {
  if (posix_memalign(place, 256, size ? size : 256)) return 2;
  memset(*place, 0, size);
  return 0;
}
int cudaMallocHost(void **place, size_t size) { return cudaMalloc(place, size); }
int cudaHostAlloc(void **place, size_t size, unsigned flags) { return cudaMalloc(place, size); }
int cudaMallocFromPoolAsync(void **place, size_t size, void *pool, void *stream) { return cudaMalloc(place, size); }
int cudaFree(void *place) { free(place); return 0; }
int cudaFreeHost(void *place) { free(place); return 0; }
int cudaFreeAsync(void *place, void *stream) { free(place); return 0; }

int cudaMemcpy(void *target, const void *source, size_t size, int kind) {
  if (kind == TO_DEVICE || kind == TO_HOST) trace("stand-in: copy %zu bytes %s\n", size, kind == TO_DEVICE ? "in" : "out");
  memmove(target, source, size);
  return 0;
}
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
  return cudaMemcpy(target, source, size, kind);
}
int cudaMemcpy2DAsync(void *target, size_t to, const void *source, size_t of, size_t width, size_t rows, int kind, void *stream) {
  trace("stand-in: copy %zu rows of %zu bytes to rows of %zu\n", rows, width, to);
  for (size_t row = 0; row < rows; row++) memmove((char *)target + row * to, (const char *)source + row * of, width);
  return 0;
}
int cudaMemset(void *place, int value, size_t size) { memset(place, value, size); return 0; }
int cudaMemsetAsync(void *place, int value, size_t size, void *stream) { memset(place, value, size); return 0; }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)40 << 30; return 0; }
int cudaPointerGetAttributes(char *attributes, const void *place) {
  memset(attributes, 0, 32);
  *(int *)attributes = 2; /* memory of the device */
  *(const void **)(attributes + 8) = *(const void **)(attributes + 16) = place;
  return 0;
}

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case MAJOR: *value = capability() / 10; break;
    case MINOR: *value = capability() % 10; break;
    case MULTIPROCESSORS: *value = 108; break;
    case OPTIN_SHARED: *value = 166912; break;
    case SHARED: *value = 49152; break;
    case MOST_THREADS: *value = 1024; break;
    default: *value = 1;
  }
  return 0;
}
int cudaGetDeviceProperties(char *properties, int device) { /* offsets of cudaDeviceProp in CUDA 13 */
  memset(properties, 0, 768);
  strcpy(properties, "stand-in");
  *(size_t *)(properties + 288) = (size_t)40 << 30; /* memory */
  *(size_t *)(properties + 296) = 49152;            /* shared memory of a block */
  *(int *)(properties + 304) = 65536;               /* registers of a block */
  *(int *)(properties + 308) = 32;                  /* threads of a warp */
  *(int *)(properties + 320) = 1024;                /* threads of a block */
  for (int axis = 0; axis < 3; axis++) {
    *(int *)(properties + 324 + 4 * axis) = 1024;
    *(int *)(properties + 336 + 4 * axis) = 65535;
  }
  *(int *)(properties + 360) = capability() / 10;
  *(int *)(properties + 364) = capability() % 10;
  *(int *)(properties + 384) = 108; /* multiprocessors */
  for (int place = 600; place < 760; place += 4) *(int *)(properties + place) = 166912; /* one is shared memory by request */
  return 0;
}

int cudaStreamCreate(void **stream) { *stream = handle; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreate(void **event) { *event = handle; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle; return 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 1; return 0; }
int cudaMemPoolCreate(void **pool, const void *properties) { *pool = handle; return 0; }
int cudaFuncGetAttributes(char *attributes, const void *function) { memset(attributes, 0, 144); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared, unsigned flags) {
  *blocks = 1;
  return 0;
}
void **__cudaRegisterFatBinary(void *binary) { return (void **)handle; }
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
int __cudaPopCallConfiguration(unsigned *grid, unsigned *block, size_t *shared, void **stream) {
  for (int axis = 0; axis < 3; axis++) grid[axis] = block[axis] = 1;
  *shared = 0;
  *stream = NULL;
  return 0;
}

const char *cudaGetErrorName(int error) { return "an error of a stand-in"; }
const char *cudaGetErrorString(int error) { return "an error of a stand-in"; }
const char *cublasGetStatusName(int status) { return "a status of a stand-in"; }
const char *cublasGetStatusString(int status) { return "a status of a stand-in"; }
const char *cudnnGetErrorString(int status) { return "a status of a stand-in"; }

int cublasCreate_v2(void **cublas) { *cublas = handle; return 0; }
int cublasLtCreate(void **cublas) { *cublas = handle; return 0; }
int cublasGemmEx(void *cublas, int turn_a, int turn_b, int m, int n, int k, const void *alpha, const void *a, int type, int lda,
                 const void *b, int type_b, int ldb, const void *beta, void *c, int type_c, int ldc, int compute, int algorithm) {
  if (type == INT8) trace("stand-in: int8 product of %d rows, %d inputs, %d outputs\n", n, k, m);
  return 0;
}

size_t cudnnGetVersion(void) { return 92800; }
int cudnnCreate(void **cudnn) { *cudnn = handle; return 0; }
int cudnnCreateTensorDescriptor(void **descriptor) { *descriptor = handle; return 0; }
int cudnnCreateReduceTensorDescriptor(void **descriptor) { *descriptor = handle; return 0; }
int cudnnGetReductionWorkspaceSize(void *cudnn, void *reduction, void *a, void *c, size_t *size) { *size = 0; return 0; }
int cudnnGetReductionIndicesSize(void *cudnn, void *reduction, void *a, void *c, size_t *size) { *size = 0; return 0; }
