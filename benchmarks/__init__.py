"""Side-by-side measurements against the libraries a user would pick instead; run by `make bench`."""
