from __future__ import annotations

import tracemalloc

from imagegen.tasks.request import GenerationRequest


def test_the_stored_form_takes_hardly_more_memory_than_its_bytes() -> None:
    requests = [GenerationRequest(prompt=f"a cat {number}", model="m") for number in range(200)]
    tracemalloc.start()
    kept = [request.stored_json() for request in requests]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < sum(map(len, kept)) * 3
