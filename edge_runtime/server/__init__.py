"""The OpenAI-compatible HTTP server. Start with :func:`edge_runtime.server.app.create_app`."""
