// Included instead of CUDA's own header; the types are in cuda_on_cpu.h.
