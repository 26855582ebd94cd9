"""Shows that an answer depends on its request alone: the same requests answered in many ways, compared bit for bit."""
