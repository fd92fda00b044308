"""A wire-exact emulator of Together's image endpoint, used by tests, benchmarks and people without a key.

    python -m imagegen.emulator --port 8787

    TOGETHER_API_KEY=any TOGETHER_API_URL=http://127.0.0.1:8787 imagegen

It imports nothing else of this project. A fault is set in three ways:

* in the prompt: `a cat {{fault:429 retry_after=2 times=1}}`: a name, then options `key=value` (quotes as in a shell);
* by a queue: `POST /_emulator/script` with `[{"fault": "500", "times": 2, "match": "cat"}, "hang", {"fault": "ok"}]`;
* for every call: `--fault hang`, or for a share of the calls: `--fault 503 --fail-rate 0.1 --seed 7`.

`GET /_emulator/faults` lists the names. Options that every fault takes:

    times=N     applies to N calls (a queued one: 1 unless `every` or `for_s` is there; 0 = without end)
    every=K     applies to the 1st, K+1st, 2K+1st … call that it meets
    for_s=S     applies until S seconds after it was queued, or first met in a prompt
    match=TEXT  queued ones: only to prompts that hold TEXT
    delay_s=S   answers after S seconds (otherwise `--delay`)
    held=1      answers after a later `POST /_emulator/release`, which releases all calls that are held then
    retry_after=S, headers={…}   headers of the answer, the second only in a queue

Options of some: `reset=S` (429: x-ratelimit-reset), `parameter=P`, `low=`, `high=`, `rate=` (fill in an error's text),
`status=`, `body=`, `content_type=` (status), `index=I` (spoils only that image), `images=K` (fewer_images), `url=`,
`target=` (redirects), `bytes=` (huge_body, gzip_bomb, long_error), `interval_s=` (trickle, image_slow: a byte each),
`link_times=N` (image_*: only the first N fetches of the link). `flapping` is 500 every=2; `storm` is 429 for_s=60.
`refused_field parameter=P shape=openai|together|fastapi` refuses calls that have that field.
`job` accepts the call as a job that is polled; its options: emulator/jobs.py. `--dialect sub2api` does so always.
A call that gets a fault, `ok` too, is not judged by the rate limit and the model's limits.
`reset_before_read` leaves the body unread only if queued without `match`; else it is read, but not paid.

`GET /_emulator/ledger` shows every call and whether it was paid: it is if the emulator read the whole request and did
not answer 4xx; `job` in it is the job that the call began: charged (a failed one is not), polls, collected. With
`?prompt=TEXT` it shows the calls with the text in their prompt. `DELETE` on it or on the script clears it; `POST
/_emulator/expire` kills all image links at once.
"""

from .call_ledger import CallLedger, EmulatedCall
from .together_emulator import Emulator, Options

__all__ = ["CallLedger", "EmulatedCall", "Emulator", "Options"]
