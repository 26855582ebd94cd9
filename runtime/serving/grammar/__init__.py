"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance (extra `serve`)."""
