"""Reports of compiled graphs for users: as text, as data and as an HTML page."""
