"""Models that our steps cannot carry are refused when they are loaded, each with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.cells import make_base, make_core
from conformance.shrinking import tiny_config

from loraplex.engines.errors import ModelNotServable


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bart", "computed in steps its logits differ from transformers' own"),  # counts positions by what is cached
        ("zaya", "computed in steps its logits differ from transformers' own"),  # mixes neighbouring tokens
        ("qwen3_next", "layers [0, 1, 2] do not go through transformers' attention interface"),
        ("mamba", "do not use its attention interface"),
        ("doge", "make attention masks of their own"),
    ],
)
def test_model_that_steps_would_compute_wrongly_is_refused(architecture: str, reason: str, tmp_path: Path) -> None:
    make_base(tiny_config(architecture), tmp_path)
    with pytest.raises(ModelNotServable, match="is not served") as refusal:
        make_core(tmp_path, num_blocks=None)
    assert reason in str(refusal.value)


def test_window_that_the_attention_function_is_not_told_of_bounds_the_context(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.layer_types, config.sliding_window = ["sliding_attention"] * 4, 8
    make_base(config, tmp_path)
    with pytest.raises(ModelNotServable, match=r"set model\.max_model_len to at most 8"):
        make_core(tmp_path, num_blocks=None)
