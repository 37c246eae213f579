/* What cuBLAS, cuBLASLt and cuDNN answer where nothing is computed: they have a handle, one algorithm for everything,
 * and need no workspace but the one that torch gives them. */

#include <cuda_runtime_api.h>
#include <cudnn_version.h>
#include <stdlib.h>
#include <string.h>

static int make(void **handle) {
    *handle = calloc(1, 4096);
    return 0;
}
static int drop(void *handle) {
    free(handle);
    return 0;
}
static int product(cudaStream_t stream) {
    return cudaLaunchKernel(NULL, (dim3){1, 1, 1}, (dim3){1, 1, 1}, NULL, 0, stream) ? 13 /* EXECUTION_FAILED */ : 0;
}

int cublasCreate_v2(void **handle) { return make(handle); }
int cublasDestroy_v2(void *handle) { return drop(handle); }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasSetStream_v2(void *handle, cudaStream_t stream) { *(cudaStream_t *)handle = stream; return 0; }

#define PRODUCT(name) int name(void *handle) { return product(*(cudaStream_t *)handle); }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSdot_v2)

size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return make(made); }
int cublasLtMatmulDescDestroy(void *made) { return drop(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return make(made); }
int cublasLtMatmulPreferenceDestroy(void *made) { return drop(made); }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long rows, unsigned long columns, long stride) {
    return make(made);
}
int cublasLtMatrixLayoutDestroy(void *made) { return drop(made); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int most, void *found, int *n) {
    memset(found, 0, 96); /* sizeof(cublasLtMatmulHeuristicResult_t): success, without a workspace */
    *n = 1;
    return 0;
}
int cublasLtMatmul(void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    return product(stream);
}

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(int status) { return status ? "refused by the stub" : "CUDNN_STATUS_SUCCESS"; }
int cudnnCreate(void **handle) { return make(handle); }
int cudnnSetStream(void *handle, cudaStream_t stream) { *(cudaStream_t *)handle = stream; return 0; }
int cudnnBackendCreateDescriptor(int type, void **made) { return make(made); }
int cudnnBackendDestroyDescriptor(void *made) { return drop(made); }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long most, long *n, void *found) {
    static const size_t widths[] = {[1] = 4, [2] = 1, [3] = 8}; /* CUDNN_TYPE_DATA_TYPE, _BOOLEAN and _INT64 */
    if (n) *n = 1;
    if (found && most > 0 && type >= 1 && type <= 3) memset(found, 0, widths[type]);
    return 0;
}
int cudnnBackendExecute(void *handle, void *plan, void *pack) { return product(*(cudaStream_t *)handle); }
