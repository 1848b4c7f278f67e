"""OpenAI's image API over HTTP."""
