"""The image services upstream: one protocol, one file each."""
