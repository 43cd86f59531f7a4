"""Agents and libraries as their users install them, run against a real server with the plugin."""
