"""Corrections of recorded requests that leave their meaning as it is: one file for each kind."""
