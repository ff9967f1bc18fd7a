"""Before anything else is imported: without a GPU Triton interprets kernels, as it decides when they are defined.

And one thread for torch: two on a shared core can be twenty times slower than one on matrices as small as the tests'.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
