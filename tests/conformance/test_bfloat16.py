"""What bfloat16 costs: no more here than in transformers + PEFT, both held against the same weights in float32.

bfloat16 keeps 8 bits, so two orders of the same sums part after a few layers and no two right answers are equal; which
token is the likeliest may turn where two are close. So nothing is compared number by number. The truth is float32 over
the weights that the bfloat16 checkpoint holds. An answer's error is the root mean square of what its log-probabilities
differ from the truth by, relative to that of the truth itself; the root mean square, for the largest of ten thousand
errors is chance.

Bounds: our error is at most `FACTOR` times that of transformers + PEFT in bfloat16 (they keep an adapter's weights in
float32 beside a bfloat16 base, here they are rounded to the base's type: one more rounding of 2⁻⁹ a factor), and at
most `MOST` in itself: each of the 3 layers rounds its residual stream twice and what leads there some ten times, each
by up to 2⁻⁹, which adds up as √(3 · 12) · 2⁻⁹ = 1.2 %; random weights amplify it somewhat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conformance.cells import Answer, Asked, expected_logprobs, make_base, make_core, prompts, serve
from conformance.features import Feature, attention_only, make_feature_adapter
from conformance.shrinking import tiny_config
from support.models import make_tokenizer
from transformers import AutoModelForCausalLM

from loraplex.engines.protocol import Adapter

pytestmark = pytest.mark.usefixtures("quiet")

FACTOR = 1.5
MOST = 0.03
# Without experts to choose among: one that is chosen otherwise is no rounding error.
ARCHITECTURES = ("llama", "gpt2", "gemma2")


def _dora(model: Any) -> dict[str, Any]:
    return {**attention_only(model), "use_dora": True}


def error_of(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations this small
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(architecture: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_base(tiny_config(architecture), tmp_path / "exact").to(torch.bfloat16).save_pretrained(base)  # type: ignore[arg-type]
    make_tokenizer().save_pretrained(base)
    features = [Feature("lora", 8, attention_only), Feature("dora", 4, _dora)]
    trained = [make_feature_adapter(base, feature, tmp_path / feature.name, torch.bfloat16) for feature in features]
    theirs: dict[Adapter | None, Any] = {one.adapter: one.model for one in trained}
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs[None] = plain.eval()
    core = make_core(base, dtype="bfloat16")
    asked = [
        Asked(f"{number}-{adapter.name if adapter else None}", prompt, adapter)
        for number, prompt in enumerate(prompts(5)) for adapter in theirs
    ]  # fmt: skip
    answers = serve(core, asked)
    core.adapters.close()
    for adapter, model in theirs.items():
        exact: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            exact = peft.PeftModel.from_pretrained(exact, adapter.path)
        mine = [one for one in asked if one.adapter == adapter]
        truth = _logprobs(exact.eval(), mine, answers)
        ours = error_of(torch.cat([answers[one.name].logprobs for one in mine]), truth)
        reference = error_of(_logprobs(model, mine, answers), truth)
        assert 0 < ours <= MOST
        assert ours <= FACTOR * reference


def _logprobs(model: Any, asked: list[Asked], answers: dict[str, Answer]) -> torch.Tensor:
    return torch.cat([expected_logprobs(model, one, answers[one.name].tokens) for one in asked])
