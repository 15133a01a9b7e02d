"""The lottery ticket procedure: rewinding, and the tickets that it finds."""
