"""The drawn world: clips and stills of coloured shapes, with captions that describe them correctly."""
