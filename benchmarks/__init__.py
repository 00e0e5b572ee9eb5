"""Demonstrations and measurements; every number in README and docs comes from a command here."""
