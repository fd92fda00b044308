"""Tiers of the tests, by path: unit (no I/O), acceptance (whole processes), and integration, which is all the rest.

`python tests/tiers.py unit` prints the paths of a tier, so that `make test-unit` collects nothing else.
"""

from __future__ import annotations

import sys
from pathlib import PurePosixPath

TIERS = {
    "unit": (
        "accounts/test_keys.py",
        "images/test_store_health.py",
        "images/test_image_links.py",
        "images/test_sniff.py",
        "providers/test_model_table.py",
        "providers/test_prices.py",
        "providers/test_response_parser.py",
        "providers/test_size_limits.py",
        "providers/test_refusal_codes.py",
        "providers/test_vendor_refusals.py",
        "queue/test_feed.py",
        "queue/test_task_cache.py",
        "queue/test_server_info.py",
        "tasks",
        "test_byte_budget.py",
        "test_formats.py",
        "test_metrics.py",
        "test_settings.py",
        "test_settings_file.py",
        "test_settings_redis.py",
        "test_settings_secrets.py",
        "test_rows.py",
        "test_start_checks.py",
        "web/test_forwarded.py",
        "worker/test_circuit_breaker.py",
        "worker/test_destinations.py",
        "worker/test_pacing.py",
    ),
    "acceptance": (
        "emulator/test_process.py",
        "emulator/test_sdk.py",
        "faults",
        "service",
        "test_bench.py",
        "test_interrupted_runs.py",
    ),
}


SLOW = (
    "browser/test_studio.py",
    "faults/test_soup.py",
    "service/test_channel_money.py",
    "service/test_job_providers.py",
    "web/test_schemathesis.py",
    "service/test_provider_jobs.py",
    "service/test_generate_command.py",
    "browser/test_studio_pages.py",
    "service/test_top_up.py",
    "service/test_job_kills.py",
    "service/test_two_versions.py",
    "test_interrupted_runs.py",
    "test_bench.py",
    "service/test_connections.py",
    "service/test_starts.py",
    "web/openai/test_sdks.py",
    "web/test_generators.py",
    "service/test_upstream_faults.py",
    "faults/test_lost_writes.py",
    "service/test_images.py",
    "service/test_cluster.py",
    "service/test_channels.py",
    "service/test_channel_peers.py",
    "service/test_found_jobs.py",
    "service/test_renewed_links.py",
    "service/test_uploads.py",
    "worker/test_webhook_load.py",
    "worker/test_pool_outages.py",
    "faults/test_failover.py",
    "faults/test_takeover.py",
    "images/test_stores.py",
    "service/test_redis_rights.py",
    "service/test_bodies.py",
    "images/test_shrink.py",
    "queue/test_lines.py",
    "queue/test_leases.py",
    "queue/test_line_losses.py",
    "web/openai/test_npm_clients.py",
    "test_words.py",
    "images/test_uploads.py",
    "service/test_thumbnails.py",
    "service/test_edits.py",
    "service/test_silent_dns.py",
    "service/test_paid_images.py",
    "service/test_restarts.py",
    "service/test_budgets.py",
    "worker/test_pool_fairness.py",
    "worker/test_pool.py",
    "faults/test_foreign_values.py",
    "faults/test_redis_faults.py",
    "images/test_thumbnails.py",
    "images/test_s3.py",
    "images/test_metadata.py",
    "queue/test_model.py",
    "queue/test_embedded.py",
    "queue/test_embedded_sharing.py",
    "providers/test_sandbox.py",
    "service/test_waits.py",
    "service/test_serial_upstream.py",
    "service/test_variants.py",
    "faults/test_kill_loop.py",
)
"""Files that take longest, longest first. They start first, so that no process ends long after the others."""


WAITING = (
    "browser",
    "faults",
    "queue",
    "service",
    "test_bench.py",
    "test_interrupted_runs.py",
    "web/test_generators.py",
)
"""Files that wait for programs, or for time to pass, more than they compute."""


ONE_PROCESS = {
    "browser/test_docs.py": "browser/test_studio.py",
    "browser/test_studio_tabs.py": "browser/test_studio.py",
    "browser/test_board.py": "browser/test_studio_pages.py",
    "browser/test_cross_origin.py": "browser/test_studio_pages.py",
}
"""Files that the process of another file runs behind it: a browser of their own would cost 2 s of CPU."""


def order_of(path: str) -> int:
    """Return the place of a test file in the order in which the files start."""
    first = first_of(path)
    return SLOW.index(first) if first in SLOW else len(SLOW)


def first_of(path: str) -> str:
    """Return the first of the test files that run in one process with a file."""
    return ONE_PROCESS.get(path, path)


def waits(path: str) -> bool:
    """Return whether a test file waits more than it computes."""
    return not _names(path).isdisjoint(WAITING)


def tier_of(path: str) -> str:
    """Return the tier of a test file, given its path below `tests/`."""
    return next((tier for tier, paths in TIERS.items() if not _names(path).isdisjoint(paths)), "integration")


def _names(path: str) -> set[str]:
    return {path, *(parent.as_posix() for parent in PurePosixPath(path).parents)}


if __name__ == "__main__":
    sys.stdout.write(" ".join(f"tests/{path}" for path in TIERS[sys.argv[1]]))
