"""Images without Python: programs as files, and the C library that plays them."""
