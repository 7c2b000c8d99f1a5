"""Prepared studies: each is a script that a person runs, and an example to copy."""
