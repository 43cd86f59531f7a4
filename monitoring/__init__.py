"""What the dashboard, the rules and alerts in configs/ are made from."""
