"""A Triton backend for machines without a GPU: with TRITON_INTERPRET=1 nothing is ever compiled, only a device is asked for.

For tests only, and never installed: an entry point would reach every user's Triton.
"""
