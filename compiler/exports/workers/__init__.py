"""Programs that run an export in its own runtime, in that runtime's environment: each needs nothing of this package.

A worker gets the path of the model and the longest sequence as arguments. For each line of its standard input, a JSON list of
token ids, it writes float32 logits [tokens, vocabulary] to its standard output: both sizes as little-endian int64, then the
values. It writes one line with two zeros when it has loaded the model.
"""
