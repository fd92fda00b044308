"""Other queues that do the same no-op work as ours: `PEERS=1 python -m bench queue`.

One peer is one script, `<name>_peer.py` or `.mjs`, and its versions, `<name>.txt` or `<name>/package.json`. The call
is `script REDIS_URL COUNT CONCURRENCY IN_FLIGHT`. It warms up, has COUNT tasks submitted and worked, makes sure that
each result is stored. Then it prints {"seconds": timed, "submitted": with the warm-up, "version": of what ran}.
"""
