"""What a client did wrong, as OpenAI's API says it."""

from collections.abc import Mapping


class ApiError(Exception):
    """An answer other than 200: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,  # the field at fault
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The response's JSON."""
        kind = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        shown = {"message": self.message, "type": kind.get(self.status, default), "param": self.param}
        return {"error": {**shown, "code": self.code}}
