"""Who gets in: few tries a minute for a password, and by OAuth only those who were named."""

from __future__ import annotations

import argparse
import urllib.error
import urllib.parse
import urllib.request

import pytest

from lmtt.errors import InputError
from lmtt.viz.login import TRIES, TRIES_OF_ALL, WINDOW, Attempts, OAuth, add_options, oauth_of

GITHUB = ["--oauth-provider", "github", "--oauth-key", "id", "--oauth-secret", "kept"]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_after_a_few_wrong_passwords_an_address_waits_and_others_do_not():
    clock = Clock()
    attempts = Attempts(clock)
    for n in range(TRIES):
        assert attempts.wait("a") == 0, n
        attempts.wrong("a")
        clock.now += 1
    assert attempts.wait("a") == WINDOW - TRIES
    assert attempts.wait("b") == 0
    clock.now += WINDOW - TRIES
    assert attempts.wait("a") == 0, "the first of them is a minute ago"


def test_many_addresses_together_wait_too():
    attempts = Attempts(Clock())
    for n in range(TRIES_OF_ALL):
        assert attempts.wait(str(n)) == 0
        attempts.wrong(str(n))
    assert attempts.wait("another") == WINDOW


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return oauth_of(parser.parse_args(arguments))


def test_the_command_line_says_who_may_in(monkeypatch):
    assert parsed() is None
    oauth = parsed(
        *GITHUB, "--oauth-user", "Ada", "--oauth-user", "b@c.org", "--oauth-extra", '{"tenant": "t"}'
    )
    oauth.check()
    assert (oauth.key, oauth.users, oauth.extra) == ("id", ("Ada", "b@c.org"), {"tenant": "t"})
    assert "kept" not in repr(oauth)
    monkeypatch.setenv("LMTT_OAUTH_SECRET", "from there")
    assert parsed("--oauth-provider", "google", "--oauth-key", "id").secret == "from there"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (GITHUB, "anybody with an account"),
        (["--oauth-provider", "nobody", *GITHUB[2:]], "unknown OAuth provider"),
        (["--oauth-provider", "github", "--oauth-user", "a"], "needs the key and the secret"),
        ([*GITHUB, "--oauth-extra", "{"], "is not JSON"),
        ([*GITHUB, "--oauth-extra", "[1]"], "is not an object of strings"),
    ],
)
def test_what_would_not_work_or_let_everybody_in_is_refused(arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        parsed(*arguments).check()


@pytest.mark.parametrize(
    ("claims", "may"),
    [
        ({"login": "ada"}, True),
        ({"preferred_username": "ADA"}, True),
        ({"email": "b@c.org", "email_verified": True}, True),
        ({"email": "b@c.org"}, True),
        ({"email": "b@c.org", "email_verified": False}, False),
        ({"login": "mallory", "email": "m@c.org"}, False),
        ({"name": "ada"}, False),
        ({"login": None}, False),
        ({}, False),
        (None, False),
    ],
)
def test_only_named_people_are_let_in(claims, may):
    assert OAuth("github", "k", "s", ("Ada", "b@c.org")).lets_in(claims) is may


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def answer(address, form=None):
    """Status and headers, no redirect followed."""
    opener = urllib.request.build_opener(NoRedirect)
    data = None if form is None else urllib.parse.urlencode(form).encode()
    try:
        with opener.open(address, data, timeout=30) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def no_models():
    from lmtt.viz.models import Models

    return Models([], lambda name: None)


def test_the_server_stops_who_guesses(serving):
    address = serving(no_models(), password="correct horse")
    assert answer(address)[:1] == (302,)
    policy = answer(f"{address}login")[1]["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; "), "the page that asks runs no script"
    for _ in range(TRIES):
        status, headers, _ = answer(f"{address}login", {"username": "reader", "password": "wrong horse"})
        assert status == 302
        assert "Invalid" in headers["Location"]
    status, headers, text = answer(f"{address}login", {"username": "reader", "password": "correct horse"})
    assert status == 429, "the right password is not told from a wrong one either"
    assert 0 < int(headers["Retry-After"]) <= WINDOW
    assert "Too many wrong passwords" in text
    assert "user" not in (headers["Set-Cookie"] or "")


def test_a_page_of_another_name_is_not_given_the_run(serving):
    """As after a name of somebody else's was made to mean this machine (DNS rebinding)."""
    from lmtt.graph.testing import random_trace
    from lmtt.trace import Trace

    address = serving(no_models(), Trace(random_trace(4)))
    for host, given in (("127.0.0.1:1", True), ("evil.example", False)):
        request = urllib.request.Request(address, headers={"Host": host})
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert ("lmtt-front" in reply.read().decode()) is given
            rules = dict(r.strip().split(" ", 1) for r in reply.headers["Content-Security-Policy"].split(";"))
            assert rules["default-src"] == "'self'"
            assert rules["connect-src"] == f"'self' ws://{host} wss://{host} data: blob:"


def test_oauth_sends_people_to_the_provider(serving):
    oauth = OAuth("github", "our-client-id", "s", ("ada",), "https://lab.example/login")
    address = serving(no_models(), oauth=oauth)
    status, headers, _ = answer(address)
    assert (status, headers["Location"].split("?")[0]) == (302, "./login")
    status, headers, _ = answer(f"{address}login")
    assert status == 302
    assert headers["Location"].startswith("https://github.com/login/oauth/authorize?")
    assert "client_id=our-client-id" in headers["Location"]
