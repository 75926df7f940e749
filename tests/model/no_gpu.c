/* A CUDA driver and runtime with one device, as far as autograd asks while fake tensors are traced.
   Preloaded by test_compile_on_cuda.py; whatever is not here fails in the real ones. */

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
