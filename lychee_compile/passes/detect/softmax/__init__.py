"""Softmaxes in every spelling."""
