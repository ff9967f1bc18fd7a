"""The headers of LoRAX's answers. Times are whole milliseconds."""

import time
from urllib.parse import quote

from loraplex.engines.protocol import EngineInfo, TokenEvent
from loraplex.gateway.lorax.details import Answer
from loraplex.gateway.lorax.wire import Parameters

Headers = list[tuple[bytes, bytes]]


class Stopwatch:
    """When a request came, was found good, and had its first token, by a clock without a date; seconds in the queue."""

    def __init__(self) -> None:
        self.began = self.validated_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.queue_seconds = 0.0

    def validated(self) -> None:
        self.validated_at = time.perf_counter()

    def see(self, number: int, event: TokenEvent) -> None:
        """An event of a choice has come."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
            self.queue_seconds = event.queue_seconds


def stream_headers(inputs: str, parameters: Parameters, info: EngineInfo) -> Headers:
    """What is known before the answer."""
    merged = parameters.merged_adapters
    adapter_id = ",".join(merged.ids) if merged else parameters.adapter_id
    told: dict[str, str | int] = {
        "x-compute-type": "gpu+optimized" if info.device.startswith("cuda") else info.device,
        "x-compute-characters": len(inputs),
        "x-model-id": info.base_model,
    }
    if adapter_id:
        told["x-adapter-id"] = adapter_id
    if parameters.adapter_source:
        told["x-adapter-source"] = parameters.adapter_source
    return _encoded(told)


def whole_headers(watch: Stopwatch, answer: Answer, num_prompt_tokens: int) -> Headers:
    """What is known after it. The time of inference begins when a step takes the request up."""
    now = time.perf_counter()
    first = now if watch.first_token_at is None else watch.first_token_at
    total, inference = now - watch.began, now - watch.validated_at - watch.queue_seconds
    return _encoded(
        {
            "x-compute-time": _ms(total),
            "x-total-time": _ms(total),
            "x-validation-time": _ms(watch.validated_at - watch.began),
            "x-queue-time": _ms(watch.queue_seconds),
            "x-inference-time": _ms(inference),
            "x-time-per-token": _ms(inference / max(answer.num_tokens, 1)),
            "x-time-to-first-token": _ms(first - watch.began),
            "x-time-per-output-token": _ms((now - first) / max(answer.num_tokens - 1, 1)),
            "x-prompt-tokens": num_prompt_tokens,
            "x-generated-tokens": answer.num_tokens,
            "x-skipped-tokens": answer.num_skipped,
            "x-total-tokens": num_prompt_tokens + answer.num_tokens,
        }
    )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _encoded(told: dict[str, str | int]) -> Headers:
    """What a client wrote is quoted, so that no header ends where it says."""
    return [(name.encode(), quote(str(value), safe="/:@,+ ").encode()) for name, value in told.items()]
