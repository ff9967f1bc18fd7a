"""A process that fills a disk cache until it is killed: `python cache_writer.py <cache> <max bytes> <seed>`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from loraplex.engines.adapters.disk import DiskCache


def main() -> None:
    cache = DiskCache(Path(sys.argv[1]), int(sys.argv[2]))
    chance = random.Random(int(sys.argv[3]))
    print("ready", flush=True)
    while True:
        with cache.stage() as workspace:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (workspace.files / name).write_bytes(chance.randbytes(chance.randrange(1, 200_000)))
            stored = cache.commit(workspace)
            cache.remember("source", str(chance.randrange(20)), stored.id, workspace)


if __name__ == "__main__":
    main()
