"""Cells of the table, computed anew and held against the record; and the page against the record.

python -m pytest -m "slow or not slow" "tests/conformance/test_matrix.py::test_cell[llama-dora]"
python -m pytest -m slow tests/conformance/test_matrix.py        # every cell
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance.cells import make_base
from conformance.features import FEATURE
from conformance.matrix import ARCHITECTURES, PAGE, VERSIONS, outcome_of, page, read_record, row_of
from conformance.shrinking import tiny_config

pytestmark = pytest.mark.usefixtures("quiet")

RECORD = read_record()
# Computed in every run: each feature once, on an architecture that does what the feature is about in its own way.
SAMPLE = {
    *("llama-rank-256", "qwen2-dora", "gpt2-modules-to-save", "gemma2-rslora", "phi3-all-linear", "mixtral-experts"),
    *("falcon-lora", "deepseek_v3-patterns", "opt-bias-all", "gemma-token-indices", "bloom-refused", "mamba-refused"),
    *("glm_moe_dsa-refused", "jetmoe-lora"),
}


def _cells() -> Iterator[object]:
    for architecture, row in RECORD.rows.items():
        for feature in row:
            name = f"{architecture}-{feature}"
            yield pytest.param(architecture, feature, id=name, marks=[] if name in SAMPLE else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations this small
@pytest.mark.parametrize(("architecture", "feature"), list(_cells()))
def test_cell(architecture: str, feature: str, tmp_path: Path) -> None:
    expected = RECORD.rows[architecture][feature]
    if feature == "refused":
        assert row_of(architecture) == {"refused": expected}
        return
    make_base(tiny_config(architecture), tmp_path / "base")
    assert outcome_of(tmp_path / "base", FEATURE[feature]) == expected


def test_sample_has_every_cell_that_it_names() -> None:
    cells = {f"{architecture}-{feature}" for architecture, row in RECORD.rows.items() for feature in row}
    assert cells >= SAMPLE


def test_nothing_is_served_wrong_and_nothing_was_left_unforced() -> None:
    outcomes = {
        outcome.split(":")[0] for row in RECORD.rows.values() for outcome in row.values() if "refused" not in row
    }
    assert outcomes <= {"exact", "none", "refused", "PEFT cannot"}


def test_page_is_made_from_the_record() -> None:
    assert PAGE.read_text() == page(RECORD)


def test_record_knows_every_architecture_that_transformers_does() -> None:
    if RECORD.versions["transformers"] != VERSIONS["transformers"]:
        pytest.skip(f"the record is of transformers {RECORD.versions['transformers']}")
    assert RECORD.architectures == list(ARCHITECTURES)
    assert set(RECORD.rows) <= set(ARCHITECTURES)
