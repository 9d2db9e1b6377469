"""Moving scenes whose flow is known exactly: shown by ``synthetic:NAME``, and used to train networks."""
