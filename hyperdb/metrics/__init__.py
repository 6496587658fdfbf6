"""Judges of pictures: frozen encoders, and the scores made from what they say."""
