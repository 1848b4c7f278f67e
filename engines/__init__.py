"""Compiled models for this machine: manifests, the content-keyed plan store, and the backends that run them."""
