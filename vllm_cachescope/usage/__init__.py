"""What was used: records of finished requests, their prices, and the ledger that keeps both."""
