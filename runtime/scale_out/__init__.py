"""belle-run scale-out: replicas of an engine behind Ray Serve. Only application.py and cluster.py import Ray."""
