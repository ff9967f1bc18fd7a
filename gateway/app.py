"""The composition root: settings and an engine in, an ASGI application out."""

import time

from litestar import Litestar
from litestar.types import ASGIApp

from loraplex.config.settings import Settings
from loraplex.gateway.admin.adapters import adapter_routes
from loraplex.gateway.admin.admin_keys import admin_key_routes
from loraplex.gateway.admin.audit import audit_routes
from loraplex.gateway.admin.engine import engine_routes
from loraplex.gateway.admin.keys import key_routes
from loraplex.gateway.admin.limits import limit_routes
from loraplex.gateway.admin.routes import route_routes
from loraplex.gateway.admin.secrets import secret_routes
from loraplex.gateway.admin.tenants import tenant_routes
from loraplex.gateway.admin.usage import usage_routes
from loraplex.gateway.batches.runner import BatchRunner
from loraplex.gateway.cors import allow_origins
from loraplex.gateway.embedder import Embedder
from loraplex.gateway.health import health_routes
from loraplex.gateway.idempotency import answer_once
from loraplex.gateway.long_work import LongWork
from loraplex.gateway.lorax.routes import lorax_routes
from loraplex.gateway.metrics import Metrics, metric_routes
from loraplex.gateway.middleware import identify_requests
from loraplex.gateway.openai.answers import Answers
from loraplex.gateway.openai.batches import batch_routes
from loraplex.gateway.openai.chat import chat_routes
from loraplex.gateway.openai.completions import completion_routes
from loraplex.gateway.openai.embeddings import embedding_routes
from loraplex.gateway.openai.files import file_routes
from loraplex.gateway.openai.models import model_routes
from loraplex.gateway.openai.responses import response_routes
from loraplex.gateway.openai.usage import completion_usage_routes
from loraplex.gateway.openapi.routes import openapi_routes
from loraplex.gateway.problems import respond
from loraplex.gateway.prompt_log import PromptLog
from loraplex.gateway.request_adapters import RequestAdapters
from loraplex.gateway.services import Services
from loraplex.gateway.turns import parts_at_once
from loraplex.gateway.vllm.adapters import vllm_adapter_routes
from loraplex.gateway.vllm.tokens import token_routes


def create_app(settings: Settings, services: Services, batch_runner: BatchRunner) -> ASGIApp:
    """The server. Starting and stopping what it stands on is the caller's part."""
    once = answer_once(create_routes(settings, services, batch_runner), services.tenants, settings)
    # outside Litestar, so that what finds no route or has no key is told as well who it was and which pages may read it
    return identify_requests(allow_origins(once, settings.server.cors_origins))


def create_routes(settings: Settings, services: Services, batch_runner: BatchRunner) -> Litestar:
    """Every route of the server."""
    engine, tenants, catalogue = services.engine, services.tenants, services.catalogue
    metrics = Metrics(settings.adapters.max_names_in_figures)
    prompt_log = PromptLog(settings.usage.prompt_log)
    at_once = parts_at_once(settings.engine)
    answers = Answers(engine, services.store, metrics, services.accounts, settings.server, prompt_log, at_once)
    embedder = Embedder(engine, services.store, metrics, services.accounts, settings.model, at_once)
    adapters = RequestAdapters(
        catalogue,
        settings.adapters.request_trust_seconds,
        min(settings.adapters.merge_rank, settings.adapters.max_rank),
    )
    routes = Litestar(
        route_handlers=[
            *health_routes(engine),
            *metric_routes(metrics, engine, services.store, is_open=settings.server.open_metrics),
            *chat_routes(engine, adapters, answers, settings.model),
            *completion_routes(engine, adapters, answers),
            *response_routes(engine, adapters, answers, services.responses, settings.model),
            *model_routes(catalogue, engine, started_at=int(time.time())),
            *lorax_routes(settings, engine, adapters, answers, embedder),
            *embedding_routes(engine, adapters, embedder),
            *token_routes(engine, adapters, settings.model),
            *vllm_adapter_routes(catalogue, tenants),
            *file_routes(services.files),
            *batch_routes(services.batches, batch_runner.notice),
            *tenant_routes(tenants, catalogue, services.files),
            *key_routes(tenants),
            *limit_routes(tenants),
            *secret_routes(tenants, services.secrets),
            *admin_key_routes(tenants.admins),
            *audit_routes(services.audit, tenants),
            *adapter_routes(catalogue, tenants, engine, settings.adapters.fetch_timeout_seconds),
            *route_routes(catalogue, tenants),
            *usage_routes(services.usage),
            *completion_usage_routes(services.usage),
            *engine_routes(engine),
            *openapi_routes(),
        ],
        exception_handlers={Exception: respond},
        request_max_body_size=settings.server.max_body_bytes,
        openapi_config=None,
        logging_config=None,
    )
    routes.state.tenants = tenants
    routes.state.audit = services.audit
    routes.state.long_work = LongWork(services.accounts)
    return routes
