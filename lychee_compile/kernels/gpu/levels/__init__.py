"""The method of all policies that are declared as levels: summaries of pages, ranked by kernels."""
