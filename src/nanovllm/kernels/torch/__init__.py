"""The oracle: plain PyTorch, any device."""
