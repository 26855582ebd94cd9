"""Passes that remove nodes and weights which compute nothing new."""
