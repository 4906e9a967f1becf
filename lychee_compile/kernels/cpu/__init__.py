"""Compiled C++ for the parts of a decode step on a CPU that read every token."""
