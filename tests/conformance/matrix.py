"""The record of every cell, and the page made from it.

    PYTHONPATH=.src:tests python -m conformance.matrix            # compute everything anew, then write both
    PYTHONPATH=.src:tests python -m conformance.matrix llama opt  # only these rows
    PYTHONPATH=.src:tests python -m conformance.matrix --missing  # the rows that are not in the record
    PYTHONPATH=.src:tests python -m conformance.matrix --page     # the page alone

`matrix.json` says with which versions it was made (those of the last run), and of each architecture why it is refused,
or of each feature `exact`, `none` (nothing it could be about) or why it is refused. `test_matrix.py` computes cells
again and compares.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
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
VERSIONS = {"transformers": transformers.__version__, "PEFT": peft.__version__, "torch": torch.__version__}

Rows = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Record:
    """Rows by architecture: outcomes by feature, or a single one, `refused`; `architectures` are all there are."""

    versions: dict[str, str]
    architectures: list[str]
    rows: Rows


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
    """Without what another machine would say otherwise: paths, and how far off logits are, to its last digit."""
    message = message.replace(f"{base}: ", "").replace(str(base), "")
    return " ".join(re.sub(r"by [\d.]+%", "by more than rounding", message).split())[:240]


def page(record: Record) -> str:
    served = {name: row for name, row in record.rows.items() if "refused" not in row}
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [
        "# Compatibility",
        "",
        "Which decoders and which adapters are served, and with which right that is said. Made from the results of",
        "`tests/conformance` by `PYTHONPATH=.src:tests python -m conformance.matrix`; nothing here is written by hand.",
        "",
        f"With {versions}, every decoder that",
        f"`AutoModelForCausalLM` knows ({len(record.architectures)}) was made small, with random weights, and an",
        "adapter of each kind was made by PEFT. `✓`: served in mixed batches with base and another adapter, with",
        "prompts cut at chunk borders, prefixes found in the cache, sequences preempted, and again after the adapter",
        "was dropped and read anew, every log-probability of every answer is within 1e-4 (relative, float32) of",
        "transformers + PEFT, and every greedy token is equal. A number refers to the reason below; an empty cell: the",
        "architecture has nothing that the feature could be about. A model that is refused is refused when the server",
        "starts, an adapter when it is registered, each with that reason. What attends in chunks (Llama 4) is served",
        "as far as one chunk goes: `model.max_model_len` has to say so.",
        "",
        "One cell by itself:",
        "",
        "    python -m pytest -m 'slow or not slow' 'tests/conformance/test_matrix.py::test_cell[llama-dora]'",
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
    refused = {name: row["refused"] for name, row in record.rows.items() if "refused" in row}
    lines += ["", f"## Refused: {len(refused)}", "", "| architecture | reason |", "|---|---|"]
    lines += [f"| {name} | {_escaped(reason)} |" for name, reason in refused.items()]
    if missing := [name for name in record.architectures if name not in record.rows]:
        lines += ["", f"## Not computed yet: {len(missing)}", "", ", ".join(missing)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def read_record() -> Record:
    return Record(**json.loads(RECORD.read_text()))


def _write(rows: Rows) -> None:
    record = Record(VERSIONS, list(ARCHITECTURES), {name: rows[name] for name in sorted(rows)})
    RECORD.write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(record))


def main(arguments: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    rows = read_record().rows if RECORD.is_file() else {}
    chosen = [name for name in arguments if not name.startswith("--")] or list(ARCHITECTURES)
    began = time.monotonic()
    if "--missing" in arguments:
        chosen = [name for name in ARCHITECTURES if name not in rows]
    for name in [] if "--page" in arguments else chosen:
        rows[name] = row_of(name)
        counts = Counter(outcome.split(":")[0] for outcome in rows[name].values())
        print(f"{time.monotonic() - began:7.0f} s  {name:28s} {rows[name].get('refused') or dict(counts)}", flush=True)
        _write(rows)
    _write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
