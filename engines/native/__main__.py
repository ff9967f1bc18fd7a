"""The engine's own process, started by `engine.NativeEngine`: `python -m loraplex.engines.native ADDRESS`."""

import gc
import signal

# Both go to the whole group, from a terminal or a service manager; the parent decides, and ends this process.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
gc.disable()  # to import torch and transformers leaves nothing to collect; looking for it takes a seventh of the time

from loraplex.engines.native.worker import main  # noqa: E402

main()
