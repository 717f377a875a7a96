"""Packed models without torch: loaded by mmap, run on ONNX Runtime, many sequences at a time."""
