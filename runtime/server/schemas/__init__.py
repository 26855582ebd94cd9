"""What clients send and get: the bodies of requests and responses, from which the OpenAPI document is made."""
