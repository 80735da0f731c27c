"""How long a push waits for the Hub: by itself huggingface_hub has no time limit, and sleeps for as
long as a server's Retry-After says, five times over."""

import httpx
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

# Seconds: for one step of a request, and for all that the Hub asks to wait in one push.
TIMEOUT = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}
LONGEST_WAIT = 60.0
HUB = "huggingface.co"


def asked_wait(response: httpx.Response) -> float:
    """Return the seconds that an answer asks to wait before the next try."""
    if response.status_code not in (429, 503):
        return 0.0
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = response.headers.get("Retry-After", "").strip()
    return float(seconds) if seconds.isdigit() else 0.0


def limit_waiting() -> None:
    """Give every request a time limit, and fail once the waits asked for come to a minute."""
    left = LONGEST_WAIT

    def set_limit(request: httpx.Request) -> None:
        # Some calls of huggingface_hub ask for no limit, over the client's own.
        asked = request.extensions.get("timeout", {})
        known = {name: seconds for name, seconds in asked.items() if seconds is not None}
        request.extensions["timeout"] = {**TIMEOUT, **known}

    def count_wait(response: httpx.Response) -> None:
        nonlocal left
        left -= asked_wait(response)
        if left < 0:
            response.read()
            hf_raise_for_status(response)

    def make_client() -> httpx.Client:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], set_limit],
            "response": [*hooks["response"], count_wait],
        }
        return client

    set_client_factory(make_client)


def choose_transfer(endpoint: str) -> None:
    """Send files by plain LFS to a server that is not the Hub itself: it may not speak Xet, which
    huggingface_hub does not ask first, and hf_xet then tries for minutes."""
    host = httpx.URL(endpoint).host
    if host != HUB and not host.endswith("." + HUB):
        constants.HF_HUB_DISABLE_XET = True
