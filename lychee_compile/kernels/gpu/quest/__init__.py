"""The method "quest" on a GPU: pages with the least and greatest key."""
