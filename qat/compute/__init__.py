"""How training and calibration compute: device, types, processes, compilation, CUDA kernels."""
