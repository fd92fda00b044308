"""Tests of compose.yaml, the Caddyfile and the example for Kubernetes: valid by schema, and right for this service."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from imagegen import __version__
from imagegen.redis_client.keys import GROUP, Keys
from imagegen.settings import Settings, setting_names

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
SECRETS = {"API_KEYS", "ADMIN_TOKEN", "TASK_ID_SECRET"}
GIVEN = dict.fromkeys((*SECRETS, "TOGETHER_API_KEY"), "web:0123456789abcdef0123456789")
"""Secrets that the operator gives."""


# compose.yaml: https://docs.docker.com/reference/compose-file/


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert set(loaded) == {"name", "x-instance", "services", "networks", "volumes"}
    return dict(loaded)


def environment_of(compose: dict[str, Any]) -> dict[str, str]:
    """Return the settings of an instance as Compose passes them, with the operator's values in place of `${...}`."""
    environment = compose["services"]["imagegen-1"]["environment"]
    assert all(isinstance(value, str) for value in environment.values())
    given = GIVEN | {"DOMAIN": "images.example.org", "BUDGET_DAILY_USD": "5"}
    return {
        name: re.sub(r"\$\{([A-Z_]+)(:\?[^}]*)?\}", lambda match: given[match[1]], value)
        for name, value in environment.items()
    }


def test_compose_runs_two_equal_instances_with_one_redis_and_one_volume(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"caddy", "imagegen-1", "imagegen-2", "valkey"}
    assert services["imagegen-1"] == services["imagegen-2"]
    settings = Settings.load(GIVEN | environment_of(compose), dotenv=None)
    assert settings.redis_url is not None
    assert settings.redis_url.startswith("redis://valkey:6379")
    assert (settings.image_store, settings.data_dir) == ("disk", Path("/data"))
    assert "images:/data" in services["imagegen-1"]["volumes"]
    assert set(environment_of(compose)) <= set(setting_names())


def test_compose_ends_an_instance_only_after_its_drain(compose: dict[str, Any]) -> None:
    instance = compose["services"]["imagegen-1"]
    grace_s = int(instance["stop_grace_period"].removesuffix("s"))
    assert float(instance["environment"]["DRAIN_SECONDS"]) + 5 <= grace_s


def test_compose_refuses_to_start_without_each_secret_and_a_budget(compose: dict[str, Any]) -> None:
    environment = compose["services"]["imagegen-1"]["environment"]
    for name in (*SECRETS, "BUDGET_DAILY_USD"):
        assert environment[name].startswith(f"${{{name}:?set {name} in .env"), name


def test_compose_shows_only_the_proxy_to_others(compose: dict[str, Any]) -> None:
    assert [name for name, service in compose["services"].items() if "ports" in service] == ["caddy"]
    assert compose["services"]["valkey"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True
    assert "inside" not in compose["services"]["caddy"]["networks"]
    assert Settings.load(GIVEN | environment_of(compose), dotenv=None).trusted_proxy_hops == 1


def test_valkey_keeps_its_tasks_and_evicts_none(compose: dict[str, Any]) -> None:
    (stateful,) = [document for document in documents("imagegen.yaml") if document["kind"] == "StatefulSet"]
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    for command in (compose["services"]["valkey"]["command"], container["args"]):
        options = dict(zip(command[1::2], command[2::2], strict=True))
        assert options == {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}


def test_caddy_sends_requests_to_every_instance_that_is_ready(compose: dict[str, Any]) -> None:
    text = (ROOT / "deploy" / "caddy" / "Caddyfile").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert lines[0] == "{$DOMAIN} {"
    instances = [name for name in compose["services"] if name.startswith("imagegen-")]
    assert lines[1] == f"reverse_proxy {' '.join(f'{name}:3000' for name in instances)} {{"
    assert "health_uri /readyz" in lines
    assert not [line for line in lines if line.startswith("flush_interval")]
    assert lines.count("}") == sum(line.endswith("{") for line in lines)


# Kubernetes


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return dict(json.loads((ROOT / "tests" / "data" / "kubernetes-1.37.json").read_text()))


def kubernetes_faults(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    kind = {"$defs": schema["$defs"], **schema["kinds"][document["kind"]]}
    return [fault.message for fault in jsonschema.Draft202012Validator(kind).iter_errors(document)]


@pytest.mark.parametrize(
    "document", documents("imagegen.yaml"), ids=lambda document: f"{document['kind']} {document['metadata']['name']}"
)
def test_each_object_of_the_example_is_valid_for_kubernetes(document: dict[str, Any], schema: dict[str, Any]) -> None:
    assert kubernetes_faults(document, schema) == []


def test_the_schema_finds_unknown_and_wrong_fields(schema: dict[str, Any]) -> None:
    (deployment,) = [each for each in documents("imagegen.yaml") if each["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = "130"
    assert len(kubernetes_faults(deployment, schema)) == 2


@pytest.fixture
def deployment() -> dict[str, Any]:
    (found,) = [document for document in documents("imagegen.yaml") if document["kind"] == "Deployment"]
    return found


def configured() -> dict[str, str]:
    (found,) = [document for document in documents("imagegen.yaml") if document["kind"] == "ConfigMap"]
    return dict(found["data"])


def test_the_settings_of_the_example_are_valid_and_hold_no_secret(deployment: dict[str, Any]) -> None:
    settings = Settings.load(GIVEN | configured(), dotenv=None)
    assert set(configured()) <= set(setting_names())
    assert not SECRETS & set(configured())
    assert settings.image_store in {"redis", "s3"}, "pods share no disk"
    assert settings.budget_daily_micro_usd
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": "imagegen"}}, {"secretRef": {"name": "imagegen"}}]
    assert container["ports"][0]["containerPort"] == settings.port


def test_the_example_runs_the_image_of_this_version(deployment: dict[str, Any]) -> None:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"].endswith(f"/imagegen:{__version__}")


def test_a_pod_is_ended_only_after_its_drain_and_is_not_restarted_for_an_outage(deployment: dict[str, Any]) -> None:
    pod = deployment["spec"]["template"]["spec"]
    assert float(configured()["DRAIN_SECONDS"]) + 5 <= pod["terminationGracePeriodSeconds"]
    (container,) = pod["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_a_pod_runs_as_the_user_of_the_image_without_rights(deployment: dict[str, Any]) -> None:
    pod = deployment["spec"]["template"]["spec"]
    uid = re.search(r"--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert uid is not None
    assert pod["securityContext"]["runAsUser"] == int(uid[1])
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


# KEDA: https://keda.sh/docs/latest/reference/scaledobject-spec/ and .../scalers/redis-streams/

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "string", "pattern": "^[1-9][0-9]*$"}
SCALED_OBJECT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["scaleTargetRef", "triggers"],
            "properties": {
                "scaleTargetRef": {"type": "object", "required": ["name"]},
                "minReplicaCount": {"type": "integer", "minimum": 1},
                "maxReplicaCount": {"type": "integer", "minimum": 1},
                "pollingInterval": {"type": "integer", "minimum": 1},
                "cooldownPeriod": {"type": "integer", "minimum": 0},
                "advanced": {"type": "object"},
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["type", "metadata"],
                        "properties": {
                            "type": {"const": "redis-streams"},
                            "metadata": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["address", "stream"],
                                "oneOf": [{"required": ["lagCount", "consumerGroup"]}, {"required": ["streamLength"]}],
                                "properties": {
                                    "address": {"type": "string", "pattern": "^[^:/]+:[0-9]+$"},
                                    "stream": TEXT,
                                    "consumerGroup": TEXT,
                                    "lagCount": COUNT,
                                    "streamLength": COUNT,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def test_the_scaler_follows_the_lag_of_the_consumer_group_of_the_queue(deployment: dict[str, Any]) -> None:
    (scaled,) = documents("scaledobject.yaml")
    jsonschema.validate(scaled, SCALED_OBJECT)
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "each apply would undo the scaler"
    keys = Keys(configured().get("REDIS_PREFIX", Settings().redis_prefix))
    lag, _ = (trigger["metadata"] for trigger in scaled["spec"]["triggers"])
    assert (lag["consumerGroup"], "lagCount" in lag) == (GROUP, True)
    assert {trigger["metadata"]["stream"] for trigger in scaled["spec"]["triggers"]} == {keys.stream}
