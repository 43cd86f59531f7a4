"""Repairs: breaks of a prefix that need not be, put right without another meaning."""
