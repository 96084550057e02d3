"""Frozen networks that reward or evaluate images."""
