"""Kernels of a GPU, in Triton. They also run under Triton's interpreter, on tensors of the CPU, where no GPU is."""
