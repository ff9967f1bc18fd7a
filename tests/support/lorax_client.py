"""LoRAX's own client, unmodified, in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.client_venvs import client_python, run_in

REQUIREMENTS = ["lorax-client==0.6.3"]
_CALLS = Path(__file__).parent / "clients" / "lorax_calls.py"


def lorax_calls(url: str, calls: Sequence[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """What came of each call, in order; see clients/lorax_calls.py."""
    python = client_python("lorax", REQUIREMENTS)
    listed = directory / "calls.json"
    listed.write_text(json.dumps(calls))
    found: list[dict[str, Any]] = run_in(python, _CALLS, [url, str(listed)])
    assert len(found) == len(calls)
    return found
