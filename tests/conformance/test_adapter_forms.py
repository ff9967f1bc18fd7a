"""Features of adapters that meet in one module, each served and held against PEFT on a base where they do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import make_base, run_cell
from conformance.features import Feature
from support.models import llama_config

QV = ["q_proj", "v_proj"]
# How PEFT is asked, and whether the base ties its head to its embeddings.
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "tokens-and-lora-of-tied-head": (
        {"target_modules": [*QV, "lm_head"], "trainable_token_indices": [50, 3]}, True,
    ),
    "tokens-and-biased-lora-of-tied-head": (
        {"target_modules": [*QV, "lm_head"], "trainable_token_indices": [50, 3], "lora_bias": True}, True,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about tied weights
@pytest.mark.parametrize("name", FORMS)
def test_form_is_served_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    options, is_tied = FORMS[name]
    make_base(llama_config(tie_word_embeddings=is_tied), tmp_path / "base")
    outcome = run_cell(tmp_path / "base", Feature(name, 4, lambda model: options))
    assert outcome.is_exact
    assert outcome.is_forced
