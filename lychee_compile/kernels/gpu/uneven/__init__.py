"""The method of declared policies whose groups differ in length: chunks and clusters."""
