"""Every shim for differences between JAX versions; no other file checks the version.

Empty so far: what is used here is the same from JAX 0.10.2 to 0.12.
"""
