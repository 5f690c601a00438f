"""What runs a model: loading, passes over shared prefixes, captured decoding, the head, the layout of weights."""
