"""Before anything is imported: without a GPU the Triton kernels are interpreted, which is decided when they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
