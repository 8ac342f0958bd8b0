"""What computes, and how: device, types, processes, compilation, kernels."""
