"""The server: a protocol-neutral core, and a folder per protocol."""
