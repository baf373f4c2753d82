"""The drawn world: clips and stills of shapes, with captions that are true of them."""
