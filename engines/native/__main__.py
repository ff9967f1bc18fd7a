"""The engine's own process, started by `engine.NativeEngine`: `python -m loraplex.engines.native ADDRESS`."""

import gc

gc.disable()  # to import torch and transformers leaves nothing to collect; looking for it takes a seventh of the time

from loraplex.engines.native.worker import main  # noqa: E402

main()
