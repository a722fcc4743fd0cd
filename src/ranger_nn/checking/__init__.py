"""A second opinion on every plan: its programs run on fingerprints. Shares nothing with planning but the format."""
