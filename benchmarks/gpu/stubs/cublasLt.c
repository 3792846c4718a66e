/* cuBLASLt without a GPU: descriptions are empty, every product succeeds and computes nothing. */
#include "calls.h"

static char handle[64];

#define MAKES_HANDLE(name)             \
    int name(void **made) {            \
        COUNT();                       \
        return *made = handle, 0;      \
    }

MAKES_HANDLE(cublasLtCreate)
MAKES_HANDLE(cublasLtMatmulDescCreate)
MAKES_HANDLE(cublasLtMatmulPreferenceCreate)
MAKES_HANDLE(cublasLtMatrixLayoutCreate)
MAKES_HANDLE(cublasLtMatrixTransformDescCreate)
