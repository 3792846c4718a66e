/* Counters of calls, by function name. The stub of the CUDA runtime holds them for all stubs. */
#pragma once

#include <stddef.h>

struct calls {
    const char *name;
    long count, recorded;  /* recorded: those of them during the capture of a graph */
    size_t bytes, largest; /* copied, set or allocated: all calls together, and the largest */
    int listed;
    struct calls *next;
};

void stub_count(struct calls *calls, size_t bytes);

#define COUNT_BYTES(bytes)                              \
    do {                                                \
        static struct calls calls = {.name = __func__}; \
        stub_count(&calls, bytes);                      \
    } while (0)
#define COUNT() COUNT_BYTES(0)

/* A function that succeeds and does nothing. On x86-64 and arm64 a caller may pass any arguments. */
#define SUCCEEDS(name) \
    int name(void) {   \
        COUNT();       \
        return 0;      \
    }
