"""The tools beside training, one command each: bench, plan, report, show."""
