/* A CUDA driver and runtime with one device, as far as autograd asks while fake tensors are traced.
   Preloaded by no_gpu.py; whatever is not here fails in the real ones. */

int cuInit(unsigned flags) { return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = *active = 0;
    return 0;
}

int cudaGetDeviceCount(int *count) {
    *count = 1;
    return 0;
}

int cudaGetDevice(int *device) {
    *device = 0;
    return 0;
}

int cudaSetDevice(int device) { return 0; }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return 0;
}

int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : 0; /* the compute capability's major number; SDPA asks */
    return 0;
}

/* Of cudaDeviceProp, which the caller has set to 0, what SDPA reads to choose a backend. */
int cudaGetDeviceProperties(char *properties, int device) {
    enum { MAJOR = 360 }; /* bytes from its begin, in CUDA 12 and 13 */
    *(int *)(properties + MAJOR) = 9;
    return 0;
}

int cudaGetDeviceProperties_v2(char *properties, int device) {
    return cudaGetDeviceProperties(properties, device);
}
