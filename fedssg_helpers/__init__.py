"""Helpers of the FedSSG course: small pure functions that two or more lessons need."""
