"""Decisions: which tensor becomes NF4 and why, and how every loader reads the skip list."""
