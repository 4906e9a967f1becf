"""Commands that build and check the documentation: see CONTRIBUTING.md."""
