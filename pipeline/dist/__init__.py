"""The process group: starting and ending it, and collectives."""
