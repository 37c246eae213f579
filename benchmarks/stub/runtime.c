/* CUDA's runtime without a card: memory is address space that nobody can touch, kernels do nothing, copies to the card
 * are counted and dropped, and what is read from it is zero. Everything is done when it is issued. What CUDA refuses is
 * refused: memory beyond STUB_BYTES, launches that no card takes, copies between the wrong sides or over an end, and
 * what breaks a capture, but for work in a second stream that never joins the first. stub.py builds it, and says what
 * it is for. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define GRANULE ((size_t)2 << 20) /* the driver hands out pages of 2 MiB */
#define MOST_THREADS 1024
#define MOST_SHARED_BYTES (227 << 10)
#define PROCESSORS 68 /* those of an RTX 3080: split-K kernels ask */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last_error;

static struct { size_t kernels, captured, replays, used_bytes, peak_bytes, to_card_bytes, from_card_bytes; } count;

static size_t setting(const char *name, size_t otherwise) {
    const char *value = getenv(name);
    return value ? strtoull(value, NULL, 10) : otherwise;
}
static size_t capacity(void) { return setting("STUB_BYTES", (size_t)12 << 30); }
static int architecture(void) { return (int)setting("STUB_SM", 86); }

static cudaError_t refuse(cudaError_t error, const char *reason) {
    if (reason) fprintf(stderr, "stub: refused, %s\n", reason);
    return last_error = error;
}

__attribute__((destructor)) static void report(void) {
    if (count.kernels)
        fprintf(stderr, "stub: %zu kernels, %zu captured, %zu replays, %.3f GiB to the card, %.3f GiB from it, at most"
                " %.3f of %.3f GiB taken from the driver\n", count.kernels, count.captured, count.replays,
                count.to_card_bytes / 0x1p30, count.from_card_bytes / 0x1p30, count.peak_bytes / 0x1p30,
                capacity() / 0x1p30);
}

/* Streams and captures. Of the latter a process makes one at a time here. */

typedef struct { unsigned long long capture; unsigned flags; int priority; } Stream;
typedef struct { unsigned long long capture; struct timespec at; } Event;
typedef struct { size_t nodes; } Graph;

static Stream legacy_stream;
static struct { unsigned long long id, last_id; enum cudaStreamCaptureMode mode; int blocks, broken; Graph *graph; } capture;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread unsigned long long captured_here; /* the capture that this thread has begun */

static Stream *of(cudaStream_t stream) { return (size_t)stream <= 2 ? &legacy_stream : (Stream *)stream; }

static int is_capturing(Stream *stream) {
    if (stream->capture != capture.id) stream->capture = 0; /* it had joined one that is over */
    return stream->capture != 0;
}

/* A capture that met what it must not is good for nothing but its end, which fails, too. */
static cudaError_t breaks(cudaError_t error, const char *reason) {
    capture.broken = 1;
    return refuse(error, reason);
}

/* What waits for the whole card, or may. */
static cudaError_t unsafe(const char *what) {
    int is_forbidden = capture.id && thread_mode != cudaStreamCaptureModeRelaxed
        && (capture.mode == cudaStreamCaptureModeGlobal || captured_here == capture.id);
    return is_forbidden ? breaks(cudaErrorStreamCaptureUnsupported, what) : cudaSuccess;
}

/* What is put into a stream. */
static cudaError_t issue(cudaStream_t handle) {
    Stream *stream = of(handle);
    if (is_capturing(stream)) {
        if (capture.broken) return refuse(cudaErrorStreamCaptureInvalidated, NULL);
        capture.graph->nodes++;
        count.captured++;
    } else if (stream == &legacy_stream && capture.id && capture.blocks) {
        return breaks(cudaErrorStreamCaptureImplicit, "work in the legacy stream beside a capture in a blocking one");
    }
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    Stream *made = calloc(1, sizeof *made);
    *made = (Stream){.flags = flags, .priority = priority};
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = of(stream)->priority;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return is_capturing(of(stream)) ? breaks(cudaErrorStreamCaptureUnsupported, "a query of a captured stream")
                                    : unsafe("a stream's query during a capture");
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return is_capturing(of(stream)) ? breaks(cudaErrorStreamCaptureUnsupported, "a wait for a captured stream")
                                    : unsafe("a wait for a stream during a capture");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned flags) {
    Event *event = (Event *)handle;
    int is_of_this_capture = event->capture && event->capture == capture.id;
    if (is_of_this_capture) of(stream)->capture = capture.id;
    else if (is_capturing(of(stream))) return breaks(cudaErrorStreamCaptureIsolation, "an event from before a capture");
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
    call(stream, cudaSuccess, data);
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    if (!is_capturing(of(stream))) call(data);
    return issue(stream);
}
cudaError_t cudaDeviceSynchronize(void) { /* in whatever thread and mode */
    return capture.id ? breaks(cudaErrorStreamCaptureUnsupported, "a wait for the card during a capture") : cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (of(stream) == &legacy_stream) return refuse(cudaErrorStreamCaptureImplicit, "a capture of the legacy stream");
    if (capture.id) return refuse(cudaErrorIllegalState, "a second capture beside the first");
    capture.id = captured_here = of(stream)->capture = ++capture.last_id;
    capture.mode = mode;
    capture.broken = 0;
    capture.blocks = !(of(stream)->flags & cudaStreamNonBlocking);
    capture.graph = calloc(1, sizeof(Graph));
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!is_capturing(of(stream))) return refuse(cudaErrorIllegalState, "the end of a capture that is none");
    of(stream)->capture = capture.id = 0;
    *graph = (cudaGraph_t)(capture.broken ? NULL : capture.graph);
    return capture.broken ? refuse(cudaErrorStreamCaptureInvalidated, NULL) : cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n) {
    *status = !is_capturing(of(stream)) ? cudaStreamCaptureStatusNone
        : capture.broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    if (id) *id = of(stream)->capture;
    if (graph) *graph = (cudaGraph_t)capture.graph;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (n) *n = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return cudaStreamGetCaptureInfo(stream, status, NULL, NULL, NULL, NULL, NULL);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) {
    *n = ((Graph *)graph)->nodes;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = calloc(1, sizeof(Graph));
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { count.replays++; return issue(stream); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(Event));
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    ((Event *)event)->capture = is_capturing(of(stream)) ? capture.id : 0;
    clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->at);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return unsafe("an event's query during a capture"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return unsafe("a wait for an event during a capture"); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    struct timespec a = ((Event *)from)->at, b = ((Event *)to)->at;
    *ms = (b.tv_sec - a.tv_sec) * 1e3f + (b.tv_nsec - a.tv_nsec) * 1e-6f;
    return cudaSuccess;
}

/* Memory: the card's, and the host's that is page-locked. */

typedef struct Range { char *begin; size_t n_bytes; enum cudaMemoryType kind; struct Range *next; } Range;
static Range *ranges;

static void add(void *begin, size_t n_bytes, enum cudaMemoryType kind) {
    Range *made = malloc(sizeof *made);
    pthread_mutex_lock(&lock);
    *made = (Range){begin, n_bytes, kind, ranges};
    ranges = made;
    pthread_mutex_unlock(&lock);
}
/* The range that holds an address; one of type cudaMemoryTypeUnregistered where none does. */
static Range find(const void *address) {
    Range found = {.kind = cudaMemoryTypeUnregistered};
    pthread_mutex_lock(&lock);
    for (Range *range = ranges; range; range = range->next)
        if ((char *)address >= range->begin && (char *)address < range->begin + range->n_bytes) found = *range;
    pthread_mutex_unlock(&lock);
    return found;
}
static Range take_out(void *begin) {
    Range gone = {.kind = cudaMemoryTypeUnregistered};
    pthread_mutex_lock(&lock);
    for (Range **link = &ranges; *link; link = &(*link)->next)
        if ((*link)->begin == begin) {
            Range *range = *link;
            gone = *range;
            *link = range->next;
            free(range);
            break;
        }
    pthread_mutex_unlock(&lock);
    return gone;
}

cudaError_t cudaMalloc(void **made, size_t n_bytes) {
    cudaError_t refused = unsafe("cudaMalloc during a capture");
    if (refused) return refused;
    size_t whole_bytes = (n_bytes + GRANULE - 1) / GRANULE * GRANULE;
    pthread_mutex_lock(&lock);
    int fits = count.used_bytes + whole_bytes <= capacity();
    if (fits) count.used_bytes += whole_bytes;
    if (count.used_bytes > count.peak_bytes) count.peak_bytes = count.used_bytes;
    pthread_mutex_unlock(&lock);
    if (!fits) return refuse(cudaErrorMemoryAllocation, NULL);
    char *space = mmap(NULL, whole_bytes + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *begin = (char *)(((size_t)space + GRANULE - 1) / GRANULE * GRANULE);
    if (begin > space) munmap(space, begin - space);
    munmap(begin + whole_bytes, space + GRANULE - begin);
    add(begin, whole_bytes, cudaMemoryTypeDevice);
    *made = begin;
    return cudaSuccess;
}
cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    cudaError_t refused = unsafe("cudaFree during a capture");
    if (refused) return refused;
    Range gone = take_out(memory);
    if (gone.kind != cudaMemoryTypeDevice) return refuse(cudaErrorInvalidValue, "cudaFree of what is none of its own");
    munmap(gone.begin, gone.n_bytes);
    pthread_mutex_lock(&lock);
    count.used_bytes -= gone.n_bytes;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **made, size_t n_bytes, cudaStream_t stream) {
    return refuse(cudaErrorNotSupported, "cudaMallocAsync: use torch's own allocator");
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = capacity();
    *free_bytes = capacity() - count.used_bytes;
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **made, size_t n_bytes, unsigned flags) {
    if (posix_memalign(made, 4096, n_bytes ? n_bytes : 1)) return refuse(cudaErrorMemoryAllocation, NULL);
    add(*made, n_bytes, cudaMemoryTypeHost);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *memory) {
    take_out(memory);
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *memory, size_t n_bytes, unsigned flags) {
    if (find(memory).kind != cudaMemoryTypeUnregistered) return refuse(cudaErrorHostMemoryAlreadyRegistered, NULL);
    add(memory, n_bytes, cudaMemoryTypeHost);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *memory) {
    return take_out(memory).begin ? cudaSuccess : refuse(cudaErrorHostMemoryNotRegistered, NULL);
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    *found = (struct cudaPointerAttributes){.type = find(address).kind};
    return cudaSuccess;
}

static cudaError_t copy(void *target, const void *source, size_t n_bytes, enum cudaMemcpyKind kind) {
    Range to = find(target), from = find(source);
    int to_card = to.kind == cudaMemoryTypeDevice, from_card = from.kind == cudaMemoryTypeDevice;
    if (kind != cudaMemcpyDefault && (to_card != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice)
                                      || from_card != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice)))
        return refuse(cudaErrorInvalidValue, "a copy between other sides than was said");
    if ((to_card && (char *)target + n_bytes > to.begin + to.n_bytes)
        || (from_card && (char *)source + n_bytes > from.begin + from.n_bytes))
        return refuse(cudaErrorInvalidValue, "a copy over an end");
    if (to_card && !from_card) count.to_card_bytes += n_bytes;
    if (from_card && !to_card) {
        count.from_card_bytes += n_bytes;
        memset(target, 0, n_bytes);
    }
    if (!from_card && !to_card) memcpy(target, source, n_bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *target, const void *source, size_t n_bytes, enum cudaMemcpyKind kind) {
    cudaError_t refused = unsafe("cudaMemcpy during a capture");
    return refused ? refused : copy(target, source, n_bytes, kind);
}
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t n_bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    cudaError_t refused = issue(stream);
    return refused ? refused : copy(target, source, n_bytes, kind);
}
cudaError_t cudaMemsetAsync(void *target, int value, size_t n_bytes, cudaStream_t stream) { return issue(stream); }
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char room[1 << 20];
    *address = room;
    return cudaSuccess;
}

/* Kernels. */

static cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > MOST_THREADS
        || shared_bytes > MOST_SHARED_BYTES)
        return refuse(cudaErrorInvalidConfiguration, "a launch that no card takes");
    count.kernels++;
    return issue(stream);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                             cudaStream_t stream) {
    return launch(grid, block, shared_bytes, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                        size_t shared_bytes, cudaStream_t stream) {
    return launch(grid, block, shared_bytes, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                               cudaStream_t stream) {
    return launch(grid, block, shared_bytes, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
static __thread struct { dim3 grid, block; size_t shared_bytes; void *stream; } call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream) {
    call.grid = grid;
    call.block = block;
    call.shared_bytes = shared_bytes;
    call.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    *grid = call.grid;
    *block = call.block;
    *shared_bytes = call.shared_bytes;
    *(void **)stream = call.stream;
    return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    *found = (struct cudaFuncAttributes){.maxThreadsPerBlock = MOST_THREADS, .numRegs = 32,
        .ptxVersion = architecture(), .binaryVersion = architecture(), .maxDynamicSharedSizeBytes = 48 << 10};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared_bytes, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                          size_t shared_bytes) {
    *blocks = 2;
    return cudaSuccess;
}

/* The card. */

cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    *found = (struct cudaDeviceProp){.name = "no card", .totalGlobalMem = capacity(), .sharedMemPerBlock = 48 << 10,
        .regsPerBlock = 1 << 16, .warpSize = 32, .maxThreadsPerBlock = MOST_THREADS, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535}, .major = architecture() / 10, .minor = architecture() % 10,
        .textureAlignment = 512, .multiProcessorCount = PROCESSORS, .maxThreadsPerMultiProcessor = 1536,
        .sharedMemPerMultiprocessor = 100 << 10, .regsPerMultiprocessor = 1 << 16, .sharedMemPerBlockOptin = 99 << 10,
        .l2CacheSize = 5 << 20};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp card;
    cudaGetDeviceProperties(&card, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = card.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = card.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = card.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = card.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = card.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = card.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = card.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = card.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = card.regsPerBlock; break;
    case cudaDevAttrMaxGridDimX: *value = card.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = card.maxGridSize[1]; break;
    case cudaDevAttrWarpSize: *value = card.warpSize; break;
    case cudaDevAttrL2CacheSize: *value = card.l2CacheSize; break;
    default: *value = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *name, int n, int device) {
    snprintf(name, n, "0000:01:00.0");
    return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)&lock;
    return cudaSuccess;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "an error of the stub" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "refused by the stub";
    }
}
