"""Benchmarks, a folder or a module each: README.md lists the commands."""
