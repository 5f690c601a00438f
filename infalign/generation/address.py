"""The address of a server, under the name that it had before rewards asked servers too (`runtime.address`)."""

from infalign.runtime.address import address_problem, exposes_key, is_loopback

__all__ = ["address_problem", "exposes_key", "is_loopback"]
