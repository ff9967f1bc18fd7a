"""The record of every cell, and the page made from it.

    PYTHONPATH=.src:tests python -m conformance.matrix            # compute everything anew, then write both
    PYTHONPATH=.src:tests python -m conformance.matrix llama opt  # only these rows
    PYTHONPATH=.src:tests python -m conformance.matrix --page     # the page alone

`matrix.json` says of each architecture why it is refused, or of each feature `exact`, `none` (nothing it could be
about) or why it is refused. The tests compute cells again and compare.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers
from conformance.cells import make_base, make_core, run_cell
from conformance.features import FEATURES, Feature, NotApplicable
from conformance.shrinking import tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex.engines.errors import AdapterError, ModelNotServable

RECORD = Path(__file__).with_name("matrix.json")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
ARCHITECTURES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def row_of(architecture: str, features: tuple[Feature, ...] = FEATURES) -> dict[str, str]:
    """Outcome by feature; a single entry `refused` where the architecture is."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = Path(folder) / "base"
        try:
            make_base(tiny_config(architecture), base)
        except Exception as error:  # noqa: BLE001  whatever foreign code raises is recorded
            return {"refused": _in_words(f"transformers cannot make a small one: {error!r}", base)}
        try:
            make_core(base, num_blocks=None).adapters.close()
        except ModelNotServable as error:
            return {"refused": _in_words(str(error), base)}
        return {feature.name: outcome_of(base, feature) for feature in features}


def outcome_of(base: Path, feature: Feature) -> str:
    try:
        outcome = run_cell(base, feature)
    except NotApplicable:
        return "none"
    except AdapterError as error:
        return _in_words(f"refused: {error}", base)
    except Exception as error:  # noqa: BLE001  whatever foreign code raises is recorded
        return _in_words(f"PEFT cannot: {error!r}", base)
    if not outcome.is_forced:
        return f"nothing was forced: {outcome}"
    return "exact" if outcome.is_exact else f"wrong: {outcome}"


def _in_words(message: str, base: Path) -> str:
    return " ".join(message.replace(f"{base}: ", "").replace(str(base), "").split())[:240]


def page(record: dict[str, dict[str, str]]) -> str:
    served = {name: row for name, row in record.items() if "refused" not in row}
    lines = [
        "# Compatibility",
        "",
        "Which decoders and which adapters are served, and with which right that is said. Made from the results of",
        "`tests/conformance` by `python -m conformance.matrix`; nothing here is written by hand.",
        "",
        f"With transformers {transformers.__version__}, PEFT {peft.__version__} and torch {torch.__version__}, every",
        f"decoder that `AutoModelForCausalLM` knows ({len(record)}) was made small, with random weights, and an",
        "adapter of each kind was made by PEFT. `✓`: served in mixed batches with base and another adapter, with",
        "prompts cut at chunk borders, prefixes found in the cache, sequences preempted, and again after the adapter",
        "was dropped and read anew, every log-probability of every answer is within 1e-4 (relative, float32) of",
        "transformers + PEFT, and every greedy token is equal. A number refers to the reason below; an empty cell: the",
        "architecture has nothing that the feature could be about. A model that is refused is refused when the server",
        "starts, an adapter when it is registered, each with that reason.",
        "",
        "One cell by itself:",
        "",
        "    python -m pytest 'tests/conformance/test_matrix.py::test_cell[llama-dora]' -m 'slow or not slow'",
        "",
        f"## Served: {len(served)}",
        "",
        "| architecture | " + " | ".join(feature.name for feature in FEATURES) + " |",
        "|---" * (len(FEATURES) + 1) + "|",
    ]
    reasons: dict[str, int] = {}
    for name, row in served.items():
        cells = []
        for feature in FEATURES:
            outcome = row[feature.name]
            short = {"exact": "✓", "none": ""}.get(outcome)
            cells.append(short if short is not None else str(reasons.setdefault(outcome, len(reasons) + 1)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {_escaped(reason)}" for reason, number in reasons.items())]
    refused = {name: row["refused"] for name, row in record.items() if "refused" in row}
    lines += ["", f"## Refused: {len(refused)}", "", "| architecture | reason |", "|---|---|"]
    lines += [f"| {name} | {_escaped(reason)} |" for name, reason in refused.items()]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def read_record() -> dict[str, dict[str, str]]:
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    return record


def _write(record: dict[str, dict[str, str]]) -> None:
    ordered = {name: record[name] for name in sorted(record)}
    RECORD.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(ordered))


def main(arguments: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    record = read_record() if RECORD.is_file() else {}
    chosen = [name for name in arguments if not name.startswith("--")] or list(ARCHITECTURES)
    began = time.monotonic()
    for name in [] if "--page" in arguments else chosen:
        record[name] = row_of(name)
        counts = Counter(outcome.split(":")[0] for outcome in record[name].values())
        print(
            f"{time.monotonic() - began:7.0f} s  {name:28s} {record[name].get('refused') or dict(counts)}", flush=True
        )
        _write(record)
    _write(record)


if __name__ == "__main__":
    main(sys.argv[1:])
