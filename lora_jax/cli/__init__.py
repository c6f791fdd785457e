"""The command line: where models, data, training and the interop edge are put together."""
