"""The JSON files of one `gpu_check.sh` as Markdown tables.

python bench/gpu_summary.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(rows: list[dict[str, object]]) -> str:
    """One row a figure; numbers to three places."""
    if not rows:
        return ""
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    directory = Path(sys.argv[1])
    print(f"# {directory.name}\n")
    for path in sorted(directory.glob("*.json")):
        found = json.loads(path.read_text())
        print(f"## {path.stem}\n\n{table(found['figures'] if isinstance(found, dict) else found)}\n")


if __name__ == "__main__":
    main()
