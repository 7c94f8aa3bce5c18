"""An HTTP server that speaks OpenAI's API: a scheduler of sequences behind an ASGI application."""
