"""Tests of secrets in settings: logins in addresses, and what no message and no repr shows."""

from __future__ import annotations

from yarl import URL

from imagegen.images.s3_client import Bucket
from imagegen.providers.http_client import Account
from imagegen.providers.job_poller import JobPoller
from imagegen.tasks import validation
from imagegen.tasks.family import RequestFamily
from imagegen.tasks.submission import TaskIdentity
from tests.loaded_settings import faults, load
from tests.support import over_rows


@over_rows("name", ["A1111_URL", "OPENAI_API_URL"])
def test_an_upstream_address_may_have_a_user_and_a_password(name: str) -> None:
    settings = load(**{name: "http://me:p%40ss%2F@h:7860/"})
    assert getattr(settings, name.lower()) == "http://me:p%40ss%2F@h:7860"
    assert "p%40ss" not in repr(settings)


@over_rows("url", ["http://:hunter2@h", "http://me:hunter2@x@h", "http://me:hunter2%zz@h", "http://me:hunter2/x@h"])
@over_rows("name", ["A1111_URL", "OPENAI_API_URL"])
def test_a_bad_login_in_an_address_is_rejected_and_not_shown(name: str, url: str) -> None:
    found = faults(**{name: url})
    assert list(found) == [name]
    assert "hunter2" not in found[name]


def test_a_key_and_a_login_for_one_upstream_are_a_fault() -> None:
    assert list(faults(OPENAI_API_URL="http://me:pw@h", OPENAI_API_KEY="k")) == ["OPENAI_API_KEY"]


SECRETS = {
    "TOGETHER_API_KEY": "hunter2-together",
    "REDIS_URL": "rediss://default:hunter2-redis@h",
    "REDIS_TOKEN": "hunter2-token",
    "OPENAI_API_KEY": "hunter2-openai",
    "OPENAI_API_URL": "http://hunter2-host",
    "A1111_URL": "http://me:hunter2-a1111@h",
    "S3_ACCESS_KEY_ID": "hunter2-id",
    "S3_SECRET_ACCESS_KEY": "hunter2-s3",
    "API_KEYS": "web:hunter2-web",
    "ADMIN_TOKEN": "hunter2-admin-token",
    "TASK_ID_SECRET": "hunter2-task-secret",
    "WEBHOOK_SECRET": "whsec_aHVudGVyMmh1bnRlcjJodW50ZXIyaHVudGVyMg==",
}


def test_no_secret_is_in_the_repr() -> None:
    shown = repr(load(**SECRETS))
    assert "hunter2" not in shown
    assert "whsec" not in shown
    assert shown.count("'***'") + shown.count("=***") == len(SECRETS)
    assert "port=3000" in shown


@over_rows("name", SECRETS)
def test_no_secret_is_in_a_message(name: str) -> None:
    assert "hunter2" not in str(faults(**{name: "hunter2\x07 hunter2", "PORT": "x"}))


URL_OF_JOBS = URL("https://relay.example")
REQUEST = validation.parse({"prompt": "a fox"}, default_model="a-model", aliases={})
RECORDS = [
    Bucket("pictures", "hunter2-id", "hunter2-s3"),
    Account("Bearer hunter2", "hunter2", (("X-Key", "hunter2"),)),
    JobPoller("relay", URL_OF_JOBS, URL_OF_JOBS, "hunter2", None),  # type: ignore[arg-type]  # nothing is requested
    TaskIdentity("together", "a-model", {}, "hunter2"),
    RequestFamily(REQUEST, "together", None, "hunter2"),
]


@over_rows("record", RECORDS)
def test_no_record_shows_the_secret_that_it_has(record: object) -> None:
    assert "hunter2" not in repr(record)
