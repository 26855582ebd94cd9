"""Passes from graph to graph, and the pipelines made of them."""
