"""Every setting, read once from one TOML file. Only this module and the CLI read the environment."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import msgspec

from loraplex.config.sections import Help, MebibyteAtLeast, PositiveInt, Section, Share
from loraplex.config.upstream import UpstreamSettings

DEFAULT_DEVICE_BYTES = 2**30
MIN_ADMIN_KEY = 20
_ENDPOINT = re.compile(r"https?://[^/?#\s]+(/[^?#\s]*)?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+")


class SettingsError(ValueError):
    """The settings file cannot be used; the message names the file and the setting."""


class Server(Section, frozen=True):
    host: Annotated[str, Help(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Help(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    drain_seconds: Annotated[float, Help(ge=0, description="How long open streams may finish after SIGTERM.")] = 30.0
    keep_alive_seconds: Annotated[float, Help(gt=0, description="Silence in a stream before a comment is sent.")] = 15.0
    send_timeout_seconds: Annotated[float, Help(gt=0, description="How long a client may stop reading.")] = 60.0
    trusted_proxies: Annotated[
        tuple[str, ...],
        Help(description="Addresses or networks of proxies whose X-Forwarded-For names the client; `*` for any."),
    ] = ()
    # Any, as LoRAX and vLLM have it: a browser sends no key by itself, so a page can do what the key it was given can.
    cors_origins: Annotated[
        tuple[str, ...],
        Help(
            description="Origins whose pages may call the server from a browser, such as `https://app.example.com`; "
            "`*` for any. Admin routes and metrics answer none. Empty: no CORS headers, for a proxy that sets its own."
        ),
    ] = ("*",)
    open_metrics: Annotated[bool, Help(description="Serve /metrics without an admin key.")] = False
    max_body_bytes: Annotated[int, Help(ge=1024, description="Largest request body accepted.")] = 16 * 2**20
    max_header_bytes: Annotated[
        int, Help(ge=1024, description="Most bytes of a request's line and headers together.")
    ] = 32 * 2**10
    header_timeout_seconds: Annotated[
        float, Help(gt=0, description="How long a client may take to send a request's headers.")
    ] = 10.0
    body_timeout_seconds: Annotated[
        float, Help(gt=0, description="How long a client that sends less than 16 KiB/s may take over a body.")
    ] = 60.0

    def __post_init__(self) -> None:
        for proxy in self.trusted_proxies:
            try:
                _ = proxy == "*" or ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(f"`trusted_proxies` are addresses, networks or `*`, not {proxy!r}") from None
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"`cors_origins` are `*` or written as browsers send them, in small letters and without a path: "
                    f"https://app.example.com, not {origin!r}"
                )


class Model(Section, frozen=True):
    path: Annotated[str, Help(description="Directory of the base model in Hugging Face format.")]
    name: Annotated[str, Help(min_length=1, description="The base model's name for clients.")]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Help(description="Compute type; auto takes the checkpoint's."),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8"],
        Help(description="int8: round linear layers' weights at start, on a CPU, which reads half as much a step."),
    ] = "none"
    device: Annotated[
        str,
        Help(
            pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cpu, cuda, cuda:N, or auto for CUDA where there is one."
        ),
    ] = "auto"
    generation_config: Annotated[
        Literal["auto", "none"],
        Help(description="auto: what a request leaves open is as the checkpoint's generation_config.json says."),
    ] = "auto"
    random_weights: Annotated[
        bool,
        Help(description="For benchmarks: fill the shape that path's config.json describes with random weights."),
    ] = False
    max_model_len: Annotated[
        PositiveInt | None, Help(description="Longest prompt plus answer in tokens; the model's own limit if unset.")
    ] = None
    tool_parser: Annotated[
        Literal["auto", "hermes", "llama3", "mistral", "mistral_args", "deepseek", "deepseek_fenced"],
        Help(description="How the model writes tool calls; auto goes by its chat template."),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "none", "think", "mistral"],
        Help(description="The tags a model reasons between; auto goes by its chat template."),
    ] = "auto"

    embedding_pooling: Annotated[
        Literal["mean", "last", "cls"],
        Help(description="How embeddings are made of hidden states: their mean, the last token's, or the first's."),
    ] = "mean"
    normalize_embeddings: Annotated[bool, Help(description="Divide embeddings by their length.")] = True

    def __post_init__(self) -> None:
        if self.quantization != "none" and self.device.startswith("cuda"):
            raise ValueError("`quantization` is for a CPU; on CUDA a checkpoint that is quantised is served as it is")

    @property
    def directory(self) -> Path:
        return Path(self.path).expanduser()


class EngineSettings(Section, frozen=True):
    kind: Annotated[str, Help(description="Name of an entry point of the group loraplex.engines.")] = "native"
    kv_cache_bytes: Annotated[
        PositiveInt | None, Help(description="Memory for the KV cache; sized from free memory if unset.")
    ] = None
    kv_block_size: Annotated[int, Help(ge=1, le=1024, description="Tokens in one KV block.")] = 16
    max_batch_tokens: Annotated[int, Help(ge=1, description="Token budget of one step; bounds prefill chunks.")] = 512
    max_running: Annotated[int, Help(ge=1, description="Most sequences in one step.")] = 64
    max_draft_tokens: Annotated[
        int,
        Help(ge=0, le=64, description="Longest guess of an answer's next tokens from its earlier ones; 0 for none."),
    ] = 8
    deterministic: Annotated[
        bool,
        Help(description="Compute each request to the last bit alike, whoever shares its batch; slower."),
    ] = False
    enforce_eager: Annotated[
        bool,
        Help(description="Compute each step through the model's Python, never by replaying a captured one; slower."),
    ] = False
    kernels: Annotated[
        Literal["auto", "torch", "triton"],
        Help(description="What computes LoRA and attention; auto is triton on CUDA, torch (and C) elsewhere."),
    ] = "auto"
    max_waiting: Annotated[int, Help(ge=1, description="Queued requests beyond which new ones are refused.")] = 1024
    max_wait_seconds: Annotated[
        float, Help(gt=0, description="How long a request may wait for its first step before it is refused.")
    ] = 300.0
    unresponsive_seconds: Annotated[
        float,
        Help(gt=0, description="Silence of the engine process, longer than any step, after which it is replaced."),
    ] = 300.0
    num_threads: Annotated[
        PositiveInt | None, Help(description="CPU threads of the forward pass; measured at start if unset.")
    ] = None


class Adapters(Section, frozen=True):
    cache_dir: Annotated[str, Help(description="Content-addressed disk cache of adapter files.")] = (
        "~/.cache/loraplex/adapters"
    )
    local_roots: Annotated[
        tuple[str, ...], Help(description="Directories under which local adapters may be registered.")
    ] = ()
    max_rank: Annotated[int, Help(ge=1, description="Largest rank accepted.")] = 256
    max_bytes: Annotated[int, Help(ge=1, description="Largest adapter accepted, all files together.")] = 4 * 2**30
    fetch_timeout_seconds: Annotated[float, Help(gt=0, description="Deadline of one fetch.")] = 600.0
    max_fetches: Annotated[int, Help(ge=1, le=64, description="Adapters fetched at the same time; others queue.")] = 4
    merge_rank: Annotated[
        int, Help(ge=1, description="Largest rank of an adapter that is merged for a request by TIES or DARE.")
    ] = 128
    base_names: Annotated[
        tuple[str, ...],
        Help(description="More names that adapters may give the base they were made for; their last part counts."),
    ] = ()
    on_other_base: Annotated[
        Literal["warn", "refuse"],
        Help(description="What happens to an adapter made for a base of another name: a note, or a refusal."),
    ] = "warn"
    request_trust_seconds: Annotated[
        float,
        Help(ge=0, description="How long the revision of an adapter that requests name is trusted, unregistered ones."),
    ] = 60.0
    hub_endpoint: Annotated[
        str | None, Help(description="Address of the hub behind hf://; the public one if unset.")
    ] = None
    s3_endpoint: Annotated[str | None, Help(description="Address of the store behind s3://; Amazon's if unset.")] = None
    s3_buckets: Annotated[
        tuple[str, ...], Help(description="Buckets that the gateway's own credentials may read; any if empty.")
    ] = ()
    https_allow_private: Annotated[
        bool, Help(description="Let https:// addresses lead to loopback, private and link-local networks.")
    ] = False
    https_ca_file: Annotated[
        str | None, Help(description="Certificate authorities that https:// servers are checked against, PEM.")
    ] = None
    disk_bytes: Annotated[int, Help(ge=1, description="Size of the disk cache; the least recently used leave.")] = (
        50 * 2**30
    )
    upload_dir: Annotated[
        str | None,
        Help(description="Where uploaded adapters are kept until they are deleted; `CACHE_DIR-uploads` if unset."),
    ] = None
    upload_bytes: Annotated[int, Help(ge=1, description="Size of the uploads; beyond it further ones are refused.")] = (
        50 * 2**30
    )
    host_bytes: Annotated[int, Help(ge=2**20, description="Memory for parsed adapters in host memory.")] = 2 * 2**30
    device_bytes: Annotated[
        MebibyteAtLeast | None,
        Help(description="Memory for adapters on the device; 1 GiB if neither this nor device_share is set."),
    ] = None
    device_share: Annotated[
        Share | None,
        Help(description="Instead of device_bytes: their share of what is free on the device beside the weights."),
    ] = None
    pinned_share: Annotated[
        Share, Help(description="Most of the device's room for adapters that pinned ones may take, all together.")
    ] = 0.5
    tenant_pinned_share: Annotated[
        Share, Help(description="Most of that room that the pinned adapters of one tenant may take.")
    ] = 0.25
    preload: Annotated[
        tuple[str, ...], Help(description="Shared adapters that are brought to the device when the server starts.")
    ] = ()
    max_names_in_figures: Annotated[
        int, Help(ge=1, description="Adapters that figures tell apart by name; all others are counted together.")
    ] = 100

    def __post_init__(self) -> None:
        if self.device_bytes is not None and self.device_share is not None:
            raise ValueError("`device_bytes` and `device_share` say the same; set one of them")
        for name, endpoint in (("hub_endpoint", self.hub_endpoint), ("s3_endpoint", self.s3_endpoint)):
            if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
                raise ValueError(f"`{name}` is an address such as https://store.example.com:9000, not {endpoint!r}")

    def device_room(self, free: int) -> int:
        """Bytes for adapters on a device that has `free` bytes beside the weights."""
        if self.device_share is not None:
            return int(free * self.device_share)
        return DEFAULT_DEVICE_BYTES if self.device_bytes is None else self.device_bytes


class Database(Section, frozen=True):
    url: Annotated[
        str,
        Help(
            description="Where tenants, keys and the catalogue are: sqlite:///FILE, or "
            "postgresql://user:password@host/name with the extra postgres."
        ),
    ] = "sqlite:///loraplex.db"


class Auth(Section, frozen=True):
    admin_key_env: Annotated[
        str,
        Help(
            description="Environment variable that holds the bootstrap admin key, 20 characters or more; unset: one is "
            "printed once."
        ),
    ] = "LORAPLEX_ADMIN_KEY"
    pepper_env: Annotated[
        str, Help(description="Environment variable with the secret that key hashes are made under.")
    ] = "LORAPLEX_PEPPER"
    pepper_file: Annotated[
        str, Help(description="File with that secret where the variable is unset; made at first start, mode 0600.")
    ] = "loraplex.pepper"


class LimitSettings(Section, frozen=True):
    """Defaults for every tenant; the admin API sets a tenant's or a key's own."""

    requests_per_minute: Annotated[PositiveInt | None, Help(description="Requests a tenant may make per minute.")] = (
        None
    )
    input_tokens_per_minute: Annotated[PositiveInt | None, Help(description="Prompt tokens per minute.")] = None
    output_tokens_per_minute: Annotated[PositiveInt | None, Help(description="Generated tokens per minute.")] = None
    concurrent_requests: Annotated[PositiveInt | None, Help(description="Requests at the same time.")] = None
    tokens_per_day: Annotated[PositiveInt | None, Help(description="Tokens per UTC day, prompt and answer.")] = None
    tokens_per_month: Annotated[PositiveInt | None, Help(description="Tokens per UTC month, prompt and answer.")] = None
    max_tokens: Annotated[PositiveInt | None, Help(description="Longest answer of one request.")] = None
    redis_url: Annotated[
        str | None,
        Help(
            description="Redis that gateways share limits through, as redis://host:port/db; unset: this process alone."
        ),
    ] = None
    on_redis_loss: Annotated[
        Literal["open", "closed"],
        Help(description="While Redis is away: open holds each process to the limits by itself, closed answers 503."),
    ] = "open"


class UsageSettings(Section, frozen=True):
    journal_dir: Annotated[
        str | None,
        Help(
            description="Local directory where gateways record what running requests use, so that no kill loses it; "
            "unset: beside an SQLite file; for other databases CACHE_DIR-journal/HOST_PORT_NAME."
        ),
    ] = None
    retention_days: Annotated[
        PositiveInt | None,
        Help(description="Age at which a request's row is deleted, its part of the day's sums stays; unset: never."),
    ] = None
    prompt_log: Annotated[
        str,
        Help(
            description="File to which prompts and answers of those who opted in (the limit log_prompts) are appended, "
            "as lines of JSON that only its owner may read; made with the first line."
        ),
    ] = "loraplex-prompts.jsonl"
    replay_seconds: Annotated[
        float, Help(ge=0, description="How long an answer under an Idempotency-Key is kept for another try.")
    ] = 600.0
    replay_bytes: Annotated[
        int, Help(ge=0, description="Memory for such answers; the oldest leave, and one that is larger is not kept.")
    ] = 64 * 2**20


class FileSettings(Section, frozen=True):
    """What /v1/files keeps."""

    directory: Annotated[
        str, Help(description="Where the files of tenants lie; gateways that share a database share it, too.")
    ] = "loraplex-files"
    max_file_bytes: Annotated[int, Help(ge=1, description="Largest file accepted.")] = 200 * 2**20
    max_tenant_bytes: Annotated[int, Help(ge=1, description="Most that the files of one tenant may take.")] = 10 * 2**30


class BatchSettings(Section, frozen=True):
    """How /v1/batches is worked off."""

    max_running: Annotated[int, Help(ge=0, description="Batches worked off by this gateway at the same time.")] = 4
    max_requests: Annotated[int, Help(ge=1, description="Requests of one batch that run at the same time.")] = 16
    lease_seconds: Annotated[
        float, Help(gt=0, description="After so long without a sign of life another gateway goes on with a batch.")
    ] = 15.0


class ResponseSettings(Section, frozen=True):
    retention_days: Annotated[
        PositiveInt, Help(description="How long responses are stored, unless deleted before.")
    ] = 30


class Settings(Section, frozen=True):
    """The whole file: one attribute a table."""

    model: Model
    server: Server = Server()
    engine: EngineSettings = EngineSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    adapters: Adapters = Adapters()
    database: Database = Database()
    auth: Auth = Auth()
    limits: LimitSettings = LimitSettings()
    usage: UsageSettings = UsageSettings()
    files: FileSettings = FileSettings()
    batches: BatchSettings = BatchSettings()
    responses: ResponseSettings = ResponseSettings()

    def __post_init__(self) -> None:
        if self.engine.kind != "upstream" and self.upstream != UpstreamSettings():
            raise ValueError(f"`upstream` is for engine.kind = 'upstream', not {self.engine.kind!r}")


def load_settings(path: Path) -> Settings:
    """The settings of a TOML file. Raises SettingsError naming the file and what is wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from error
    try:
        return msgspec.toml.decode(text, type=Settings)
    except msgspec.DecodeError as error:
        raise SettingsError(f"{path}: {error}{_choices(str(error))}") from error


def _choices(message: str) -> str:
    """Which values may stand where one is none of them: msgspec's message tells the place alone."""
    found = re.fullmatch(r"Invalid enum value .* - at `\$\.(\w+)\.(\w+)`", message)
    if found is None:
        return ""
    section = get_type_hints(Settings)[found[1]]
    return "; it may be " + ", ".join(sorted(get_args(get_type_hints(section)[found[2]])))


def require_long_admin_key(auth: Auth) -> None:
    """Raises SettingsError where the environment's admin key is one that could be guessed."""
    if len(environment(auth.admin_key_env) or "x" * MIN_ADMIN_KEY) < MIN_ADMIN_KEY:
        raise SettingsError(
            f"{auth.admin_key_env} is too short: an admin key has {MIN_ADMIN_KEY} characters or more, such as what "
            "`openssl rand -hex 32` prints"
        )


def environment(name: str) -> str | None:
    """One environment variable, None where unset or empty."""
    return os.environ.get(name) or None
