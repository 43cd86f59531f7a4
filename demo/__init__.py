"""A model small enough to make on the spot, and agents' conversations to put to it."""
