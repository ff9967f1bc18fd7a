"""What the gateway itself refuses, and what keeps it from starting; engines and auth raise errors of their own."""


class CannotOpen(Exception):
    """Something that the settings name cannot be used; the message says which setting, and why."""


class GatewayError(Exception):
    """Base; `str(error)` is fit for the client. `param` names the offending field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MalformedRequest(GatewayError):
    """A field has the wrong type or an impossible value."""


class NotJson(MalformedRequest):
    """The body is missing, or not JSON at all."""


class UnsupportedEncoding(GatewayError):
    """The body is compressed, or otherwise encoded, and cannot be read."""


class InvalidUserInput(MalformedRequest):
    """What vLLM calls by this name: an adapter's name or path that is empty."""


class UnknownParameter(GatewayError):
    """The body has a field that this route does not know."""


class UnsupportedParameter(GatewayError):
    """A field of the API that this server does not offer, set to something that would matter."""


class ModelNotFound(GatewayError):
    """No model of this name is there for this caller."""


class ModelNotAllowed(GatewayError):
    """The model is there, but the limits of the key or its tenant leave it out."""


class ResponseNotFound(GatewayError):
    """No stored response has this id for this caller."""


class PreviousResponseNotFound(GatewayError):
    """The conversation that a request goes on with is not there, or a part of it is gone."""


class ClientLeft(GatewayError):
    """The client closed the connection before its answer was complete; nobody reads this."""


class IdempotencyKeyInUse(GatewayError):
    """A request with this Idempotency-Key is being answered."""


class IdempotencyKeyReused(GatewayError):
    """The Idempotency-Key stands for another request."""


class AdapterNotRegistered(GatewayError):
    """The admin API was asked about an adapter that is not in the catalogue."""


class AdapterNotReady(GatewayError):
    """The files of the adapter are on their way; worth another try."""


class AdapterFailed(GatewayError):
    """The adapter's files could not be had, or are no longer what was registered; an operator has to look."""


class AdapterNameTaken(GatewayError):
    """The catalogue has this name already."""


class PinsFull(GatewayError):
    """Pinned adapters would take more of the device than the settings let them."""


class NoSuchPage(GatewayError):
    """The documentation has no such part."""


class FileNotFound(GatewayError):
    """This caller has no such file."""


class FileInUse(GatewayError):
    """A batch that is not over reads the file."""


class FileTooLarge(GatewayError):
    """An upload is larger than any file may be."""


class StorageFull(GatewayError):
    """The tenant, or the disk, has no room for the file."""


class BatchNotFound(GatewayError):
    """This caller has no such batch."""


class BatchNotCancellable(GatewayError):
    """The batch is over, or about to be."""
