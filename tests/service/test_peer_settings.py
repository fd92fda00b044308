"""Two instances on one Redis whose settings do not fit together."""

from __future__ import annotations

from pathlib import Path

from tests.service.conftest import StartService
from tests.service.running import eventually

SOON_COMPARED = Path(__file__).with_name("soon_compared.py")
WARNING = "Another instance of this Redis has another value of "


def test_instances_with_settings_that_do_not_fit_together_are_named_once(start_service: StartService) -> None:
    secrets = {"TASK_ID_SECRET": "one-secret-of-all-instances", "ADMIN_TOKEN": "one-token-of-all-instances"}
    start_service(**secrets)
    one = start_service(**secrets, program=SOON_COMPARED)
    other = start_service(
        **secrets | {"TASK_ID_SECRET": "the-secret-of-another-service"},
        DEFAULT_MODEL="another/model",
        RESULT_TTL="60",
        program=SOON_COMPARED,
        allowed=(WARNING,),
    )
    eventually(lambda: WARNING in other.log)
    assert f"{WARNING}DEFAULT_MODEL, TASK_ID_SECRET: " in other.log
    assert "secret-of" not in other.log
    eventually(lambda: WARNING in one.log)
    assert (one.log.count(WARNING), other.log.count(WARNING)) == (1, 1)
