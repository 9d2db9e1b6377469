"""The dataflow: sources, pairs, batches, model, restored flow, and the command line."""
