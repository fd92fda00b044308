"""Verbs of the queue, one module each: script, arguments, result, and the Redis commands that it costs.

A cost counts the commands inside of scripts too, because Upstash bills each of them. It is computed from the reply and
exact for the usual paths through a script; `tests/queue/test_costs.py` compares it with the counters of the server.
"""
