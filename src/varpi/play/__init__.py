"""The playground: a page on which a pair draws, takes VA-π's step on one's own picture, and studies are read."""
