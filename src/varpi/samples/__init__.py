"""Sample sets: generated images written to a directory, and sets of images read for an evaluation."""
