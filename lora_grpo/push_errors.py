"""What went wrong at the Hub, in a sentence that says what to do."""

from collections.abc import Iterator

import httpx
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

TOKENS = "https://huggingface.co/settings/tokens"
QUOTA_WORDS = ("quota", "storage limit", "storage space", "exceeded your")
AGAIN = "run the same command again, files that arrived are not sent twice"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, down to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException, repo: str) -> str:
    """Return a sentence for an error that huggingface_hub or its transport raised."""
    for cause in chain(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return f"no Hub token was found: run `hf auth login`, or set HF_TOKEN ({TOKENS})"
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it"
        if isinstance(cause, HfHubHTTPError):
            return explain_status(cause, repo)
    for cause in chain(error):
        if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout):
            return f"the Hub cannot be reached ({cause}): check the network, or HF_ENDPOINT"
        if isinstance(cause, httpx.TransportError):
            return f"the connection broke off ({cause or type(cause).__name__}): {AGAIN}"
    return f"{' '.join(str(error).split())}: {AGAIN}"


def explain_status(error: HfHubHTTPError, repo: str) -> str:
    """Return a sentence for what the Hub answered."""
    status = error.response.status_code
    said = (error.server_message or "").strip()
    if status in (402, 413, 507) or any(word in said.lower() for word in QUOTA_WORDS):
        return (
            f"the Hub takes no more for {repo} ({said or status}): free storage there, or push "
            "fewer files"
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not know the token: make a new one ({TOKENS}), then `hf auth login`"
    if status in (401, 403):
        return (
            f"the token may not write to {repo} ({said or status}): use one with write access to "
            f"it ({TOKENS}), or another --repo"
        )
    if status == 404:
        return f"{repo} is not there, or the token may not see it: check --repo and the token"
    if status == 409:
        return (
            f"{repo} is taken or was changed meanwhile ({said or status}): look at it, and {AGAIN}"
        )
    if status == 412:
        return f"{repo} was changed by somebody else during the push: {AGAIN}"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "later"
        return f"the Hub answers no more requests for now: try {when}, {AGAIN}"
    if status >= 500:
        return f"the Hub failed ({status}): {AGAIN}"
    return f"the Hub refused ({status} {said}): check --repo"
