"""Triton functions that are the same in every generated module.

They are copied as source into generated modules and never imported by this package, which so does
without Triton. They may use any name of `names.py`, which a generated module defines itself.
"""
