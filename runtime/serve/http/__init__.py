"""What the protocols over HTTP have in common."""
