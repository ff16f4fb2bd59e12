"""Faces in the framing of `face64`: what they show, and how a photo gets there."""
