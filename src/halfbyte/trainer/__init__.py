"""Teach a model to live on a coarse grid: quantization-aware training by distillation from itself."""
