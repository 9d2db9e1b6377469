// Found in place of CUDA's own; the types are in cuda_on_cpu.h.
