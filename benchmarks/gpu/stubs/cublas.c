/* cuBLAS without a GPU: every product succeeds and computes nothing. */
#include "calls.h"

int cublasCreate_v2(void **made) {
    static char handle[64];
    COUNT();
    return *made = handle, 0;
}
const char *cublasGetStatusName(int status) { return (void)status, "CUBLAS_STATUS_OF_A_STUB"; }
const char *cublasGetStatusString(int status) { return (void)status, "status of a stub"; }
