"""LoRA beside a linear layer: y += scale · (x · Aᵀ) · B for tokens of many adapters at once."""
