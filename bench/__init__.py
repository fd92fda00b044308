"""Benchmarks that anyone can run: `python -m bench [names…]`, or `make bench`. Each prints a table and its command."""
