/* A CUDA runtime without a GPU: memory is host memory, copies are made at once, kernels do nothing.
 *
 * Here are the functions that must return something; all others that a caller needs are generated
 * (libraries.py). Everything is counted, so that a test can tell what a step launched and copied.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 801 };
enum { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1 };
enum { DEVICE_MEMORY = 2 };       /* cudaMemoryType */
enum { ALIGNMENT = 256 };         /* bytes, as cudaMalloc aligns */
#define MEMORY (80L << 30)        /* bytes that the device claims to have */
#define CUDA_VERSION 13000
#define MULTIPROCESSORS 132       /* of an H100, compute capability 9.0 */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct calls *all;
static int capturing;

void stub_count(struct calls *calls, size_t bytes) {
    pthread_mutex_lock(&lock);
    if (!calls->listed) {
        calls->listed = 1;
        calls->next = all;
        all = calls;
    }
    calls->count++;
    calls->recorded += capturing;
    calls->bytes += bytes;
    if (bytes > calls->largest) calls->largest = bytes;
    pthread_mutex_unlock(&lock);
}

/* Forget all calls so far. */
void stub_reset(void) {
    pthread_mutex_lock(&lock);
    for (struct calls *one = all; one; one = one->next)
        one->count = one->recorded = 0, one->bytes = one->largest = 0;
    pthread_mutex_unlock(&lock);
}

/* Write a line "name count recorded bytes largest" for each function called since the last reset.
 * Returns the size that the text needs with its final zero. */
size_t stub_report(char *text, size_t size) {
    size_t used = 0;
    pthread_mutex_lock(&lock);
    for (struct calls *one = all; one; one = one->next) {
        size_t left = used < size ? size - used : 0;
        if (one->count)
            used += snprintf(left ? text + used : NULL, left, "%s %ld %ld %zu %zu\n", one->name,
                             one->count, one->recorded, one->bytes, one->largest);
    }
    pthread_mutex_unlock(&lock);
    return used + 1;
}

/* The device */

int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
int cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
int cudaRuntimeGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }

/* cudaDeviceProp of CUDA 13, as far as it is filled in; tests compare the offsets with the real one.
 * The real structure is longer: its last fields, which nobody reads, keep what they had. */
struct properties {
    char name[256];
    char uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_global_mem, shared_mem_per_block;
    int regs_per_block, warp_size;
    size_t mem_pitch;
    int max_threads_per_block, max_threads_dim[3], max_grid_size[3];
    size_t total_const_mem;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int multi_processor_count;
    char textures[208];
    int l2_cache_size;
    char persisting[4];
    int max_threads_per_multi_processor;
    char caches[16];
    size_t shared_mem_per_multiprocessor;
    int regs_per_multiprocessor;
    char sharing[36];
    size_t shared_mem_per_block_optin;
};

int cudaGetDeviceProperties(struct properties *found, int device) {
    (void)device;
    memset(found, 0, sizeof *found);
    strcpy(found->name, "stub of a GPU");
    found->total_global_mem = MEMORY;
    found->shared_mem_per_block = 49152;
    found->regs_per_block = 65536;
    found->warp_size = 32;
    found->mem_pitch = 2147483647;
    found->max_threads_per_block = 1024;
    memcpy(found->max_threads_dim, (int[]){1024, 1024, 64}, sizeof found->max_threads_dim);
    memcpy(found->max_grid_size, (int[]){2147483647, 65535, 65535}, sizeof found->max_grid_size);
    found->total_const_mem = 65536;
    found->major = 9;
    found->texture_alignment = 512;
    found->texture_pitch_alignment = 32;
    found->multi_processor_count = MULTIPROCESSORS;
    found->l2_cache_size = 50 << 20;
    found->max_threads_per_multi_processor = 2048;
    found->shared_mem_per_multiprocessor = 233472;
    found->regs_per_multiprocessor = 65536;
    found->shared_mem_per_block_optin = 232448;
    return SUCCESS;
}

/* Numbers are those of cudaDeviceAttr; what is not listed is answered with 1: it is supported. */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case 1: *value = 1024; break;             /* MaxThreadsPerBlock */
        case 8: *value = 49152; break;            /* MaxSharedMemoryPerBlock */
        case 10: *value = 32; break;              /* WarpSize */
        case 16: *value = MULTIPROCESSORS; break; /* MultiProcessorCount */
        case 75: *value = 9; break;               /* ComputeCapabilityMajor */
        case 76: *value = 0; break;               /* ComputeCapabilityMinor */
        case 97: *value = 232448; break;          /* MaxSharedMemoryPerBlockOptin */
        default: *value = 1;
    }
    return SUCCESS;
}

/* Memory */

static int allocate(void **address, size_t size) {
    return posix_memalign(address, ALIGNMENT, size ? size : 1) ? OUT_OF_MEMORY : SUCCESS;
}

int cudaMalloc(void **address, size_t size) {
    COUNT_BYTES(size);
    return allocate(address, size);
}
int cudaMallocFromPoolAsync(void **address, size_t size, void *pool, void *stream) {
    COUNT_BYTES(size);
    (void)pool, (void)stream;
    return allocate(address, size);
}
int cudaMallocHost(void **address, size_t size) { return allocate(address, size); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) {
    (void)flags;
    return allocate(address, size);
}
int cudaFree(void *address) { return free(address), SUCCESS; }
int cudaFreeHost(void *address) { return free(address), SUCCESS; }
int cudaFreeAsync(void *address, void *stream) { return (void)stream, free(address), SUCCESS; }
int cudaMemGetInfo(size_t *available, size_t *total) {
    *total = MEMORY;
    *available = MEMORY - (10L << 30);
    return SUCCESS;
}

/* By cudaMemcpyKind. */
static struct calls copies[] = {
    {.name = "copy.host_to_host"}, {.name = "copy.host_to_device"}, {.name = "copy.device_to_host"},
    {.name = "copy.device_to_device"}, {.name = "copy.default"},
};

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    stub_count(&copies[kind], size);
    return memcpy(to, from, size), SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    (void)stream;
    return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) {
    COUNT_BYTES(size);
    return memset(to, value, size), SUCCESS;
}
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
    COUNT_BYTES(size);
    (void)stream;
    return memset(to, value, size), SUCCESS;
}

struct attributes {
    int type, device;
    void *device_pointer, *host_pointer;
};
int cudaPointerGetAttributes(struct attributes *found, const void *address) {
    *found = (struct attributes){DEVICE_MEMORY, 0, (void *)address, (void *)address};
    return SUCCESS;
}

/* A variable of a kernel's module: all are zero. */
int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) {
    (void)symbol, (void)offset, (void)kind;
    return memset(to, 0, size), SUCCESS;
}

/* Handles: streams, events, graphs. Each is a block of memory of its own. */

static int handle(void **made) { return allocate(made, 16); }

int cudaStreamCreate(void **made) { return handle(made); }
int cudaStreamCreateWithFlags(void **made, unsigned flags) { return (void)flags, handle(made); }
int cudaEventCreate(void **made) { return handle(made); }
int cudaEventCreateWithFlags(void **made, unsigned flags) { return (void)flags, handle(made); }
int cudaMemPoolCreate(void **made, const void *wanted) { return (void)wanted, handle(made); }

/* Graphs. What is enqueued during a capture is carried out at once as well: kernels do nothing. */

int cudaStreamIsCapturing(void *stream, int *status) {
    (void)stream;
    return *status = capturing ? CAPTURE_ACTIVE : CAPTURE_NONE, SUCCESS;
}
int cudaStreamBeginCapture(void *stream, int mode) {
    COUNT();
    (void)stream, (void)mode;
    return capturing = 1, SUCCESS;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    COUNT();
    (void)stream;
    capturing = 0;
    return handle(graph);
}
int cudaGraphInstantiate(void **made, void *graph, unsigned long long flags) {
    COUNT();
    (void)graph, (void)flags;
    return handle(made);
}

/* Kernels */

void **__cudaRegisterFatBinary(void *binary) {
    static void *registered[4];
    (void)binary;
    return registered;
}
int cudaFuncGetAttributes(void *found, const void *kernel) {
    (void)kernel;
    return memset(found, 0, 64), SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                           int threads, size_t memory,
                                                           unsigned flags) {
    (void)kernel, (void)threads, (void)memory, (void)flags;
    return *blocks = 2, SUCCESS;
}

/* Errors */

const char *cudaGetErrorString(int error) { return error ? "error of a stub" : "no error"; }
const char *cudaGetErrorName(int error) { return error ? "cudaErrorOfAStub" : "cudaSuccess"; }
int cudaGetLastError(void) { return SUCCESS; }
int cudaPeekAtLastError(void) { return SUCCESS; }

/* Functions of the driver, by name: there is none, and callers have another way. */
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *result) {
    (void)name, (void)version, (void)flags;
    *function = NULL;
    if (result) *result = 1; /* cudaDriverEntryPointSymbolNotFound */
    return NOT_SUPPORTED;
}
