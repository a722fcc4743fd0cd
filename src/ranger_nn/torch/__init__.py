"""PyTorch adapter: capture, kernels, module. The only room that imports torch."""
