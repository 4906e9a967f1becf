"""Index arithmetic: from which element of which tensor an element comes."""
