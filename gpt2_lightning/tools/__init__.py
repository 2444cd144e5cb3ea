"""Commands beside training: bench, plan, report and `prepare --show`. Each is a plain function that cli/ calls."""
