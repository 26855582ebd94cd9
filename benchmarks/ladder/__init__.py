"""The way from a model answered one request at a time to this server, step by step, under one load."""
