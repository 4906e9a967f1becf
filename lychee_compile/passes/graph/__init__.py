"""Facts about any FX graph, and edits of it; nothing here knows what attention is."""
