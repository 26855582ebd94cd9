"""The HTTP server, which speaks OpenAI's API: belle-run serve. Its packages are those of the extra `serve`."""
