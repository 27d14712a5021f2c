"""Who may in: one password with few tries a minute, or people that an OAuth provider vouches for."""

from __future__ import annotations

import argparse
import hmac
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmtt.errors import InputError

WINDOW = 60.0  # seconds for which a wrong password counts
TRIES = 5  # wrong ones within it from one address
TRIES_OF_ALL = 60  # and from everywhere: whoever guesses may have many addresses
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
PROVIDERS = ("auth0", "azure", "azurev2", "bitbucket", "generic", "github", "gitlab", "google", "okta")
CLAIMS = ("login", "preferred_username", "username")  # by which providers name people, beside their e-mail


class Attempts:
    """Wrong passwords of the last minute."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._wrong: deque[tuple[float, str]] = deque()

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0 if it may."""
        now = self._now()
        while self._wrong and self._wrong[0][0] <= now - WINDOW:
            self._wrong.popleft()
        own = [at for at, who in self._wrong if who == address]
        waits = [own[-TRIES]] if len(own) >= TRIES else []
        waits += [self._wrong[-TRIES_OF_ALL][0]] if len(self._wrong) >= TRIES_OF_ALL else []
        return max(waits) + WINDOW - now if waits else 0.0

    def wrong(self, address: str) -> None:
        """A wrong password came from there."""
        self._wrong.append((self._now(), address))


@dataclass(frozen=True)
class OAuth:
    """An OAuth provider, as Panel takes it, and whom of its people to let in."""

    provider: str
    key: str
    secret: str = field(repr=False)
    users: tuple[str, ...]
    redirect_uri: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """InputError for what would not work, or would let everybody in."""
        if self.provider not in PROVIDERS:
            raise InputError("unknown OAuth provider", expected=", ".join(PROVIDERS), got=self.provider)
        if not self.key or not self.secret:
            raise InputError(
                "an OAuth provider needs the key and the secret that it gave you",
                remedy="set --oauth-key and LMTT_OAUTH_SECRET",
            )
        if not self.users:
            raise InputError(
                "anybody with an account at the OAuth provider could log in",
                remedy="name those who may with --oauth-user",
            )

    def lets_in(self, claims: Mapping[str, Any] | None) -> bool:
        """Whether claims of the provider name one of the users; an unverified e-mail names nobody."""
        claims = claims or {}
        named = [claims.get(name) for name in CLAIMS]
        if claims.get("email_verified", True) in (True, "true"):
            named.append(claims.get("email"))
        return any(isinstance(name, str) and name.lower() in self._listed for name in named)

    @property
    def _listed(self) -> set[str]:
        return {user.lower() for user in self.users}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lmtt serve` that say who may log in by OAuth."""
    group = parser.add_argument_group("login by OAuth in place of a password")
    group.add_argument("--oauth-provider", metavar="NAME", help=", ".join(PROVIDERS))
    group.add_argument("--oauth-key", metavar="KEY", help="client id; or LMTT_OAUTH_KEY")
    group.add_argument("--oauth-secret", metavar="SECRET", help="better given as LMTT_OAUTH_SECRET")
    group.add_argument(
        "--oauth-user", action="append", default=[], metavar="NAME", help="e-mail or login of who may in"
    )
    group.add_argument("--oauth-redirect-uri", metavar="URI", help="where the provider sends people back to")
    group.add_argument("--oauth-extra", metavar="JSON", help="what else the provider needs, such as tenant")


def oauth_of(options: argparse.Namespace) -> OAuth | None:
    """What the command line says about OAuth; None if nothing."""
    if options.oauth_provider is None:
        return None
    extra: Any = {}
    if options.oauth_extra is not None:
        try:
            extra = json.loads(options.oauth_extra)
        except ValueError as error:
            raise InputError("--oauth-extra is not JSON", got=str(error)) from None
        if not isinstance(extra, dict) or not all(isinstance(value, str) for value in extra.values()):
            raise InputError("--oauth-extra is not an object of strings", got=options.oauth_extra)
    return OAuth(
        options.oauth_provider,
        options.oauth_key or os.environ.get("LMTT_OAUTH_KEY", ""),
        options.oauth_secret or os.environ.get("LMTT_OAUTH_SECRET", ""),
        tuple(options.oauth_user),
        options.oauth_redirect_uri,
        extra,
    )


def server_options(password: str | None, oauth: OAuth | None) -> dict[str, Any]:
    """What Panel's server takes to ask for one of them; nothing if neither is given."""
    import panel as pn

    # Panel keeps this one for all servers of a process, so it is set back where nobody is asked.
    pn.config.authorize_callback = None if oauth is None else oauth.lets_in
    if oauth is not None:
        return {
            "oauth_provider": oauth.provider, "oauth_key": oauth.key, "oauth_secret": oauth.secret,
            "oauth_redirect_uri": oauth.redirect_uri, "oauth_extra_params": dict(oauth.extra),
            "cookie_secret": _cookie_secret(),
        }  # fmt: skip
    if password is None:
        return {}
    return {"auth_provider": _password_provider(password), "cookie_secret": _cookie_secret()}


def _cookie_secret() -> str:
    """New at every start: old sessions end with the server."""
    return secrets.token_hex(32)


def _password_provider(password: str) -> Any:
    from panel.auth import BasicAuthProvider, BasicLoginHandler

    attempts = Attempts()

    class Login(BasicLoginHandler):  # type: ignore[misc] # panel ships no types
        """The page that asks for the password."""

        def set_default_headers(self) -> None:
            """It has one style, and one form that goes back to where it came from."""
            super().set_default_headers()
            self.set_header("Content-Security-Policy", POLICY)
            self.set_header("X-Content-Type-Options", "nosniff")
            self.set_header("Referrer-Policy", "no-referrer")

        def _validate(self, _username: str, given: str) -> bool:
            right = hmac.compare_digest(given.encode("utf-8", "replace"), password.encode("utf-8", "replace"))
            if not right:
                attempts.wrong(self.request.remote_ip)
            return right

        def post(self) -> None:
            """Refused before it is looked at, so that a guess more tells nothing."""
            wait = attempts.wait(self.request.remote_ip)
            if wait <= 0:
                super().post()
                return
            self.set_status(429)
            self.set_header("Retry-After", str(int(wait) + 1))
            said = f"Too many wrong passwords. Try again in {int(wait) + 1} seconds."
            self.write(self._login_template.render(login_endpoint=self._login_endpoint, errormessage=said))

    class Provider(BasicAuthProvider):  # type: ignore[misc] # panel ships no types
        """Panel's own, with our login page."""

        @property
        def login_handler(self) -> Any:
            Login._login_endpoint, Login._login_template = self._login_endpoint, self._login_template
            return Login

    return Provider(login_template=str(Path(__file__).with_name("login.html")))
