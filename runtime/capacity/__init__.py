"""How much an engine serves on a host: the curve of rates and latencies over load, measured, stored and used for admission."""
