"""What users are shown: the report of a graph, in text, as data and as a page."""
