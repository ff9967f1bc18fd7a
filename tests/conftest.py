"""Before anything else is imported: without a GPU Triton interprets kernels, as it decides when they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
