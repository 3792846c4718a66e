/* cuDNN without a GPU, for a process in which a PyTorch with CUDA needs it. ONNX Runtime opens it if
 * it is there, and runs no node of ours with it. */
#include "calls.h"

int cudnnCreate(void **made) {
    static char handle[64];
    COUNT();
    return *made = handle, 0;
}
/* Older than the version from which ONNX Runtime computes attention with cuDNN. */
size_t cudnnGetVersion(void) { return 90000; }
const char *cudnnGetErrorString(int status) { return (void)status, "status of a stub"; }
SUCCEEDS(cudnnDestroy)
SUCCEEDS(cudnnSetStream)
