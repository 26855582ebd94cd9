"""The HTTP server: OpenAI's API in front of an engine. It needs the extra `serve`."""
