"""Tests of the operator's webhook secret: which receivers it signs for."""

from __future__ import annotations

import pytest
from yarl import URL

from imagegen.errors import InvalidRequest
from imagegen.tasks.webhook import Webhook
from imagegen.tasks.webhook_signing import OperatorSecret
from tests.support import over_rows

SECRET, OWN = "whsec_operator", "whsec_own"
HOSTS = ("hooks.example.com", "[2001:db8::1]")


@over_rows(
    ("url", "hosts", "has_keys", "signs"),
    [
        ("https://anywhere.example", (), False, True),
        ("https://anywhere.example", (), True, False),
        ("https://hooks.example.com/a?b", HOSTS, True, True),
        ("https://HOOKS.example.com.:8443/a", HOSTS, False, True),
        ("https://[2001:db8::1]:8443/a", HOSTS, True, True),
        ("https://evil.hooks.example.com", HOSTS, False, False),
        ("https://hooks.example.com.evil.test", HOSTS, True, False),
        ("https://example.com/hooks.example.com", HOSTS, False, False),
    ],
)
def test_the_operators_secret_signs_for_the_hosts_that_the_operator_named(
    url: str, hosts: tuple[str, ...], has_keys: bool, signs: bool
) -> None:
    signing = OperatorSecret(SECRET, hosts, lambda: has_keys)
    assert signing.for_url(URL(url)) == (SECRET if signs else None)
    signing.check(Webhook(url, "", secret=OWN))
    if signs:
        signing.check(Webhook(url, ""))
    else:
        with pytest.raises(InvalidRequest) as refused:
            signing.check(Webhook(url, ""))
        assert [error.field for error in refused.value.details] == ["webhook.secret"]


def test_without_a_secret_of_the_operator_a_webhook_needs_none() -> None:
    OperatorSecret(None, HOSTS, lambda: True).check(Webhook("https://anywhere.example", ""))
