"""Who may use the routes: strangers over the network, web sites in a browser, holders of keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ghostserve.errors import UsageError
from ghostserve.web.security import (
    AccessPolicy,
    RequestFacts,
    access_refusal,
    demand_sendable_key,
    is_loopback,
    key_is_accepted,
    names_a_proxy,
    split_host,
)

OPEN = AccessPolicy()
KEYED = AccessPolicy(api_keys=("first", "second"))
CURL = RequestFacts(
    client_host="127.0.0.1", host="127.0.0.1:8000", origin=None, fetch_site=None, authorization=None
)
PAGE = replace(CURL, host="localhost:8000", origin="http://localhost:8000", fetch_site="same-origin")


@pytest.mark.parametrize("facts", [CURL, PAGE, replace(PAGE, fetch_site="none", origin=None)])
def test_the_operator_on_loopback_needs_no_key(facts: RequestFacts) -> None:
    assert access_refusal(facts, OPEN) is None


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.9.1:80", "[::1]:8000", "[::1]", "localhost.:8000"],
)
def test_loopback_hosts(host: str) -> None:
    assert access_refusal(replace(CURL, host=host), OPEN) is None


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1",
     "user@localhost", "localhost:8000/x", "localhost:99999", "localhost,evil.example", "[::1", "0x7f.1.evil"],
)  # fmt: skip
def test_a_rebound_name_is_refused(host: str | None) -> None:
    refusal = access_refusal(replace(CURL, host=host), OPEN)
    assert refusal is not None
    assert refusal.status == 403


def test_the_bound_host_is_accepted_beside_loopback() -> None:
    facts = replace(CURL, host="gpu7.lan:8000")
    assert access_refusal(facts, AccessPolicy(bound_host="gpu7.lan")) is None
    assert access_refusal(replace(facts, host="0.0.0.0:8000"), AccessPolicy(bound_host="0.0.0.0")) is not None
    assert access_refusal(facts, AccessPolicy(bound_host="gpu8.lan")) is not None


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://localhost:3000", "http://127.0.0.1:8000", "https://localhost",
     "file://", "http://localhost:8000/x", "http://localhost:port"],
)  # fmt: skip
@pytest.mark.parametrize("policy", [OPEN, KEYED])
def test_another_origin_is_refused_with_and_without_key(origin: str, policy: AccessPolicy) -> None:
    facts = replace(PAGE, origin=origin, fetch_site=None, authorization="Bearer first")
    refusal = access_refusal(facts, policy)
    assert refusal is not None
    assert refusal.status == 403


def test_default_ports_are_the_same_origin() -> None:
    facts = replace(PAGE, host="localhost", origin="http://localhost:80")
    assert access_refusal(facts, OPEN) is None
    facts = replace(PAGE, host="host.example", origin="https://host.example", authorization="Bearer second")
    assert access_refusal(facts, KEYED) is None


@pytest.mark.parametrize("site", ["cross-site", "same-site", "CROSS-SITE", "", "same-origin,cross-site"])
def test_other_sites_are_refused(site: str) -> None:
    refusal = access_refusal(replace(CURL, fetch_site=site), OPEN)
    assert refusal is not None
    assert refusal.status == 403


@pytest.mark.parametrize(
    "client", ["10.0.0.7", "192.168.1.2", "2001:db8::1", "testclient", "::ffff:10.0.0.7"]
)
def test_the_network_is_refused_without_a_key(client: str) -> None:
    refusal = access_refusal(replace(CURL, client_host=client), OPEN)
    assert refusal is not None
    assert refusal.status == 403
    assert "--api-key" in refusal.sentence


def test_a_unix_socket_is_local() -> None:
    assert access_refusal(replace(CURL, client_host=None), OPEN) is None


def test_a_key_opens_the_network() -> None:
    facts = replace(CURL, client_host="10.0.0.7", host="public.example", authorization="Bearer second")
    assert access_refusal(facts, KEYED) is None


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer third", "Basic first", "first", "Bearer first "]
)
def test_loopback_needs_the_key_too_where_there_is_one(authorization: str | None) -> None:
    refusal = access_refusal(replace(CURL, authorization=authorization), KEYED)
    assert refusal is not None
    assert refusal.status == 401


def test_keys() -> None:
    assert key_is_accepted("Bearer first", ["first"])
    assert key_is_accepted("bearer second", ["first", "second"])
    assert not key_is_accepted("Bearer first", [])
    assert not key_is_accepted("Bearer \udcff", ["first"])


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer "])
def test_an_empty_key_is_never_accepted(authorization: str | None) -> None:
    assert not key_is_accepted(authorization, [""])
    assert not key_is_accepted(authorization, ["first", ""])


def test_a_key_must_fit_a_header() -> None:
    demand_sendable_key("sk-first ~")
    for key in ("schlüssel", "a\nb", "\udcff", "tab\t"):
        with pytest.raises(UsageError, match="ASCII") as raised:
            demand_sendable_key(key)
        assert key not in str(raised.value)


def test_without_a_key_no_proxy_is_served() -> None:
    refusal = access_refusal(replace(CURL, forwarded=True), OPEN)
    assert refusal is not None
    assert refusal.status == 403
    assert access_refusal(replace(CURL, forwarded=True, authorization="Bearer first"), KEYED) is None


@pytest.mark.parametrize(
    "header", ["Forwarded", "X-Forwarded-For", "x-forwarded-host", "X-FORWARDED-PROTO", "X-Real-IP", "Via"]
)
def test_headers_of_proxies(header: str) -> None:
    assert names_a_proxy(header)
    assert not names_a_proxy("Not-" + header)


def test_loopback_names() -> None:
    assert is_loopback("::ffff:127.0.0.1")
    assert is_loopback("::1%lo")
    assert not is_loopback("")
    assert not is_loopback("localhost.example")


def test_split_host() -> None:
    assert split_host("[::1]:80") == ("::1", 80)
    assert split_host("A.example") == ("a.example", None)
    assert split_host("a?b") is None
