// When every kernel of every device began and ended, kernels of recorded graphs and of dependent launch included, with what
// CUPTI says. The driver loads this into a process by itself:
//
//   gcc -O2 -shared -fPIC -o libktrace.so inject.c -I CUDA/include -L CUDA/lib64 -lcupti
//   KTRACE_OUT=trace.bin CUDA_INJECTION64_PATH=$PWD/libktrace.so conclave bench ...
//   python3 layers.py trace.bin exchange_combine_bf16
//
// Writes rows of four 64-bit numbers: begin, end (ns), device << 32 | stream, name << 32 | grid; names a line each to
// KTRACE_OUT.names.
#include <cupti.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUFFER = 8 << 20, MOST_NAMES = 4096 };

static FILE *out;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *names[MOST_NAMES];
static int count;

static int index_of(const char *name) {
    for (int i = 0; i < count; i++)
        if (!strcmp(names[i], name)) return i;
    if (count == MOST_NAMES) return MOST_NAMES - 1;
    names[count] = strdup(name);
    return count++;
}

static void CUPTIAPI request(uint8_t **buffer, size_t *size, size_t *most) {
    *buffer = aligned_alloc(8, BUFFER);
    *size = BUFFER, *most = 0;
}

static void CUPTIAPI done(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    pthread_mutex_lock(&lock);
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL || !out) continue;
        const CUpti_ActivityKernel10 *kernel = (const CUpti_ActivityKernel10 *)record;
        const int64_t row[4] = {(int64_t)kernel->start, (int64_t)kernel->end, (int64_t)kernel->deviceId << 32 | kernel->streamId,
                                (int64_t)index_of(kernel->name ? kernel->name : "?") << 32 | (uint32_t)kernel->gridX};
        fwrite(row, sizeof row, 1, out);
    }
    pthread_mutex_unlock(&lock);
    free(buffer);
}

static void finish(void) {
    cuptiActivityFlushAll(1);
    pthread_mutex_lock(&lock);
    fclose(out);
    out = NULL;
    char path[4096];
    snprintf(path, sizeof path, "%s.names", getenv("KTRACE_OUT"));
    FILE *list = fopen(path, "w");
    for (int i = 0; list && i < count; i++) fprintf(list, "%s\n", names[i]);
    if (list) fclose(list);
    pthread_mutex_unlock(&lock);
}

int InitializeInjection(void) {
    const char *path = getenv("KTRACE_OUT");
    if (!path || !(out = fopen(path, "wb"))) return 1;
    cuptiActivityRegisterCallbacks(request, done);
    const CUptiResult result = cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    if (result != CUPTI_SUCCESS) fprintf(stderr, "CUPTI: error %d\n", result);
    atexit(finish);
    return 1;
}
