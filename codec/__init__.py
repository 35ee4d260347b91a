"""Exact inference in integers, weights as bytes, and the archives that hold them."""
