"""Servers and helpers that tests start for real: no part of the product is replaced by them."""
