/* The driver's library without a GPU, as far as runtime/system/host.py asks it. */
#include <stddef.h>
#include <string.h>

int cuInit(unsigned flags) { return (void)flags, 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetName(char *name, int size, int device) {
    (void)device;
    strncpy(name, "stub of a GPU", size);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = 80L << 30, 0; }

/* Compute capability 9.0: attributes 75 and 76 of CUdevice_attribute. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    return *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1, 0;
}
