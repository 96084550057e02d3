"""Frozen networks that reward or judge images."""
