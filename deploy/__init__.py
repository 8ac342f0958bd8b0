"""ONNX to engine, and what is measured on the engine: needs TensorRT and numpy, never torch or onnx."""
