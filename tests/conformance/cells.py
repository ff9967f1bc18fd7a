"""One cell of the table: an architecture with a feature of adapters, served and held against transformers + PEFT.

    python -m pytest -m "slow or not slow" "tests/conformance/test_matrix.py::test_cell[llama-dora]"

A cell serves base, the adapter and a plain second one in mixed batches of few blocks and little budget, so that
prompts are cut at chunk borders, prefixes are found and sequences are preempted; then everything again after the
adapter was dropped and read anew. Every log-probability of every answer is compared.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conformance.features import Feature, attention_only, make_feature_adapter
from conformance.shrinking import VOCABULARY
from support.models import make_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

MAX_LEN = 96
ANSWER = 10
# Of the largest absolute log-probability of the answer. float32: rounding alone, in another order of summation.
TOLERANCE = 1e-4
# Of random weights, in standard deviations of 1/√width: so large that attention is far from uniform.
GAIN = 2.0
# Where layers repeat so often that rounding grows until two float32 computations of the formula differ by as much as
# the tolerance: transformers is 5e-4 away from float64 for hrm_text, 4e-5 for longcat_flash (and ours 8e-5).
GAINS = {"hrm_text": 1.25, "longcat_flash": 1.25}


@dataclass(frozen=True)
class Asked:
    """One request of a cell."""

    name: str
    prompt: tuple[int, ...]
    adapter: Adapter | None


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and, for each, the log-probabilities of the whole vocabulary. logprobs: Shape [N, V]."""

    tokens: list[int]
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """What a cell showed: the largest relative error, and how often what was forced did happen."""

    error: float
    num_different_tokens: int
    num_preemptions: int
    num_cached: int
    changed: bool

    @property
    def is_exact(self) -> bool:
        return self.error <= TOLERANCE and self.num_different_tokens == 0

    @property
    def is_forced(self) -> bool:
        """Whether the cell shows anything: sequences were preempted, prefixes found, and the adapter had an effect."""
        return self.num_preemptions > 0 and self.num_cached > 0 and self.changed


def make_base(config: PretrainedConfig, directory: Path, seed: int = 0) -> PreTrainedModel:
    """A random model all of whose parameters matter: biases and norms are not left at zero and one."""
    torch.manual_seed(seed)
    gain = GAINS.get(config.model_type, GAIN)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, gain / parameter.shape[-1] ** 0.5)
            else:  # in proportion to scales that are small at first: noise would turn them into something else
                size = float(parameter.abs().mean())
                parameter.add_(torch.randn_like(parameter), alpha=0.1 * min(size, 1.0) if size else 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return model


def serve(core: EngineCore, asked: list[Asked], seconds: float = 100.0) -> dict[str, Answer]:
    """Answer all of them together. Raises the first error that any of them met."""
    vocabulary = core._machine.info.vocab_size
    for one in asked:
        sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True, num_logprobs=vocabulary)
        core.submit(GenerateRequest(
            request_id=one.name, prompt_token_ids=one.prompt, adapter=one.adapter, sampling=sampling
        ))  # fmt: skip
    got: dict[str, list[Emission]] = {one.name: [] for one in asked}
    deadline = time.monotonic() + seconds
    while core.has_work:
        assert time.monotonic() < deadline, "the engine did not finish"
        for emission in core.step():
            if emission.error is not None:
                raise emission.error
            got[emission.sequence.request_id].append(emission)
        if not core.scheduler.running:
            time.sleep(0.001)  # adapters are being read
    return {name: _answer(emissions, vocabulary) for name, emissions in got.items()}


def _answer(emissions: list[Emission], vocabulary: int) -> Answer:
    tokens, rows = [], torch.empty(len(emissions), vocabulary)
    for row, emission in enumerate(emissions):
        assert emission.sampled is not None
        assert emission.sampled.logprobs is not None
        tokens.append(emission.sampled.token_id)
        for token, logprob in emission.sampled.logprobs.top:
            rows[row, token] = logprob
    return Answer(tokens, rows)


@torch.inference_mode()
def expected_logprobs(model: Any, one: Asked, answer: list[int], **options: Any) -> torch.Tensor:
    """Of each token of the answer, by transformers (+ PEFT) without a cache. Shape [len(answer), V]."""
    ids = torch.tensor([[*one.prompt, *answer[:-1]]])
    logits = model(input_ids=ids, use_cache=False, **options).logits[0]
    return torch.log_softmax(logits[len(one.prompt) - 1 :].float(), dim=-1)


def num_different(answer: Answer, expected: torch.Tensor) -> int:
    """Tokens that are less likely than the likeliest by more than rounding explains: those that tie may go either way.

    expected: log-probabilities. Shape [N, V]. Where none is further from its own than e, a lead of 2e may be lost.
    """
    rounding = 2 * (answer.logprobs - expected).abs().amax(-1)
    leads = expected.amax(-1) - expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    return int((~(leads <= rounding)).sum())  # what is no number is different


def relative_error(answer: Answer, expected: torch.Tensor) -> float:
    return float((answer.logprobs - expected).abs().max() / expected.abs().max())


def prompts(seed: int) -> list[tuple[int, ...]]:
    """Lengths around the chunk border and the blocks' borders; the last two begin like others."""
    draw = random.Random(seed)
    lengths = (5, 17, 26, 12)
    texts = [tuple(draw.choices(range(3, VOCABULARY - 8), k=length)) for length in lengths]
    return [*texts, texts[1][:16] + texts[2][:9], texts[2][:20] + texts[0]]


def run_cell(directory: Path, feature: Feature, *, dtype: str = "float32") -> Outcome:
    """Raises ModelNotServable or AdapterError where the cell is refused."""
    core = make_core(directory, dtype)
    kind = getattr(torch, dtype)
    trained = make_feature_adapter(directory, feature, directory.parent / feature.name, kind)
    other = make_feature_adapter(
        directory, Feature("other", rank=3, options=attention_only), directory.parent / "other", kind
    )
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
    models = {trained.adapter: trained.model, other.adapter: other.model, None: base.eval()}
    try:
        first = [
            Asked(f"{adapter.name if adapter else 'base'}-{number}", prompt, adapter)
            for number, prompt in enumerate(prompts(1))
            for adapter in models
        ]
        answers = serve(core, first)
        core.adapters.unload(trained.adapter.id)
        core.adapters.unload(other.adapter.id)
        again = [Asked(f"again-{number}", prompt, trained.adapter) for number, prompt in enumerate(prompts(2)[:3])]
        again.append(Asked("base-again", prompts(2)[0], None))
        answers |= serve(core, again)
        for number, who in enumerate([trained.adapter, None]):  # one by one, so that their beginnings are still there
            prompt = prompts(2)[2 if who else 0]
            found = [Asked(f"kept-{number}", prompt, who), Asked(f"found-{number}", prompt[:-2] + prompt[:9], who)]
            for one in found:
                answers |= serve(core, [one])
            again += found
        error, different = 0.0, 0
        for one in first + again:
            expected = expected_logprobs(models[one.adapter], one, answers[one.name].tokens)
            error = max(error, relative_error(answers[one.name], expected))
            different += num_different(answers[one.name], expected)
        stats = core.stats()
    finally:
        core.adapters.close()
    changed = any(
        not torch.equal(answers[f"{feature.name}-{n}"].logprobs[0], answers[f"base-{n}"].logprobs[0]) for n in (0, 1)
    )
    return Outcome(error, different, stats.total_preemptions, stats.total_cached_prompt_tokens, changed)


def run_few(core: EngineCore, adapter: Adapter, model: Any) -> Outcome:
    """Two prompts beside the base's, held against `model`; nothing is forced."""
    asked = [Asked(f"{who}-{number}", text, adapter if who == "own" else None)
             for number, text in enumerate(prompts(1)[1:3]) for who in ("own", "base")]  # fmt: skip
    answers = serve(core, asked)
    error, different, changed = 0.0, 0, True
    for number, one in enumerate(asked[::2]):
        expected = expected_logprobs(model, one, answers[one.name].tokens)
        error = max(error, relative_error(answers[one.name], expected))
        different += num_different(answers[one.name], expected)
        changed &= not torch.equal(answers[one.name].logprobs[0], answers[f"base-{number}"].logprobs[0])
    return Outcome(error, different, 0, 0, changed)


def make_core(directory: Path, dtype: str = "float32", num_blocks: int | None = 26, **engine: Any) -> EngineCore:
    """A core with so few blocks that the cells' requests preempt each other."""
    roomy = load_machine(settings(directory, dtype=dtype, **engine), lambda progress: None)
    if num_blocks is None:
        return EngineCore(roomy)
    block_bytes = (roomy.settings.engine.kv_cache_bytes or 0) // roomy.num_kv_blocks
    few = settings(directory, dtype=dtype, kv_cache_bytes=num_blocks * block_bytes, **engine)
    return EngineCore(load_machine(few, lambda progress: None))


def settings(directory: Path, *, dtype: Any = "float32", device_bytes: int = 2**24, **engine: Any) -> Settings:
    options = {"kv_block_size": 4, "max_batch_tokens": 13, "num_threads": 1, "kv_cache_bytes": 2**22, **engine}
    return Settings(
        model=Model(path=str(directory), name="tiny", dtype=dtype, device="cpu", max_model_len=MAX_LEN),
        engine=EngineSettings(**options),
        adapters=Adapters(device_bytes=device_bytes),
    )
