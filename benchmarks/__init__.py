"""What is measured, and how: see README.md for the commands."""
