"""Moving scenes whose flow is known exactly: what ``synthetic:NAME`` shows, and what networks are trained on."""
