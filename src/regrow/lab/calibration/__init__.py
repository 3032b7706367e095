"""Find what beats fewer steps for the user's own pipeline: record, fit, choose positions."""
