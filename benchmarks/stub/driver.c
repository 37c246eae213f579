/* libcuda.so.1 without a card: the one context that there is, and the way in for kernels that were compiled apart. What
 * is asked for by name and is not here does nothing and reports success. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *const CONTEXT = (void *)0x1000;

static int nothing(void) { return 0; }
static int make(void **handle) {
    *handle = calloc(1, 256);
    return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuGetExportTable(const void **table, const void *id) { return 500; /* CUDA_ERROR_NOT_FOUND; NVRTC asks */ }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return cudaDeviceGetAttribute(value, attribute, device); /* the two count alike */
}
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 1, 16); return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    *flags = 0;
    *is_active = 1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return 0; }
int cuCtxGetCurrent(void **context) { *context = CONTEXT; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = error ? "refused by the stub" : "no error"; return 0; }
int cuGetErrorName(int error, const char **name) { *name = error ? "an error of the stub" : "CUDA_SUCCESS"; return 0; }

int cuModuleLoadData(void **module, const void *image) { return make(module); }
int cuModuleGetFunction(void **kernel, void *module, const char *name) { return make(kernel); }
int cuLibraryLoadData(void **library, const void *image) { return make(library); }
int cuLibraryGetKernel(void **kernel, void *library, const char *name) { return make(kernel); }
int cuKernelGetFunction(void **function, void *kernel) { *function = kernel; return 0; }
int cuLaunchKernel(void *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, cudaStream_t stream, void **arguments, void **more) {
    dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}
struct config { unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes; cudaStream_t stream; };
int cuLaunchKernelEx(const struct config *of, void *kernel, void **arguments, void **more) {
    return cuLaunchKernel(kernel, of->grid_x, of->grid_y, of->grid_z, of->block_x, of->block_y, of->block_z,
                          of->shared_bytes, of->stream, arguments, more);
}

int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", name);
    *found = dlsym(self, newer);
    if (!*found) *found = dlsym(self, name);
    if (!*found) *found = (void *)nothing;
    if (status) *status = 0;
    return 0;
}
