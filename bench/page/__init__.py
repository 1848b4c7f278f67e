"""The page of all results: its words, its plots, its frame."""
